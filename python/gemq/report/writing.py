"""Write a report's page and its pictures, each whole or not at all."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gemq import durable
from gemq.errors import CheckpointError
from gemq.report.data import Checkpoint, ReportData
from gemq.report.page import render
from gemq.report.pareto import Point, curves
from gemq.report.style import LIGHT, SERIES_LIGHT, WIDTHS
from gemq.report.svg import DASHES, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INCHES = (6.4, 4.0)


def write_report(data: ReportData, path: str | os.PathLike, title: str = "gemq report") -> Path:
    """Write the page to ``path``; an interrupted write leaves what was there. Raises :class:`CheckpointError`."""
    _write(Path(path), render(data, title).encode())
    return Path(path)


def _write(path: Path, content: bytes) -> None:
    try:
        durable.replace(path, content)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written ({error.strerror})") from None


def write_pictures(data: ReportData, folder: str | os.PathLike) -> list[Path]:
    """The figures as PNGs in ``folder``: ``pareto*.png``, and per checkpoint ``NAME-bits.png`` (or ``-bits-gate-up``
    and ``-bits-down``), ``-importance``, ``-routers`` and ``-times``. Returns their paths.

    Raises :class:`CheckpointError` if one cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made ({error.strerror})") from None
    drawings = {}
    for index, (where, points, lines) in enumerate(curves(data)):
        if len(points) > 1:
            drawings[f"pareto{index or ''}"] = _pareto(where, points, lines)
    for checkpoint in data.checkpoints:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", checkpoint.name).lstrip(".") or "checkpoint"
        for of, bits in checkpoint.bits.items():
            part = "" if of == "experts" else "-" + of.replace(" and ", "-")
            drawings[f"{name}-bits{part}"] = _bit_map(checkpoint.name, of, bits)
        if checkpoint.costs is not None:
            drawings[f"{name}-importance"] = _importance(checkpoint)
        if checkpoint.shift:
            drawings[f"{name}-routers"] = _routers(checkpoint)
        if checkpoint.seconds:
            drawings[f"{name}-times"] = _times(checkpoint)
    paths = []
    for name, figure in drawings.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        paths.append(folder / f"{name}.png")
        _write(paths[-1], buffer.getvalue())
    return paths


def _figure(title: str, size: tuple[float, float] = _INCHES) -> tuple[Figure, Axes]:
    """An empty figure and its axis, without matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    # a name may hold the dollars and underscores of mathtext
    axis.set_title(title, fontsize=10, parse_math=False)
    axis.tick_params(labelsize=8)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    return figure, axis


def _dash(index: int) -> str | tuple[float, tuple[float, ...]]:
    pattern = DASHES[index % len(DASHES)]
    return (0, tuple(float(v) for v in pattern.split())) if pattern else "solid"


def _pareto(where: str, points: list[Point], lines: list[tuple[str, float]]) -> Figure:
    figure, axis = _figure(f"Size against perplexity: {where}")
    for index, series in enumerate(dict.fromkeys(p.series for p in points)):
        own = sorted((p.bytes / 1e6, p.perplexity) for p in points if p.series == series)
        axis.plot(*zip(*own, strict=True), color=SERIES_LIGHT[index % 6], linestyle=_dash(index), marker="o",
                  markersize=4, label=series)
    for name, value in lines:
        axis.axhline(value, color=LIGHT["faint"], linestyle="--", linewidth=1, label=name)
    axis.set_xlabel("size of the checkpoint, MB", fontsize=9)
    axis.set_ylabel("perplexity", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    return figure


def _bit_map(name: str, of: str, bits: dict[int, list[int]]) -> Figure:
    from matplotlib.colors import BoundaryNorm, ListedColormap

    rows = list(bits.values())
    experts = max(map(len, rows))
    grid = [[*row, *[float("nan")] * (experts - len(row))] for row in rows]
    size = (min(14.0, 1.2 + 0.28 * max(experts, 8)), min(14.0, 1.1 + 0.28 * max(len(rows), 3)))
    figure, axis = _figure(f"{name}: bits {'' if of == 'experts' else f'of {of} '}by layer and expert", size)
    colours = ListedColormap([cell for cell, _ in WIDTHS])
    axis.imshow(grid, cmap=colours, norm=BoundaryNorm([w - 0.5 for w in range(10)], 9), aspect="auto")
    if experts <= 64:
        for y, row in enumerate(rows):
            for x, width in enumerate(row):
                axis.text(x, y, str(width), ha="center", va="center", fontsize=7, color=WIDTHS[width][1])
    step = -(-len(rows) // 24)
    axis.set_yticks(range(0, len(rows), step), [str(n) for n in list(bits)[::step]])
    axis.set_xlabel("expert", fontsize=9)
    axis.set_ylabel("layer", fontsize=9)
    return figure


def _importance(checkpoint: Checkpoint) -> Figure:
    figure, axis = _figure(f"{checkpoint.name}: predicted loss increase by expert")
    costs = checkpoint.costs
    assert costs is not None
    routed = costs.routed
    for b, bits in enumerate(costs.candidates):
        axis.plot(sorted(routed[..., b].ravel(), reverse=True), color=SERIES_LIGHT[b % 6], linestyle=_dash(b),
                  label=f"{bits} bit{'s' * (bits != 1)}")
    if (routed > 0).any():
        axis.set_yscale("log", nonpositive="clip")
    axis.set_xlabel("experts, most important first", fontsize=9)
    axis.set_ylabel("loss increase (Eq. 6)", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    return figure


def _routers(checkpoint: Checkpoint) -> Figure:
    figure, axis = _figure(f"{checkpoint.name}: router shift")
    layers = sorted(checkpoint.shift)
    at = range(len(layers))
    axis.bar([i - 0.2 for i in at], [100 * checkpoint.shift[n].weights for n in layers], 0.38, color=SERIES_LIGHT[0],
             label="router weights")
    selected = [(i, 100 * s.selected) for i, n in enumerate(layers) if (s := checkpoint.shift[n]).selected is not None]
    if selected:
        axis.bar([i + 0.2 for i, _ in selected], [v for _, v in selected], 0.38, color=SERIES_LIGHT[1],
                 label="selected experts")
    axis.set_xticks(list(at), [str(n) for n in layers])
    axis.set_xlabel("decoder layer", fontsize=9)
    axis.set_ylabel("change, %", fontsize=9)
    axis.legend(fontsize=8, frameon=False)
    return figure


def _times(checkpoint: Checkpoint) -> Figure:
    figure, axis = _figure(f"{checkpoint.name}: run time by stage", (6.4, 0.9 + 0.4 * len(checkpoint.seconds)))
    names, values = list(checkpoint.seconds), list(checkpoint.seconds.values())
    bars = axis.barh(range(len(names)), values, color=SERIES_LIGHT[3])
    axis.bar_label(bars, [f"{number(v)} s" for v in values], fontsize=8, padding=3)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("seconds", fontsize=9)
    return figure
