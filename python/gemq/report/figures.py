"""The figures of a report, each an inline SVG, and the tables that say the same in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gemq.report.data import Checkpoint, RouterShift
from gemq.report.svg import DASHES, Plot, Scale, around, drawing, element, number, text

SERIES = 6
_LEGEND_ROW = 17


@dataclass(frozen=True)
class Table:
    """Column names and rows of text; the first column is left-aligned."""

    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Figure:
    """One figure: what it says in a sentence, the drawing, and the table that stands in for it."""

    title: str
    sentence: str
    svg: str
    table: Table
    wide: bool = False  # keeps its size and scrolls
    span: bool = False  # takes a row of the page for itself


def size(count: float) -> str:
    """Format a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{number(count)} {unit}"
        count /= 1000
    return f"{number(count)} TB"


def duration(seconds: float) -> str:
    """Format a number of seconds for people."""
    if seconds < 90:
        return f"{number(seconds, 2)} s"
    return f"{number(seconds / 60)} min" if seconds < 5400 else f"{number(seconds / 3600)} h"


def _layer_ticks(layers: Sequence[int], most: int = 12) -> list[int]:
    step = -(-len(layers) // most)
    return list(range(0, len(layers), step))


def bit_map(bits: dict[int, list[int]], of: str = "experts") -> Figure:
    """Draw a map of widths: layers down, experts across, one coloured cell each, with digits where cells have room for
    them. ``of`` names the part of the experts that has these widths."""
    experts = max(len(row) for row in bits.values())
    cell = 24 if experts <= 16 else 15 if experts <= 64 else 8
    left, top = 40, 20
    shapes: dict[int, list[str]] = {}
    digits = []
    for y, row in enumerate(bits.values()):
        for x, width in enumerate(row):
            at = f"M{left + x * cell} {top + y * cell}h{cell - 1}v{cell - 1}h-{cell - 1}z"
            shapes.setdefault(width, []).append(at)
            if cell >= 15:
                digits.append(text(left + (x + 0.5) * cell - 0.5, top + (y + 0.5) * cell + 4, str(width), "middle",
                                   f"digit d{width}"))
    marks = [element("path", d="".join(at), class_=f"w{width}") for width, at in sorted(shapes.items())]
    every = max(1, -(-14 // cell))
    for y, layer in enumerate(bits):
        if y % every == 0:
            marks.append(text(left - 6, top + (y + 0.5) * cell + 4, str(layer), "end", "tick"))
    step = 1 if cell >= 24 else 4 if cell >= 15 else 16
    for x in range(0, experts, step):
        marks.append(text(left + (x + 0.5) * cell, top - 5, str(x), "middle", "tick"))
    marks.append(text(0, 11, "layer", class_="label"))
    marks.append(text(left + experts * cell + 6, top - 5, "expert", class_="label"))
    flat = [b for row in bits.values() for b in row]
    shares = ", ".join(f"{number(100 * flat.count(b) / len(flat))}% at {b}" for b in sorted(set(flat)))
    sentence = f"{len(bits)} layers of {experts} experts, {number(sum(flat) / len(flat))} bits on average: {shares}."
    bottom = top + len(bits) * cell
    for index, width in enumerate(sorted(shapes)):
        x = left + 62 * index
        marks.append(element("rect", x=x, y=bottom + 9, width=12, height=12, class_=f"w{width}"))
        marks.append(text(x + 17, bottom + 19, f"{width} bit{'s' * (width != 1)}", class_="tick"))
    width, height = max(left + experts * cell + 54, left + 62 * len(shapes)), bottom + 26
    title = "Bits by layer and expert" if of == "experts" else f"Bits of {of} by layer and expert"
    svg = drawing(title, sentence, width, height, *marks, *digits, fixed=True)
    rows = [(str(n), " ".join(map(str, row)), f"{sum(row) / len(row):.2f}") for n, row in bits.items()]
    table = Table(("layer", "experts", "mean"), rows)
    return Figure(title, sentence, svg, table, wide=True, span=experts > 24)


def bits_by_layer(means: dict[int, float]) -> Figure:
    """Draw one bar a layer, as high as its experts' mean width. Stacked shares of widths would hide the mean."""
    layers = list(means)
    plot = Plot.over((-0.5, len(layers) - 0.5), (0, max(means.values()) * 1.12 or 1), left=34)
    plot.axes("decoder layer", "mean bits", _layer_ticks(layers), lambda i: str(layers[int(i)]))
    for at, (layer, mean) in enumerate(means.items()):
        plot.bar(at - 0.38, at + 0.38, mean, "s0", f"layer {layer}: {mean:.2f} bits")
        if len(layers) <= 12:
            plot.marks.append(text(plot.x(at), plot.y(mean) - 4, f"{mean:.2f}", "middle", "value"))
    most, least = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
    sentence = (f"Layer {most} keeps most ({means[most]:.2f} bits), layer {least} least ({means[least]:.2f})."
                if means[most] > means[least] else f"Every layer has {means[most]:.2f} bits.")
    table = Table(("layer", "mean bits"), [(str(n), f"{m:.3f}") for n, m in means.items()])
    return Figure("Bits by layer", sentence, plot.draw("Mean bits by layer", sentence), table)


def importance(checkpoint: Checkpoint) -> Figure | None:
    """Predicted loss increase of every expert, a curve for each width, most important first in each."""
    costs = checkpoint.costs
    if costs is None:
        return None
    widths = [b for b in range(len(costs.candidates)) if costs.routed[..., b].max() > 0]
    if not widths:
        return None
    lowest = costs.routed[..., widths[0]]
    # each in its own order: an expert that matters at 1 bit need not at 3
    curves = {costs.candidates[b]: -np.sort(-costs.routed[..., b].ravel()) for b in widths}
    positive = [v for values in curves.values() for v in values if v > 0]
    floor = max(min(positive), max(positive) * 1e-9)
    plot = Plot.over((0, max(1, lowest.size - 1)), around([floor, max(positive)], log=True), log=True, height=270)
    plot.y = Scale(plot.y.low, plot.y.high, plot.y.start, plot.y.stop + _LEGEND_ROW, True)
    plot.axes("experts, most important first", "loss increase (Eq. 6)", y_format=lambda v: number(v, 1))
    for index, values in enumerate(curves.values()):
        thin = max(1, len(values) // 600)
        points = [(i, max(float(v), floor)) for i, v in enumerate(values) if i % thin == 0]
        plot.line(points, f"s{index % SERIES}", DASHES[index % len(DASHES)])
    legend(plot, [f"{b} bit{'s' * (b != 1)}" for b in curves])
    share = curves[costs.candidates[widths[0]]][: max(1, lowest.size // 10)].sum() / lowest.sum()
    sentence = f"The most important tenth of the experts carries {100 * share:.0f}% of the loss increase at " \
               f"{costs.candidates[widths[0]]} bit{'s' * (costs.candidates[widths[0]] != 1)}."
    rows = [(str(layer), *(number(float(costs.routed[row, :, b].sum())) for b in widths))
            for row, layer in enumerate(costs.layers)]
    table = Table(("layer (sum)", *(f"{costs.candidates[b]} bits" for b in widths)), rows)
    return Figure("Importance of experts", sentence, plot.draw("Predicted loss increase by expert", sentence), table)


def legend(plot: Plot, names: Sequence[str], *, bars: bool = False) -> None:
    """Names of the series above the plot, each behind a piece of its line or bar."""
    x, y = plot.x.start, 27.0
    for index, name in enumerate(names):
        class_ = f"s{index % SERIES}"
        wanted = 26 + 6.4 * len(name)
        if x + wanted > plot.width and x > plot.x.start:
            x, y = plot.x.start, y + 14
        plot.marks.append(
            element("rect", x=x, y=y - 9, width=18, height=9, class_=class_) if bars else
            element("line", x1=x, x2=x + 18, y1=y - 4, y2=y - 4, class_=f"line {class_}",
                    stroke_dasharray=DASHES[index % len(DASHES)] or None)
        )
        plot.marks.append(text(x + 22, y, name, class_="tick"))
        x += wanted + 6


def importance_by_layer(checkpoint: Checkpoint) -> Figure | None:
    """A layer's summed loss increase at each width."""
    costs = checkpoint.costs
    if costs is None:
        return None
    sums = costs.routed.sum(axis=1)
    widths = [b for b in range(len(costs.candidates)) if (sums[:, b] > 0).all()]
    if not widths or len(costs.layers) < 2:
        return None
    values = [float(v) for b in widths for v in sums[:, b]]
    plot = Plot.over((-0.3, len(costs.layers) - 0.7), around(values, log=True), log=True, height=270)
    plot.y = Scale(plot.y.low, plot.y.high, plot.y.start, plot.y.stop + _LEGEND_ROW, True)
    plot.axes("decoder layer", "loss increase (Eq. 6)", _layer_ticks(costs.layers),
              lambda i: str(costs.layers[int(i)]), lambda v: number(v, 1))
    for index, b in enumerate(widths):
        plot.line([(i, float(v)) for i, v in enumerate(sums[:, b])], f"s{index % SERIES}", DASHES[index % len(DASHES)])
        for i, v in enumerate(sums[:, b]):
            if len(costs.layers) <= 40:
                plot.marker(i, float(v), f"s{index % SERIES}",
                            f"layer {costs.layers[i]}, {costs.candidates[b]} bits: {number(float(v))}")
    legend(plot, [f"{costs.candidates[b]} bit{'s' * (costs.candidates[b] != 1)}" for b in widths])
    first = widths[0]
    heaviest = int(sums[:, first].argmax())
    share = sums[heaviest, first] / sums[:, first].sum()
    sentence = f"Layer {costs.layers[heaviest]} loses most: {100 * share:.0f}% of all at the lowest width."
    rows = [(str(n), *(number(float(sums[i, b])) for b in widths)) for i, n in enumerate(costs.layers)]
    table = Table(("layer", *(f"{costs.candidates[b]} bits" for b in widths)), rows)
    return Figure("Importance of layers", sentence, plot.draw("Loss increase by layer", sentence), table)


def router_shift(shift: dict[int, RouterShift]) -> Figure | None:
    """Relative change of the routers' weights, and the share of selections that changed."""
    if not shift:
        return None
    layers = sorted(shift)
    weights = [100 * shift[n].weights for n in layers]
    shares = (shift[n].selected for n in layers)
    selected = [None if share is None else 100 * share for share in shares]
    known = [v for v in selected if v is not None]
    plot = Plot.over((-0.5, len(layers) - 0.5), (0, max([*weights, *known, 1e-6]) * 1.15), height=270, left=40)
    plot.y = Scale(plot.y.low, plot.y.high, plot.y.start, plot.y.stop + _LEGEND_ROW)
    plot.axes("decoder layer", "change, %", _layer_ticks(layers), lambda i: str(layers[int(i)]))
    for at, layer in enumerate(layers):
        plot.bar(at - 0.38, at - 0.01 if known else at + 0.38, weights[at], "s0",
                 f"layer {layer}: weights moved by {number(weights[at])}%")
        anew = selected[at]
        if anew is not None:
            plot.bar(at + 0.01, at + 0.38, anew, "s1", f"layer {layer}: {number(anew)}% selected anew")
    legend(plot, ["router weights"] + ["selected experts"] * bool(known), bars=True)
    sentence = f"Router weights moved by {number(sum(weights) / len(weights))}% on average"
    sentence += f"; {number(sum(known) / len(known))}% of the selected experts are other ones than the original's." \
        if known else "."
    rows = [(str(n), f"{number(w)}%", "" if s is None else f"{number(s)}%")
            for n, w, s in zip(layers, weights, selected, strict=True)]
    table = Table(("layer", "weights", "selected experts"), rows)
    return Figure("Router shift", sentence, plot.draw("Router shift by layer", sentence), table)


def output_error(checkpoint: Checkpoint) -> Figure | None:
    """Mean relative output error of the experts' matrices by layer."""
    if not checkpoint.error:
        return None
    layers = list(checkpoint.error)
    values = [100 * v for v in checkpoint.error.values()]
    plot = Plot.over((-0.5, len(layers) - 0.5), (0, max(values) * 1.12 or 1), left=40)
    plot.axes("decoder layer", "output error, %", _layer_ticks(layers), lambda i: str(layers[int(i)]))
    for at, layer in enumerate(layers):
        plot.bar(at - 0.38, at + 0.38, values[at], "s2", f"layer {layer}: {number(values[at])}%")
    fewest = min(checkpoint.tokens, key=checkpoint.tokens.__getitem__)
    sentence = f"GPTQ leaves {number(sum(values) / len(values))}% of the outputs' energy as error on average; the " \
               f"expert that saw least had {checkpoint.tokens[fewest]:,} calibration tokens (layer {fewest})."
    rows = [(str(n), f"{number(v)}%", f"{checkpoint.tokens[n]:,}") for n, v in zip(layers, values, strict=True)]
    table = Table(("layer", "error", "fewest tokens"), rows)
    return Figure("Output error of the experts", sentence, plot.draw("Output error by layer", sentence), table)


def run_times(seconds: dict[str, float]) -> Figure | None:
    """One bar a stage."""
    if not seconds:
        return None
    total = sum(seconds.values())
    longest = max(seconds.values()) or 1.0
    marks, y = [], 6.0
    for stage, value in seconds.items():
        width = max(1.0, 200 * value / longest)
        marks.append(text(112, y + 14, stage, "end", "tick"))
        marks.append(element("rect", x=118, y=y, width=width, height=18, class_="s3"))
        marks.append(text(122 + width, y + 14, duration(value), class_="value"))
        y += 26
    slowest = max(seconds, key=seconds.__getitem__)
    sentence = f"{duration(total)} in all; {slowest} took {100 * seconds[slowest] / (total or 1):.0f}%."
    rows = [(stage, duration(v), f"{100 * v / (total or 1):.0f}%") for stage, v in seconds.items()]
    svg = drawing("Run time by stage", sentence, 380, y + 4, *marks)
    return Figure("Run time by stage", sentence, svg, Table(("stage", "time", "share"), rows))
