"""Pictures of measured expert blocks: the roofline, and speed-up by tokens.

    python benchmarks/plot.py RESULTS.json --out docs/images/

``RESULTS.json`` is what ``bench_moe.py --rows-json`` or ``gpu_run.sh`` wrote, or a file of ``benchmarks/results``.
Writes ``<name>-roofline.png`` and ``<name>-speedup.png``; ``name`` is ``moe-cpu``, or the GPU's name.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path

# light to dark with the width, apart in print and to colour-blind eyes
COLOURS = {
    "1.5": "#f0b323", "2.0": "#7cc18b", "2.0 mixed": "#2f9e77", "2.5": "#2b7bba", "3.0": "#5b4ea0", "4.0": "#2d1e4f",
}  # fmt: skip
GREY = "#8c8c8c"


def moe_of(content: dict) -> dict:
    """The expert-block part of a result: the file itself, or the ``moe`` stage of a GPU run.

    Raises ``ValueError`` if there is none, or no row of it was measured.
    """
    found = content if content.get("kind") in ("moe", "moe-cpu") else content.get("moe")
    if not isinstance(found, dict) or not any("p50_us" in row for row in found.get("rows", [])):
        raise ValueError("holds no measured expert blocks")
    return found if "conditions" in found else found | {"conditions": content["conditions"]}


def picture_name(moe: dict) -> str:
    """``moe-cpu``, or the GPU's name in letters a file may have."""
    machine = moe["conditions"]["machine"]
    return "moe-cpu" if "CPU only" in machine else re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")


def caption(moe: dict) -> str:
    """Machine, commit, date and versions."""
    c = moe["conditions"]
    limits = moe["limits"]
    return f"{c['machine']}; commit {c['commit']}, {c['date']}, torch {c['torch']}\n" \
           f"ideal: measured memory {limits['copy_gb_s']:g} GB/s, dense {limits['matmul_dtype']} product " \
           f"{limits['matmul_tflop_s']:g} TFLOP/s"


def _figure(moe: dict, height: float):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    blocks = list(dict.fromkeys(row["block"] for row in moe["rows"] if "p50_us" in row))
    columns = min(2, len(blocks))
    lines = -(-len(blocks) // columns)
    figure = Figure(figsize=(5.6 * columns, height * lines + 0.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis in axes[len(blocks) :]:
        axis.axis("off")
    for axis in axes[: len(blocks)]:
        axis.grid(alpha=0.25)
        axis.tick_params(which="both", labelsize=8)
    figure.text(0.5, -0.01, caption(moe), ha="center", va="top", fontsize=7, color="#555555")
    return figure, list(zip(axes, blocks, strict=False))


def _packed(rows: list[dict], block: str, mix: str) -> list[dict]:
    found = [r for r in rows if r["block"] == block and r["way"] == "gemq" and r["mix"] == mix and "p50_us" in r]
    return sorted(found, key=lambda r: r["tokens"])


def roofline(moe: dict):
    """Achieved TFLOP/s over FLOP per weight byte, each mix a line through its numbers of tokens, below what the
    measured copy bandwidth and the measured dense product allow."""
    figure, panels = _figure(moe, 3.7)
    copy, peak = moe["limits"]["copy_gb_s"] / 1e3, moe["limits"]["matmul_tflop_s"]
    for axis, block in panels:
        rows = [r for r in moe["rows"] if r["block"] == block and "p50_us" in r]
        strongest = {r["tokens"]: r for r in rows if r["mix"] is None and r["way"] == r.get("strongest_unquantized")}
        seen = []
        series = [("strongest in 16 or 32 bits", [strongest[t] for t in sorted(strongest)], GREY)]
        series += [(f"gemq, {mix}", _packed(rows, block, mix), colour) for mix, colour in COLOURS.items()]
        for label, points, colour in series:
            if points:
                x = [p["flops"] / p["bytes"] for p in points]
                axis.plot(x, [p["tflop_s"] for p in points], marker="o", markersize=3.5, color=colour, label=label,
                          linewidth=1.1)  # fmt: skip
                seen += x
        ends = [min(seen) / 1.5, max(max(seen) * 1.5, 2 * peak / copy)]
        corner = peak / copy
        axis.plot([ends[0], corner, ends[1]], [ends[0] * copy, peak, peak], color="black", linestyle="--",
                  linewidth=0.9, label="ideal")  # fmt: skip
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(block, fontsize=9)
        axis.set_xlabel("FLOP per byte of weights", fontsize=8)
        axis.set_ylabel("TFLOP/s", fontsize=8)
        axis.legend(fontsize=6.5, frameon=False, loc="lower right")
    return figure


def speedup(moe: dict):
    """Time of the strongest unquantized way over gemq's, by tokens, a line per mix; above 1 gemq is faster."""
    figure, panels = _figure(moe, 3.4)
    for axis, block in panels:
        tokens = set()
        for mix, colour in COLOURS.items():
            points = [r for r in _packed(moe["rows"], block, mix) if "ratio" in r]
            if points:
                axis.plot([r["tokens"] for r in points], [r["ratio"] for r in points], marker="o", markersize=3.5,
                          color=colour, label=f"gemq, {mix}", linewidth=1.3)  # fmt: skip
                tokens |= {r["tokens"] for r in points}
        axis.axhline(1, color="black", linewidth=0.9, linestyle="--")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xticks(sorted(tokens), [str(t) for t in sorted(tokens)])
        axis.xaxis.set_minor_locator(_none())
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_title(block, fontsize=9)
        axis.set_xlabel("tokens", fontsize=8)
        axis.set_ylabel("speed-up over the strongest unquantized", fontsize=8)
        if tokens:
            axis.legend(fontsize=6.5, frameon=False)
    return figure


def _none():
    from matplotlib.ticker import NullLocator

    return NullLocator()


def draw(content: dict, folder: Path) -> list[Path]:
    """Write both pictures and return their paths."""
    moe = moe_of(content)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for what, make in (("roofline", roofline), ("speedup", speedup)):
        path = folder / f"{picture_name(moe)}-{what}.png"
        temporary = path.with_suffix(".tmp")
        make(moe).savefig(temporary, format="png", bbox_inches="tight")
        os.replace(temporary, path)
        written.append(path)
    return written


def main() -> None:
    """Parse, draw, print the paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    try:
        for path in draw(json.loads(options.results.read_text()), options.out):
            print(path)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {options.results}: {error}")


if __name__ == "__main__":
    main()
