"""Calibration and evaluation text: named corpora, local files, mixtures; cut into windows of tokens.

A source is ``NAME_OR_PATH[#FIELDS][@WEIGHT]``; several, comma separated, are a mixture::

    wikitext2                       WikiText-2 raw through `datasets`
    c4                              the first shard of C4 through `datasets`
    notes.txt                       one document
    docs.jsonl                      one document a line, field "text"
    docs.jsonl#question&answer      two fields joined by a blank; "+" joins them directly
    wikitext2@0.75,docs.jsonl@0.25  three quarters of the windows from the first

The name of an existing file is taken as it is, commas and all.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gemq.errors import CalibrationError

NAMED = ("wikitext2", "c4")
_JOINERS = {"+": "", "&": " "}


@dataclass(frozen=True)
class Source:
    """One corpus of a mixture: a name or path, the JSON fields to read, and its weight."""

    name: str
    fields: str = "text"
    weight: float = 1.0


def parse_sources(text: str) -> list[Source]:
    """Parse the grammar of this module. Raises :class:`CalibrationError` for an empty or malformed source."""
    if os.path.isfile(text):
        return [Source(text)]
    sources = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([^#@]+?)(?:#([^@]+?))?(?:@([0-9]+\.?[0-9]*|\.[0-9]+))?\s*", part)
        if not match:
            raise CalibrationError(f"cannot read the text source {part!r}; expected NAME_OR_PATH[#FIELDS][@WEIGHT]")
        weight = float(match[3]) if match[3] else 1.0
        if not weight > 0:
            raise CalibrationError(f"the weight of text source {match[1]!r} must be above 0, got {match[3]}")
        sources.append(Source(match[1], match[2] or "text", weight))
    return sources


def _json_documents(path: Path, fields: str) -> list[str]:
    names = re.split(r"([+&])", fields)
    documents = []
    # not splitlines(): a JSON string may hold U+2028 and other line separators
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            documents.append("".join(_JOINERS[n] if n in _JOINERS else _field(record, n) for n in names))
        except (ValueError, KeyError, TypeError) as error:
            raise CalibrationError(f"{path}, line {number}: no JSON record with {fields!r} ({error})") from None
    return documents


def _field(record: dict, name: str) -> str:
    if not isinstance(record[name], str):
        raise TypeError(f"{name!r} is not a string")
    return record[name]


def _hub_documents(name: str, split: str) -> list[str]:
    import datasets

    where = {
        "wikitext2": ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": split}),
        "c4": (
            "allenai/c4",
            {
                "data_files": {
                    "train": "en/c4-train.00000-of-01024.json.gz",
                    "test": "en/c4-validation.00000-of-00008.json.gz",
                },
                "split": split,
            },
        ),
    }
    path, options = where[name]
    try:
        data = datasets.load_dataset(path, **options)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:150]
        raise CalibrationError(f"could not load {name} ({reason}); give a local .txt or .jsonl file instead") from error
    return list(data["text"])


def documents(source: Source, split: str = "train") -> list[str]:
    """The documents of a source. ``split`` ("train" or "test") matters for named corpora only.

    Raises :class:`CalibrationError` if the source cannot be read or holds no text.
    """
    if source.name in NAMED:
        found = _hub_documents(source.name, split)
    else:
        path = Path(source.name)
        if not os.path.isfile(path):
            raise CalibrationError(f"no text file {source.name!r}; known corpora: {', '.join(NAMED)}")
        jsonl = path.suffix in (".jsonl", ".json")
        try:
            found = _json_documents(path, source.fields) if jsonl else [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{path} is not UTF-8 text ({error})") from None
    if not any(d.strip() for d in found):
        raise CalibrationError(f"the text source {source.name!r} is empty")
    return found


def _tokens(tokenizer, text: str) -> Tensor:
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def _windows(tokenizer, source: Source, count: int, length: int, generator: torch.Generator) -> Tensor:
    docs = documents(source)
    if source.name == "wikitext2" or len(docs) == 1:
        # random windows of one long text
        stream = _tokens(tokenizer, " ".join(docs))
        _check_length(source.name, stream.numel(), length)
        starts = torch.randint(0, stream.numel() - length + 1, (count,), generator=generator)
        return torch.stack([stream[s : s + length] for s in starts.tolist()])
    # shuffled documents one after another, the first windows of that
    order = torch.randperm(len(docs), generator=generator).tolist()
    parts, total = [], 0
    for index in order:
        parts.append(_tokens(tokenizer, docs[index]))
        total += parts[-1].numel()
        if total >= count * length:
            break
    _check_length(source.name, total, count * length)
    return torch.cat(parts)[: count * length].view(count, length)


def _check_length(name: str, have: int, need: int) -> None:
    if have < need:
        raise CalibrationError(f"the text source {name!r} has {have} tokens, but {need} are needed")


def calibration_windows(tokenizer, sources: str, count: int, length: int, seed: int = 0) -> Tensor:
    """``count`` windows of ``length`` tokens, int64 ``[count, length]``, deterministic in ``seed``.

    One long text gives random windows, many documents are shuffled and concatenated, as the paper's scripts
    do for WikiText-2 and C4. A mixture shares the windows by weight and interleaves them by a seeded shuffle.
    Raises :class:`CalibrationError` for unreadable, empty or too short text.
    """
    if count < 1 or length < 2:
        raise CalibrationError(f"need at least 1 window of 2 tokens, got {count} of {length}")
    parsed = parse_sources(sources)
    generator = torch.Generator().manual_seed(seed)
    total = sum(s.weight for s in parsed)
    bounds, cumulative = [0], 0.0
    for source in parsed:
        cumulative += source.weight
        bounds.append(round(count * cumulative / total))
    parts = [
        _windows(tokenizer, source, high - low, length, generator)
        for source, low, high in zip(parsed, bounds[:-1], bounds[1:], strict=True)
        if high > low
    ]
    windows = torch.cat(parts)
    return windows if len(parts) == 1 else windows[torch.randperm(count, generator=generator)]


def evaluation_windows(tokenizer, sources: str, length: int, limit: int | None = None) -> Tensor:
    """Consecutive windows of a held-out text, int64 ``[count, length]``.

    WikiText-2: ``"\\n\\n"``-joined test split. C4: the first 1,100 validation documents joined by a blank, as
    are the documents of a local file. A last, shorter window is dropped. Raises :class:`CalibrationError`.
    """
    if length < 2 or (limit is not None and limit < 1):
        raise CalibrationError(f"need at least 1 window of 2 tokens, got a limit of {limit} and {length} tokens")
    parts = []
    for source in parse_sources(sources):
        docs = documents(source, "test")
        if source.name == "c4":
            docs = docs[:1100]
        stream = _tokens(tokenizer, ("\n\n" if source.name == "wikitext2" else " ").join(docs))
        _check_length(source.name, stream.numel(), length)
        count = stream.numel() // length
        parts.append(stream[: count * length].view(count, length))
    windows = torch.cat(parts)
    return windows if limit is None else windows[:limit]
