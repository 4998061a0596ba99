"""``gemq allocate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemq.choices import Accounting, Constraints, Granularity, Solver
from gemq.cli import display
from gemq.cli.formats import Column, Format, FormatOption, emit
from gemq.cli.former import FormerForm

if TYPE_CHECKING:
    import numpy as np

_CONSTRAINTS = "Per layer an expert at the highest width (c2), the second highest (c3), c2c3 or none (paper: Table 17)."
_ACCOUNTING = "What shared experts count of the budget: exact, their size; paper, as its experiments count them."
_GRANULARITY = "What has its own width: expert; matrix, gate-and-up or down; auto, matrix if 0 is no candidate."

Bits = Annotated[str, typer.Option("--bits", "-b", help="Bits per expert; several, falling: 3,2.5,2.")]


def allocate(
    costs: Annotated[Path, typer.Argument(help="gemq_costs.json, or the checkpoint folder that holds it.")],
    bits: Bits = "2.5",
    constraints: Annotated[Constraints, typer.Option(help=_CONSTRAINTS)] = Constraints.none,
    shared_bits: Annotated[str, typer.Option(help="Shared experts: auto or 1..8.")] = "auto",
    accounting: Annotated[Accounting, typer.Option(help=_ACCOUNTING)] = Accounting.exact,
    granularity: Annotated[Granularity, typer.Option(help=_GRANULARITY)] = Granularity.auto,
    solver: Annotated[Solver, typer.Option(help="Solver of the program.")] = Solver.auto,
    points: Annotated[int | None, typer.Option(
        "--curve", min=2, help="Instead of --bits: this many budgets, lowest to highest."
    )] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    form: FormatOption = Format.table,
    former_form: FormerForm = None,
) -> None:
    """Solve the program again for any budget, from the costs that quantize saved.

    [dim]gemq allocate mixtral-2.5 --bits 3,2.75,2.5,2.25,2 --format md[/dim]
    """
    from gemq.algorithms.allocation import curve, pareto
    from gemq.cli import options
    from gemq.pipeline import load_costs

    loaded = load_costs(costs)
    how = {"per_layer": constraints, "solver": solver, "fixed_shared_bits": options.shared(shared_bits),
           "accounting": accounting, "granularity": granularity}
    found = curve(loaded, points, **how) if points else pareto(loaded, list(options.budgets(bits)), **how)

    def by_layer(bits: np.ndarray | None) -> dict[int, list[int]] | None:
        return None if bits is None else dict(zip(loaded.layers, bits.tolist(), strict=True))

    records = [
        {"budget": a.budget, "bits_per_expert": a.bits_per_expert, "objective": a.objective, "gap": a.gap,
         "solver": a.solver, "seconds": a.seconds, "expert_bits": by_layer(a.bits),
         "down_bits": by_layer(a.down_bits), "shared_bits": None if a.shared_bits is None else a.shared_bits.tolist()}
        for a in found
    ]
    form = Format.json if as_json else former_form or form
    emit("allocations", _ALLOCATION, records, form)
    if form is not Format.table or points:
        return
    for allocation in found:
        display.output().print(f"budget {allocation.budget:g}")
        given = [] if allocation.shared_bits is None else allocation.shared_bits.tolist()
        shared = dict(zip(loaded.layers, given, strict=False))
        experts, down = by_layer(allocation.bits) or {}, by_layer(allocation.down_bits)
        display.output().print(display.bit_map(experts, shared, down))


_ALLOCATION = (
    Column("budget", "budget", lambda v: f"{v:g}"), Column("bits/expert", "bits_per_expert", lambda v: f"{v:.3f}"),
    Column("loss increase", "objective", lambda v: f"{v:.6g}"), Column("gap", "gap", lambda v: f"{v:.1e}"),
    Column("solver", "solver"), Column("s", "seconds", lambda v: f"{v:.2f}"),
)
