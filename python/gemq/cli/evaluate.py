"""``gemq eval``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import gemq
from gemq.choices import Dtype
from gemq.cli import display
from gemq.cli.formats import Column, Format, FormatOption, emit
from gemq.cli.former import FormerForm
from gemq.cli.generation import Device, DtypeOption
from gemq.cli.settings import ConfigFile

if TYPE_CHECKING:
    from gemq.algorithms.divergence import Divergence

_COLUMNS = (
    Column("model", "model"), Column("perplexity", "perplexity", lambda v: f"{v:.3f}"),
    Column("tokens", "tokens", lambda v: f"{v:,}"), Column("tokens/s", "rate", lambda v: f"{v:,.0f}"),
)
_DIVERGENCE = (
    Column("KL divergence: mean", "mean", lambda v: f"{v:.5f}"), Column("median", "median", lambda v: f"{v:.5f}"),
    Column("99%", "p99", lambda v: f"{v:.4f}"), Column("99.9%", "p999", lambda v: f"{v:.4f}"),
    Column("same top token", "same_top", lambda v: f"{v:.2%}"),
    Column("perplexity ratio", "ratio", lambda v: f"{v:.4f}"),
)


def evaluate(
    model: Annotated[str, typer.Argument(help="Packed checkpoint, or a full-precision model.")],
    data: Annotated[str, typer.Option(help="Text: wikitext2, c4, file.txt, file.jsonl#field.")] = "wikitext2",
    length: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 2048,
    limit: Annotated[int | None, typer.Option(help="At most this many windows.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.", min=1)] = 4,
    reference: Annotated[str | None, typer.Option(help="Full-precision model, or a file of --save-logits: shows how "
                                                       "far the model is from it.")] = None,
    save_logits: Annotated[Path | None, typer.Option(help="Write the model's logits here, to be given as --reference "
                                                          "later.")] = None,
    second_half: Annotated[bool, typer.Option("--second-half", help="Compare the second half of each window, as "
                                                                    "llama.cpp does.")] = False,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    keep: Annotated[bool, typer.Option("--record", help="Keep the result with the checkpoint, for gemq report and its "
                                                        "model card.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    form: FormatOption = Format.table,
    former_form: FormerForm = None,
    config_file: ConfigFile = None,
) -> None:
    """Token perplexity on held-out text, and KL divergence from a reference.

    [dim]gemq eval mixtral-2.5 --data wikitext2 --reference mixtral-8x7b --record[/dim]
    """
    from gemq.card import write_card
    from gemq.checkpoint import load_packed_config
    from gemq.evaluations import Score, record

    if keep:
        if not Path(model).is_dir():
            raise typer.BadParameter(f"--record needs the checkpoint's folder, got {model!r}")
        # only now: an hour later the answer would be lost
        load_packed_config(model)
    with display.stages() as report:
        result = gemq.evaluate(
            model, data, length=length, limit=limit, batch_size=batch_size, dtype=dtype, device=device,
            progress=lambda done, total: report("evaluate", done, total), reference=reference, save_logits=save_logits,
            second_half=second_half,
        )
    found: dict[str, Any] = {
        "model": model, "data": data, "length": length, "perplexity": result.perplexity, "tokens": result.tokens,
        "seconds": result.seconds,
    }
    if result.divergence is not None:
        found["divergence"] = asdict(result.divergence) | {"ratio": result.divergence.ratio, "reference": reference}
    if keep:
        record(model, Score(
            _shown(data), length, result.perplexity, result.tokens, result.seconds, gemq=gemq.__version__,
            divergence=_recorded(result.divergence), reference=reference and _shown(reference),
        ))
        write_card(Path(model))
    if as_json:
        print(json.dumps(found, allow_nan=False))
        return
    rate = result.tokens / result.seconds
    chosen = former_form or form
    row = found | {"rate": rate}
    if reference is None:
        emit(data, _COLUMNS, [row], chosen)
        return
    row |= row.pop("divergence")
    emit(f"{data}, {_shown(reference)} as reference", (*_COLUMNS, *_DIVERGENCE), [row], chosen)


def _shown(path: str) -> str:
    """A text or reference by its name: where it lay is no part of what was measured."""
    return Path(path).name if "/" in path else path


def _recorded(divergence: Divergence | None) -> dict[str, float] | None:
    """The numbers of a divergence that are kept with the checkpoint."""
    from gemq.evaluations import DIVERGENCE

    return None if divergence is None else {name: getattr(divergence, name) for name in DIVERGENCE}
