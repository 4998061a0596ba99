"""Write the README's tables and picture from the JSON of measured results.

``python docs/update_tables.py`` after ``make demo`` or ``benchmarks/reproduce_table.py``; the newest file of each kind
in ``benchmarks/results`` is used. Nothing in those tables is typed by hand.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def newest(prefix: str) -> dict | None:
    """The last result file of a kind, by the date in its name."""
    files = sorted(RESULTS.glob(f"{prefix}-*.json"))
    return json.loads(files[-1].read_text()) if files else None


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


def replace(text: str, name: str, body: str) -> str:
    """The text with what lies between the markers of ``name`` exchanged."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    return re.sub(re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{body}\n{end}", text, flags=re.S)


def updated(text: str) -> str:
    """The README with its tables made anew from the newest results."""
    for name, make in (("demo", demo_table), ("reproduction", reproduction_table)):
        result = newest(name)
        if result is not None:
            text = replace(text, name, make(result))
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(updated(readme.read_text()))
