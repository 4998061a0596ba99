"""Calibration and evaluation text: named corpora, local files, mixtures; cut into windows of tokens.

A source is ``NAME_OR_PATH[#FIELDS][@WEIGHT]``; several, comma separated, are a mixture::

    wikitext2                       WikiText-2 raw through `datasets`
    c4                              the first shard of C4 through `datasets`
    notes.txt                       one document
    docs.jsonl                      one document a line, field "text", or else the conversation of "messages"
    docs.jsonl#question&answer      two fields joined by a blank; "+" joins them directly
    wikitext2@0.75,docs.jsonl@0.25  three quarters of the windows from the first

The name of an existing file is taken as it is, commas and all. :mod:`gemq.algorithms.text_files` lists the kinds of
files. No more of a text is tokenized than its windows need, and no more than a piece of it is held.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemq.algorithms.documents import DEFAULT, Documents
from gemq.algorithms.text_files import TextFile, check_characters, failures, pieces, text_file
from gemq.algorithms.token_stream import tokens, window_at
from gemq.errors import CalibrationError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_log = logging.getLogger("gemq")

NAMED = ("wikitext2", "c4")
# bytes of a text of which random windows are drawn by its tokens; of longer ones by their bytes
LONG = 12 << 20


@dataclass(frozen=True)
class TextSource:
    """One corpus of a mixture: a name or path, the JSON fields to read, and its weight."""

    name: str
    fields: str = DEFAULT
    weight: float = 1.0


def parse_sources(text: str) -> list[TextSource]:
    """Parse the grammar of this module. Raises :class:`CalibrationError` for an empty or malformed source."""
    if os.path.isfile(text):
        return [TextSource(text)]
    sources = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([^#@]+?)(?:#([^@]+?))?(?:@([0-9]+\.?[0-9]*|\.[0-9]+))?\s*", part)
        if not match:
            raise CalibrationError(f"cannot read the text source {part!r}; expected NAME_OR_PATH[#FIELDS][@WEIGHT]")
        weight = float(match[3]) if match[3] else 1.0
        if not 0 < weight < math.inf:
            raise CalibrationError(f"the weight of text source {match[1]!r} must be above 0, got {match[3]:.60}")
        sources.append(TextSource(match[1], match[2] or DEFAULT, weight))
    return sources


def _hub_documents(name: str, split: str) -> list[str]:
    import datasets

    where: dict[str, tuple[str, dict[str, Any]]] = {
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
    # of long corpora, only the requested documents are read
    return data["text"]


def documents(source: TextSource, split: str = "train", tokenizer: Any = None) -> list[str]:
    """The documents of a source, all of them in memory. ``split`` ("train" or "test") matters for named corpora only,
    ``tokenizer`` for conversations only.

    Raises :class:`CalibrationError` if the source cannot be read or holds no text.
    """
    found = _documents(source, split, tokenizer)
    found = ["".join(found)] if isinstance(found, _Whole) else list(found)
    if not any(document.strip() for document in found):
        raise _empty(source)
    return found


def _empty(source: TextSource) -> CalibrationError:
    return CalibrationError(f"the text source {source.name!r} is empty")


class _Whole:
    """A plain text, which is one document: iterate over its parts."""

    def __init__(self, file: TextFile):
        self.file = file

    def __iter__(self) -> Iterator[str]:
        return pieces(self.file)


def _documents(source: TextSource, split: str, tokenizer: Any) -> list[str] | Documents | _Whole:
    if source.name in NAMED:
        return _hub_documents(source.name, split)
    file = text_file(source.name, NAMED)
    return _Whole(file) if file.kind == "text" else Documents(file, source.fields, tokenizer)


def _joined(documents: Iterable[str], joiner: str) -> Iterator[str]:
    for index, document in enumerate(documents):
        if index:
            yield joiner
        yield document


def _tokens(tokenizer: Any, source: TextSource, text: Iterable[str], need: int, most: int | None = None) -> Tensor:
    """Ids int32 of the parts of a text, or the first ``most``. :class:`CalibrationError` if there are fewer than
    ``need``, or the text is blank."""
    blank, parts = True, iter(text)

    def watched() -> Iterator[str]:
        nonlocal blank
        for part in parts:
            blank = blank and not part.strip()
            yield part

    found = tokens(tokenizer, watched(), most)
    if blank and not any(part.strip() for part in parts):
        raise _empty(source)
    _check_length(source.name, found.numel(), need)
    return found


def _windows(tokenizer: Any, source: TextSource, count: int, length: int, generator: torch.Generator) -> Tensor:
    found = _documents(source, "train", tokenizer)
    if isinstance(found, _Whole):
        if found.file.size > LONG and not found.file.packed:
            return _of_long_file(tokenizer, source, found.file, count, length, generator)
        text = _first(found, source, LONG) if found.file.packed else found
        return _of_one(tokenizer, source, text, count, length, generator)
    if isinstance(found, Documents):
        if found.scan().blank:
            raise _empty(source)
        if len(found) == 1:
            return _of_one(tokenizer, source, found.in_order([0], 0), count, length, generator)
    elif source.name == "wikitext2" or len(found) == 1:
        return _of_one(tokenizer, source, _joined(found, " "), count, length, generator)
    return _of_many(tokenizer, source, found, count, length, generator)


def _of_one(
    tokenizer: Any, source: TextSource, text: Iterable[str], count: int, length: int, generator: torch.Generator
) -> Tensor:
    """Draw random windows of one long text that is tokenized whole."""
    stream = _tokens(tokenizer, source, text, length)
    starts = torch.randint(0, stream.numel() - length + 1, (count,), generator=generator)
    return torch.stack([stream[s : s + length] for s in starts.tolist()])


def _first(text: Iterable[str], source: TextSource, most: int) -> Iterator[str]:
    """The first ``most`` characters of a text whose length is not known."""
    for part in text:
        yield part[:most]
        most -= len(part)
        if most < 0:
            _log.warning(f"{source.name} is compressed and long: windows are drawn from its first {LONG:,} characters")
            return


def _of_long_file(
    tokenizer: Any, source: TextSource, file: TextFile, count: int, length: int, generator: torch.Generator
) -> Tensor:
    """Draw random windows of a text that is too long to tokenize whole, at random places among its bytes."""
    if not any(part.strip() for part in pieces(file)):
        raise _empty(source)
    with failures(file.path), open(file.path, "rb") as stream:

        def read(offset: int, size: int) -> bytes:
            stream.seek(offset)
            data = stream.read(size)
            check_characters(file.path, data)
            return data

        return _placed(tokenizer, source, read, file.size, count, length, generator)


def _placed(
    tokenizer: Any, source: TextSource, read: Callable[[int, int], bytes], size: int, count: int, length: int,
    generator: torch.Generator,
) -> Tensor:
    places = torch.randint(0, size, (count,), generator=generator)
    found = [window_at(tokenizer, read, size, place, length) for place in places.tolist()]
    windows = [window for window in found if window is not None]
    if len(windows) < len(found):
        _check_length(source.name, 0, length)
    return torch.stack(windows)


def _of_many(
    tokenizer: Any, source: TextSource, documents: list[str] | Documents, count: int, length: int,
    generator: torch.Generator,
) -> Tensor:
    """Concatenate the documents in random order and return the first windows of the result."""
    need = count * length
    order = torch.randperm(len(documents), generator=generator).tolist()
    # a token has rarely more characters, and if so, more are read
    texts = documents.in_order(order, 8 * need) if isinstance(documents, Documents) else (documents[i] for i in order)
    parts, total = [], 0
    for text in texts:
        parts.append(tokens(tokenizer, [text], need - total))
        total += parts[-1].numel()
        if total >= need:
            break
    _check_length(source.name, total, need)
    return torch.cat(parts).view(count, length)


def _check_length(name: str, have: int, need: int) -> None:
    if have < need:
        raise CalibrationError(f"the text source {name!r} has {have} tokens, but {need} are needed")


def calibration_windows(tokenizer: Any, sources: str, count: int, length: int, seed: int = 0) -> Tensor:
    """``count`` windows of ``length`` tokens, int64 ``[count, length]``, deterministic in ``seed``.

    One long text gives random windows, many documents are shuffled and concatenated, as the paper's scripts
    do for WikiText-2 and C4. Windows of a plain text of more than :data:`LONG` bytes begin at random bytes instead of
    at random tokens, so that only they are tokenized. A mixture shares the windows by weight and interleaves them by a
    seeded shuffle. Raises :class:`CalibrationError` for unreadable, empty or too short text, ``ValueError`` for a seed
    that torch does not take.
    """
    if not -(2**63) <= seed < 2**64:
        given = seed if seed.bit_length() < 100 else f"one of {seed.bit_length()} bits"
        raise ValueError(f"seed must be in -2**63..2**64-1, got {given}")
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
    windows = torch.cat(parts).long()
    return windows if len(parts) == 1 else windows[torch.randperm(count, generator=generator)]


def evaluation_windows(tokenizer: Any, sources: str, length: int, limit: int | None = None) -> Tensor:
    """Consecutive windows of a held-out text, int64 ``[count, length]``.

    WikiText-2: ``"\\n\\n"``-joined test split. C4: the first 1,100 validation documents joined by a blank, as
    are the documents of a local file. A last, shorter window is dropped. Raises :class:`CalibrationError`.
    """
    if length < 2 or (limit is not None and limit < 1):
        raise CalibrationError(f"need at least 1 window of 2 tokens, got a limit of {limit} and {length} tokens")
    most = None if limit is None else limit * length
    parts = []
    for source in parse_sources(sources):
        found, joiner = _documents(source, "test", tokenizer), "\n\n" if source.name == "wikitext2" else " "
        text: Iterable[str] = found
        if not isinstance(found, _Whole):
            text = _joined(islice(found, 1100) if source.name == "c4" else found, joiner)
        stream = _tokens(tokenizer, source, text, length, most)
        count = stream.numel() // length
        parts.append(stream[: count * length].view(count, length))
    windows = torch.cat(parts).long()
    return windows if limit is None else windows[:limit]


def check_windows(windows: Tensor, config: PreTrainedConfig, tokenizer: Any = None) -> None:
    """Raise :class:`CalibrationError` if windows ``[N, T]`` are longer than a model of this transformers config has
    positions, or hold ids that its embedding has no rows for; with a tokenizer, the error names such a token."""
    config = config.get_text_config()
    positions, rows = getattr(config, "max_position_embeddings", None), getattr(config, "vocab_size", None)
    length, highest = windows.shape[1], int(windows.max())
    if positions is not None and length > positions:
        raise CalibrationError(f"the windows have {length} tokens, the model {positions} positions "
                               f"(max_position_embeddings): length must be at most {positions}")
    if rows is not None and highest >= rows:
        token = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(highest)!r:.60})"
        raise CalibrationError(f"the tokenizer gives the id {highest}{token}, the model's embedding has rows "
                               f"0..{rows - 1} (vocab_size): it is the tokenizer of another model")
