"""The model card of a checkpoint: ``README.md`` with what the hub reads and what a reader needs to run it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from gemq import __version__, durable
from gemq.checkpoint import load_packed_config
from gemq.checkpoint_summary import summarize
from gemq.evaluations import Score, read_evaluations
from gemq.folders import is_hub_name
from gemq.format import UNQUANTIZED
from gemq.integrity import CARD_FILE, read_json
from gemq.packed_config import PackedConfig

# bytes of a megabyte on the hub's pages
_MB = 1e6


def hub_name(model: str) -> str | None:
    """``model`` if it is the name of somebody's hub repository rather than a folder, else None."""
    return model if "/" in model and is_hub_name(model) else None


def write_card(folder: Path, name: str | None = None) -> Path:
    """Write ``README.md`` of the checkpoint in ``folder`` from the files beside it; it replaces an earlier one.

    ``name`` is the checkpoint's in the text (default: the folder's, as from where it lies). The base model is the one
    that ``gemq_report.json`` names, if it is of the hub: a local path is nobody else's business. Measured perplexities
    are those of ``gemq_evaluations.json``. Raises :class:`gemq.CheckpointError` if the folder is no checkpoint.
    """
    folder = Path(folder)
    config = load_packed_config(folder)
    report = read_json(folder / "gemq_report.json") if (folder / "gemq_report.json").is_file() else {}
    options = report.get("options") or {}
    model = options.get("model") if isinstance(options, dict) else None
    base = hub_name(model) if isinstance(model, str) else None
    # a field of the hub's own, by name
    relation: dict[str, Any] = {"base_model_relation": "quantized"} if base else {}
    data = ModelCardData(
        base_model=base, library_name="transformers", pipeline_tag="text-generation",
        tags=["gemq", "quantized", "mixture-of-experts", "moe"],
        **relation,
    )
    title, place = (name or _name(folder.resolve(), between) for between in "-/")
    text = _text(folder, title, place, config, base, report)
    # read as the hub reads it
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
    durable.write_atomic(folder / CARD_FILE, str(card).encode())
    return folder / CARD_FILE


def _name(folder: Path, between: str) -> str:
    """Name of the folder, after its parent's if it is only a budget: ``mixtral-2.5`` for ``mixtral/2.5``."""
    budget = folder.name.replace(".", "", 1).isdigit() and folder.parent.name
    return f"{folder.parent.name}{between}{folder.name}" if budget else folder.name


def _text(folder: Path, name: str, place: str, config: PackedConfig, base: str | None, report: dict[str, Any]) -> str:
    summary = summarize(folder)
    widths, routed = config.widths, config.widths.weight_bits
    shares = ", ".join(f"{100 * routed.count(b) / len(routed):.0f}% at {b}" for b in sorted(set(routed)))
    origin = f"[{base}](https://huggingface.co/{base})" if base else "A mixture-of-experts model"
    parts = [
        f"# {_cell(name)}\n",
        f"{origin} with its experts quantized to {summary.expert_bits:.2f} bits on average by gemq {__version__} "
        f"(method of [GEMQ](https://arxiv.org/abs/2605.23078)). It needs the package gemq to run.\n",
        "| | |\n|---|---|",
        f"| routed experts | {summary.expert_bits:.3f} bits: {shares} |",
        f"| attention, dense MLPs, routers | {widths.attention}, {widths.dense}, {widths.router} bits |",
    ]
    if min(widths.head, widths.embedding) < UNQUANTIZED:
        parts.append(f"| head, embedding | {widths.head}, {widths.embedding} bits |")
    if widths.shared:
        shared = sorted(set(widths.shared.values()))
        parts.append(f"| shared experts | {', '.join(map(str, shared))} bits |")
    parts += [f"| groups | {config.group_size} columns |", f"| size | {summary.tensor_bytes / _MB:,.1f} MB |"]
    parameters = report.get("parameters")
    if isinstance(parameters, int) and parameters > 0:
        parts.append(f"| the same in 16 bits | {2 * parameters / _MB:,.1f} MB |")
    return "\n".join(parts) + "\n" + _scores(folder) + _use(place)


def _scores(folder: Path) -> str:
    scores = read_evaluations(folder)
    if not scores:
        return ""
    rows = [f"| {_cell(s.data)} | {s.length:,} | {s.tokens:,} | {s.perplexity:.3f} |" for s in scores]
    table = "\n## Measured\n\n| text | window | tokens | perplexity |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    return table + _divergences([s for s in scores if s.divergence])


def _divergences(scores: list[Score]) -> str:
    """The table of KL divergences from full precision; empty without any."""
    if not scores:
        return ""
    head = "\n| text | KL divergence from | mean | median | 99% | 99.9% | same top token | perplexity ratio |\n"
    rows = []
    for s in scores:
        d = s.divergence or {}
        names = f"| {_cell(s.data)} | {_cell(s.reference or 'full precision')} | "
        rows.append(f"{names}{d['mean']:.5f} | {d['median']:.5f} | {d['p99']:.4f} | {d['p999']:.4f} | "
                    f"{d['same_top']:.2%} | {d['ratio']:.4f} |")
    return head + "|" + "---|" * 8 + "\n" + "\n".join(rows) + "\n"


def _cell(text: str) -> str:
    """Escape text so that none of it is read as markup, HTML or a link."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"[\\|\[\]`]", r"\\\g<0>", plain)


def _use(place: str) -> str:
    """Instructions for loading the checkpoint at ``place``, a repository or folder, in Python and at the terminal."""
    shown = place.replace("`", "").replace("\n", " ")
    return _USE.format(python=json.dumps(shown), shell=shlex.quote(shown))


_USE = """
## Use

```python
import gemq
from transformers import AutoTokenizer

model = gemq.from_pretrained({python})
tokenizer = AutoTokenizer.from_pretrained({python})
ids = tokenizer("It was a dark night", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))
```

or at the terminal: `gemq generate {shell} "It was a dark night"`.
"""
