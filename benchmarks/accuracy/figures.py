"""Figures of a study: the Pareto curve of bytes against perplexity, bit maps, Eq. 6, and routes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import cells
import eq6
import numpy as np
import tables

from gemq.demo.picture import bit_map

if TYPE_CHECKING:
    from render import Study

STYLES = {
    "uniform": ("#8c8c8c", "o"), "PMQ": ("#c08a2e", "s"), "GEMQ, paper's options": ("#8fbfe0", "v"),
    "GEMQ, no tuning": ("#5aa0d2", "D"), "GEMQ": ("#17518a", "^"), "GEMQ, GPTQ alone": ("#b55a6a", "P"),
    "GEMQ, one width an expert": ("#3f9a78", "X"),
}


def _figure(width: float, height: float):
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _save(figure, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        FigureCanvasAgg(figure).print_png(file)
    temporary.replace(path)


def pareto(study: Study, model: str, table: tables.Table, path: Path) -> bool:
    """Megabytes of the checkpoint against perplexity on the first text; a line a method, a point a budget."""
    texts = study.texts(model)
    curves = {}
    for label, run in table.rows:
        if run.kind != "quantize":
            continue
        points = []
        for budget in run.budgets:
            values = study.perplexities(model, run, budget, texts[0])
            sizes = [s["bytes"] for s in study.stages(model, run) if s["budget"] == budget]
            if values:
                points.append((np.mean(sizes) / 1e6, np.mean(values), min(values), max(values), budget))
        if points:
            curves[label] = points
    if not curves:
        return False
    figure = _figure(6.4, 4.2)
    axis = figure.subplots()
    for label, points in curves.items():
        size, mean, low, high, _ = np.array(points).T
        colour, marker = STYLES.get(label, ("black", "."))
        axis.errorbar(size, mean, [mean - low, high - mean], color=colour, marker=marker, markersize=5, linewidth=1.6,
                      capsize=2, label=label)
    label, points = max(curves.items(), key=lambda item: len(item[1]))
    for size, mean, *_, budget in points:
        axis.annotate(f"{budget:g} bits", (size, mean), textcoords="offset points", xytext=(6, 6), fontsize=7)
    for tuned, style, name in ((False, "--", "full precision"), (True, ":", "full precision, routers tuned")):
        full = study.full(model, texts[0], tuned)
        if full:
            axis.axhline(np.mean(full), color="black", linestyle=style, linewidth=0.9, label=name)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_xlabel("checkpoint, MB (left is smaller)", fontsize=9)
    axis.set_ylabel(f"perplexity on {texts[0]} (down is better)", fontsize=9)
    axis.tick_params(labelsize=8, which="both")
    axis.grid(alpha=0.25, which="both")
    axis.legend(fontsize=7, frameon=False)
    _save(figure, path)
    return True


def bit_maps(study: Study, model: str, table: tables.Table, path: Path) -> bool:
    """Layers down, experts across, a panel a budget."""
    stages = [s for s in study.stages(model, table.rows[0][1]) if s["seed"] == study.seeds[0]]
    if not stages:
        return False
    figure = _figure(3.2 * len(stages), 3)
    maps = [[dict(enumerate(s[part])) for part in ("bits", "down_bits") if part in s] for s in stages]
    widest = max(b for parts in maps for part in parts for row in part.values() for b in row)
    axes = figure.subplots(1, len(stages), squeeze=False)[0]
    for axis, stage, parts in zip(axes, stages, maps, strict=True):
        bit_map(axis, stage["budget"], parts, widest)
        axis.set_aspect("auto")
        axis.set_ylabel("MoE layer", fontsize=8)
    _save(figure, path)
    return True


def predicted_true(study: Study, model: str, table: tables.Table, path: Path) -> bool:
    """A point an expert: the rise that Eq. 6 predicts against the true one, a panel a width."""
    stages = study.stages(model, table.rows[0][1])
    if not stages:
        return False
    stage = stages[0]
    predicted = eq6.calibrated(np.array(stage["predicted"]), stage["length"])
    true, widths = np.array(stage["true"]), stage["candidates"]
    figure = _figure(3.4 * len(widths), 3.2)
    for b, axis in enumerate(figure.subplots(1, len(widths), squeeze=False)[0]):
        used = (predicted[..., b] > 0) & (true[..., b] > 0)
        for layer in range(len(true)):
            at = used[layer]
            axis.scatter(predicted[layer, at, b], true[layer, at, b], s=14, label=f"layer {layer}",
                         color=f"C{layer % 10}")
        both = np.concatenate([predicted[..., b][used], true[..., b][used]])
        if len(both):
            axis.plot([both.min(), both.max()], [both.min(), both.max()], color="black", linewidth=0.8, linestyle="--")
            axis.set_xscale("log")
            axis.set_yscale("log")
        rank = eq6.spearman(predicted[..., b], true[..., b])
        axis.set_title(f"{widths[b]} bit{'s' if widths[b] != 1 else ''}, Spearman {rank:.2f}", fontsize=9)
        axis.set_xlabel("predicted rise of the loss (Eq. 6)", fontsize=8)
        axis.set_ylabel("true rise", fontsize=8)
        axis.tick_params(labelsize=7)
    if len(true) <= 8:
        axis.legend(fontsize=6, frameon=False)
    _save(figure, path)
    return True


DRAWN = {"1": ("Checkpoint size against perplexity", pareto, "pareto"),
         "maps": ("Bit maps", bit_maps, "maps"),
         "eq6": ("Eq. 6 against the true rise of the loss", predicted_true, "eq6")}


def draw(study: Study, model: str, chosen: dict[str, tables.Table], folder: Path) -> dict[str, str]:
    """Draw every figure that has results; returns file names by title."""
    found = {}
    for key, (title, function, stem) in DRAWN.items():
        if key in chosen:
            path = folder / f"{cells.label(model)}-{stem}.png"
            if function(study, model, chosen[key], path):
                found[title] = path.name
    return found
