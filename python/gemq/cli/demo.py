"""``gemq demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemq.cli import display
from gemq.cli.allocate import Bits

if TYPE_CHECKING:
    from gemq.demo.run import DemoResult


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints, picture and table.")]
    = Path("demo-out"),
    bits: Bits = "3,2.5,2,1.5",
    windows: Annotated[int | None, typer.Option(help="Bound the held-out windows (default: all).", min=1)] = None,
) -> None:
    """Quantize the small trained model that ships with gemq on its text, compare methods, and generate.

    [dim]gemq demo --bits 3,2 -o demo-out[/dim]
    """
    from gemq.cli import options
    from gemq.demo.run import DemoConfig, run_demo

    with display.stages() as report:
        result = run_demo(DemoConfig(output, options.budgets(bits), windows), report)
    show(result)


def show(result: DemoResult) -> None:
    """Print the demo's table, the bit map of the lowest budget, and the generated text."""
    out = display.output()
    rows = [
        [r.method, "16" if r.bits is None else f"{r.bits:g}", f"{r.perplexity:.2f}", display.size(r.bytes),
         f"{r.seconds:.1f}"]
        for r in sorted(result.rows, key=lambda r: -(r.bits or 16))
    ]
    out.print(display.table("held-out text", ["method", "bits/expert", "perplexity", "bytes", "seconds"], rows))
    lowest = min(result.bit_maps)
    out.print(f"bits at {lowest:g} per expert; picture: {result.picture}", highlight=False)
    out.print(display.bit_map(result.bit_maps[lowest][0], {}, *result.bit_maps[lowest][1:]))
    out.print(
        f"the packed checkpoint {result.checkpoints[lowest]}, loaded again: perplexity {result.packed_perplexity:.2f}",
        highlight=False,
    )
    g = result.generation
    out.print(f"\ngenerated at {lowest:g} bits, {g.new_tokens / g.seconds:.0f} tokens/s:", highlight=False)
    out.print(g.text, markup=False, highlight=False, soft_wrap=True)
    display.notes().print(f"demo finished in {result.seconds:.0f} s", style="dim")
