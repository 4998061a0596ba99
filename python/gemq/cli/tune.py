"""``gemq tune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemq.cli import display


def tune(
    shape: Annotated[
        list[str] | None,
        typer.Option(help="HIDDENxFFNxEXPERTSxTOPK, or mixtral-8x7b, deepseek-v2-lite, qwen1.5-moe, qwen3-30b-a3b; "
                          "repeat it for several (default: those four)."),
    ] = None,
    bits: Annotated[str, typer.Option(help="Widths of the experts it is measured with.")] = "1,2,3",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Table to write (default: the one that launches look up).")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Start nothing new after this many seconds.", min=0)] = None,
) -> None:
    """Measure launch parameters of the GPU kernels on the present GPU, and keep them for later runs.

    [dim]gemq tune --shape mixtral-8x7b[/dim]
    """
    from gemq.cli import options
    from gemq.ops import launch_search

    shapes = [launch_search.parse_shape(text) for text in shape] if shape else list(launch_search.PRESETS.values())
    launch_search.check_device()
    with display.stages() as report:
        path, found = launch_search.tune(shapes, output, bits=options.widths(bits), budget=budget, report=report)
    rows = [
        [str(f.shape), str(f.tokens), f"{f.default_us:.1f}", f"{f.us:.1f}", f"{f.default_us / f.us:.2f}", str(f.trials)]
        for f in found
    ]
    columns = ["shape", "tokens", "default us", "tuned us", "ratio", "trials"]
    out = display.output()
    out.print(display.table("expert blocks", columns, rows))
    out.print(str(path), markup=False, highlight=False, soft_wrap=True)
