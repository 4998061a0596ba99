"""``gemq eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

import gemq
from gemq.choices import Dtype
from gemq.cli import display
from gemq.cli.formats import Column, Format, FormatOption, emit
from gemq.cli.former import FormerForm
from gemq.cli.generation import Device, DtypeOption
from gemq.cli.settings import ConfigFile

_COLUMNS = (
    Column("model", "model"), Column("perplexity", "perplexity", lambda v: f"{v:.3f}"),
    Column("tokens", "tokens", lambda v: f"{v:,}"), Column("tokens/s", "rate", lambda v: f"{v:,.0f}"),
)


def evaluate(
    model: Annotated[str, typer.Argument(help="Packed checkpoint, or a full-precision model.")],
    data: Annotated[str, typer.Option(help="Text: wikitext2, c4, file.txt, file.jsonl#field.")] = "wikitext2",
    length: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 2048,
    limit: Annotated[int | None, typer.Option(help="At most this many windows.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.", min=1)] = 4,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    keep: Annotated[bool, typer.Option("--record", help="Keep the result with the checkpoint, for gemq report and its "
                                                        "model card.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    form: FormatOption = Format.table,
    former_form: FormerForm = None,
    config_file: ConfigFile = None,
) -> None:
    """Token perplexity on held-out text.

    [dim]gemq eval mixtral-2.5 --data wikitext2 --record[/dim]
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
            progress=lambda done, total: report("evaluate", done, total),
        )
    found = {"model": model, "data": data, "length": length, "perplexity": result.perplexity, "tokens": result.tokens,
             "seconds": result.seconds}
    if keep:
        # where a text lay is no part of what was measured
        name = Path(data).name if "/" in data else data
        record(model, Score(name, length, result.perplexity, result.tokens, result.seconds, gemq=gemq.__version__))
        write_card(Path(model))
    if as_json:
        print(json.dumps(found, allow_nan=False))
        return
    rate = result.tokens / result.seconds
    emit(data, _COLUMNS, [found | {"rate": rate}], former_form or form)
