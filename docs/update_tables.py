"""Write the tables of the README, docs/measured.md and docs/performance.md from the JSON of measured results.

``python docs/update_tables.py`` after ``benchmarks/record.py``; the newest file of each kind in ``benchmarks/results``
is used. Nothing in those tables is typed by hand. A document shows a table where it has its markers, ``<!-- begin NAME
-->`` and ``<!-- end NAME -->``: ``demo``, ``reproduction``, ``moe-cpu``, ``moe-gpu``; without a result they stay empty.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("measured.md", "performance.md"))]


def newest(prefix: str) -> dict | None:
    """The last result file of a kind, by the date in its name."""
    files = sorted(RESULTS.glob(f"{prefix}-*.json"))
    return json.loads(files[-1].read_text()) if files else None


def newest_gpu() -> dict | None:
    """The last result of ``gpu_run.sh`` that has expert blocks; such files are named after their GPU."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    found = [r for r in found if isinstance(r, dict) and r.get("kind") == "gpu" and has_blocks(r.get("moe"))]
    return max(found, key=lambda r: r["conditions"]["date"], default=None)


def has_blocks(moe: dict | None) -> bool:
    """Whether an expert block of gemq was measured."""
    return bool(moe) and any("p50_us" in row and row["way"] == "gemq" for row in moe.get("rows", []))


def conditions(result: dict) -> str:
    """Where, when and with which commit."""
    c = result["conditions"]
    return f"{c['machine']}; commit {c['commit']}, {c['date']}, torch {c['torch']}; `{c['command']}`."


def demo_table(result: dict) -> str:
    """Perplexity by method and budget, and bytes of the checkpoint."""
    rows = result["rows"]
    budgets = sorted({r["bits"] for r in rows if r["bits"] is not None}, reverse=True)
    full = {r["method"]: r for r in rows if r["bits"] is None}
    lines = [
        "Perplexity on held-out text of the demo's model (Mixtral architecture, 5 layers of 8 experts, 4.4 M "
        f"parameters), full precision {full['FP']['perplexity']:.2f}; with its routers tuned alike, the control for "
        f"the last line, {full['FP, routers tuned']['perplexity']:.2f}.", "",
        "| bits per expert | " + " | ".join(f"{b:g}" for b in budgets) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    found = {(r["method"], r["bits"]): r for r in rows}
    for method in ("uniform", "PMQ", "GEMQ, paper", "GEMQ", "GEMQ + routers"):
        cells = " | ".join(f"{found[method, b]['perplexity']:.2f}" for b in budgets)
        lines.append(f"| {method} | {cells} |")
    sizes = " | ".join(f"{found['GEMQ', b]['bytes'] / 1e6:.2f} MB" for b in budgets)
    lines.append(f"| checkpoint (16 bits: {full['FP']['bytes'] / 1e6:.2f} MB) | {sizes} |")
    return "\n".join([*lines, "", conditions(result)])


def reproduction_table(result: dict) -> str:
    """The method comparison on a 14M-parameter model, mean and half the range over calibration seeds."""
    spec = importlib.util.spec_from_file_location("reproduce_table", ROOT / "benchmarks" / "reproduce_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    texts = [t for t in result["rows"][0] if t not in ("method", "bits", "seed", "seconds")]
    seeds = len({r["seed"] for r in result["rows"][1:]})
    return "\n".join([
        f"{result['title']} Mean ± half the range of {seeds} calibration seeds.", "",
        module.table(result["rows"], texts), "", conditions(result),
    ])


def _time(us: float) -> str:
    """Microseconds below 10 ms, else milliseconds; three digits."""
    return f"{us:.3g} µs" if us < 1000 else f"{us:.0f} µs" if us < 10_000 else f"{us / 1000:.3g} ms"


def _block_table(rows: list[dict], block: str) -> list[str]:
    """One block: gemq by mix and tokens, with the ratio to the strongest unquantized way, which the last line names."""
    rows = [r for r in rows if r["block"] == block and "p50_us" in r]
    gemq = {(r["mix"], r["tokens"]): r for r in rows if r["way"] == "gemq"}
    dense = {r["tokens"]: r for r in rows if r["mix"] is None and r["way"] == r.get("strongest_unquantized")}
    tokens = sorted({t for _, t in gemq})
    lines = [f"| {block}, tokens | " + " | ".join(map(str, tokens)) + " |", "|---|" + "---|" * len(tokens)]

    def cell(row: dict | None) -> str:
        if row is None:
            return ""
        ratio = f" ({row['ratio']:.2g}×)" if "ratio" in row else ""
        return f"{_time(row['p50_us'])}, {row['gb_s']:.3g} GB/s{ratio}"

    for mix in sorted({m for m, _ in gemq}):
        lines.append(f"| gemq, {mix} | " + " | ".join(cell(gemq.get((mix, t))) for t in tokens) + " |")
    if dense:
        named = [f"{_time(dense[t]['p50_us'])}, {dense[t]['dtype']} {dense[t]['way']}" if t in dense else ""
                 for t in tokens]  # fmt: skip
        lines.append("| strongest unquantized | " + " | ".join(named) + " |")
    return lines


def moe_table(moe: dict) -> str:
    """Median time of expert blocks, weight bytes a second, and the ratio to the strongest unquantized way."""
    limits = moe["limits"]
    lines = [
        "One expert block, median time, bytes of the weights it touched per second, and in brackets how "
        f"many times faster than the strongest unquantized way. In the same run: memory {limits['copy_gb_s']:g} "
        f"GB/s, dense {limits['matmul_dtype']} product {limits['matmul_tflop_s']:g} TFLOP/s.",
    ]
    for block in dict.fromkeys(r["block"] for r in moe["rows"] if r["way"] == "gemq" and "p50_us" in r):
        lines += ["", *_block_table(moe["rows"], block)]
    return "\n".join([*lines, "", conditions(moe)])


def moe_cpu() -> str | None:
    """The newest CPU benchmark of expert blocks."""
    result = newest("moe-cpu")
    return moe_table(result) if has_blocks(result) else None


def moe_gpu() -> str | None:
    """The newest GPU run."""
    result = newest_gpu()
    return None if result is None else moe_table(result["moe"] | {"conditions": result["conditions"]})


def replace(text: str, name: str, body: str) -> str:
    """The text with what lies between the markers of ``name`` exchanged."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{body}\n{end}", text, flags=re.S)


def _of(name: str, make):
    def body() -> str | None:
        result = newest(name)
        return None if result is None else make(result)

    return body


TABLES = {
    "demo": _of("demo", demo_table), "reproduction": _of("reproduction", reproduction_table), "moe-cpu": moe_cpu,
    "moe-gpu": moe_gpu,
}  # fmt: skip


def updated(text: str) -> str:
    """A document with its tables made anew from the newest results."""
    for name, make in TABLES.items():
        body = make() if f"<!-- begin {name} -->" in text else None
        if body is not None:
            text = replace(text, name, body)
    return text


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(updated(document.read_text()))
