"""The demo's picture: perplexity by budget and method, and the bit map of every budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = {
    "uniform": ("#8c8c8c", "o", "-"), "PMQ": ("#c08a2e", "s", "-"), "GEMQ, paper": ("#8fbfe0", "v", "-"),
    "GEMQ": ("#2b7bba", "D", "-"),
    "GEMQ + routers": ("#17518a", "^", "-"),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: perplexity on held-out text, bytes of the checkpoint, seconds of quantizing."""

    method: str
    bits: float | None
    perplexity: float
    bytes: int
    seconds: float


def _curves(axis: Axes, rows: list[Row]) -> None:
    for method, (colour, marker, line) in _STYLES.items():
        points = sorted((r.bits, r.perplexity) for r in rows if r.method == method)
        axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=line, label=method, markersize=4)
    for row, line in zip((r for r in rows if r.bits is None), ("--", ":"), strict=False):
        axis.axhline(row.perplexity, color="black", linestyle=line, linewidth=0.9, label=row.method)
    axis.set_yscale("log")
    top = max(row.perplexity for row in rows)
    ticks = [t for t in (25, 30, 35, 40, 50, 60, 80) if t < 1.1 * top]
    axis.set_yticks(ticks, [str(t) for t in ticks], minor=False)
    axis.set_yticks([], minor=True)
    axis.set_xlabel("bits per expert", fontsize=9)
    axis.set_ylabel("perplexity, held-out text", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=7, frameon=False)


def bit_map(axis: Axes, budget: float, maps: list[dict[int, list[int]]], widest: int) -> None:
    """Layers down, experts across, digits where they have room: side by side the widths of gate and up and those of
    down, or of experts as a whole."""
    gap, layers, experts = [float("nan")], list(maps[0]), len(next(iter(maps[0].values())))
    rows = [[width for part in maps for width in gap + part[layer]][1:] for layer in layers]
    axis.imshow(rows, cmap="YlGnBu", vmin=0, vmax=widest + 1, aspect="equal")
    for y, row in enumerate(rows):
        for x, bits in enumerate(row):
            if bits != bits or experts > 16:
                continue
            shade = "white" if bits > 0.6 * (widest + 1) else "black"
            axis.text(x, y, str(bits), ha="center", va="center", fontsize=7, color=shade)
    axis.set_title(f"{budget:g} bits per expert", fontsize=9)
    starts = [at * (experts + 1) for at in range(len(maps))]
    axis.set_xticks([x for at in starts for x in (at, at + experts - 1)], ["0", str(experts - 1)] * len(maps))
    axis.set_yticks(range(len(layers)), [str(index) for index in layers])
    axis.tick_params(labelsize=7)
    axis.set_xlabel("expert" if len(maps) == 1 else "expert: gate and up; down", fontsize=8)
    axis.set_ylabel("layer", fontsize=8)


def draw(rows: list[Row], maps: dict[float, list[dict[int, list[int]]]], path: Path) -> None:
    """Write a PNG: the table's curves on the left, the GEMQ bit maps (layer down, expert across) on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), dpi=150, layout="constrained")
    figure.set_layout_engine("constrained", h_pad=0.12)
    parts: Any = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    left, right = parts
    _curves(left.subplots(), rows)
    columns = min(2, len(maps))
    axes = right.subplots(-(-len(maps) // columns), columns, squeeze=False).flatten()
    widest = max(b for parts in maps.values() for part in parts for row in part.values() for b in row)
    for axis, (budget, found) in zip(axes, sorted(maps.items(), reverse=True), strict=False):
        bit_map(axis, budget, found, widest)
    for axis in axes[len(maps) :]:
        axis.axis("off")
    FigureCanvasAgg(figure).print_png(path)
