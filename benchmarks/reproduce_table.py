"""The comparison table of the method on one model: uniform, PMQ, GEMQ, GEMQ with tuned routers.

Runs ``gemq quantize`` and ``gemq eval`` for every method, budget and calibration seed, and prints the mean and the
spread over seeds::

    python benchmarks/reproduce_table.py MODEL --calibration train.txt --eval wiki=test.txt --eval c4=docs.jsonl \\
        --bits 2,1.5 --seeds 0,1,2 --samples 32 --length 256 --json out.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

METHODS = {
    "uniform": ["--method", "uniform", "--no-tune-routers"],
    "PMQ": ["--method", "pmq", "--no-tune-routers"],
    "GEMQ": ["--no-tune-routers"],
    "GEMQ + routers": [],
}


def gemq(*arguments: str) -> str:
    """Run the command line in a process of its own; its standard output."""
    command = [sys.executable, "-c", "from gemq.cli import main; main()", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def evaluate(model: str, texts: dict[str, str], options: argparse.Namespace) -> dict[str, float]:
    """Perplexity by text."""
    result = {}
    for name, source in texts.items():
        limit = [] if options.limit is None else ["--limit", str(options.limit)]
        printed = gemq(
            "eval", model, "--data", source, "--length", str(options.length), "--batch-size", "16", "--dtype",
            "float32", "--json", *limit,
        )
        result[name] = json.loads(printed)["perplexity"]
    return result


def run(options: argparse.Namespace) -> list[dict]:
    """Measure all rows: one per method, budget and seed, and one for the full-precision model."""
    texts = dict(item.split("=", 1) for item in options.eval)
    rows = [{"method": "FP", "bits": None, "seed": None, **evaluate(options.model, texts, options)}]
    print(rows[-1], flush=True)
    extra = options.extra.split() if options.extra else []
    for seed in options.seeds.split(","):
        for method, arguments in METHODS.items():
            for bits in options.bits.split(","):
                with tempfile.TemporaryDirectory() as folder:
                    target = str(Path(folder) / "out")
                    start = time.perf_counter()
                    gemq(
                        "quantize", options.model, "-o", target, "--bits", bits, "--calibration", options.calibration,
                        "--samples", str(options.samples), "--length", str(options.length), "--seed", seed,
                        *arguments, *extra,
                    )
                    seconds = time.perf_counter() - start
                    scores = evaluate(target, texts, options)
                rows.append({"method": method, "bits": float(bits), "seed": int(seed), "seconds": seconds, **scores})
                print(rows[-1], flush=True)
    return rows


def table(rows: list[dict], texts: list[str]) -> str:
    """Markdown: mean and half the range over seeds."""
    lines = ["| bits | method | " + " | ".join(texts) + " |", "|---|---|" + "---|" * len(texts)]
    cells = " | ".join(f"{rows[0][t]:.1f}" for t in texts)
    lines.append(f"| 16 | FP | {cells} |")
    keys = list(dict.fromkeys((r["bits"], r["method"]) for r in rows[1:]))
    for bits, method in sorted(keys, key=lambda key: (-key[0], list(METHODS).index(key[1]))):
        group = [r for r in rows[1:] if (r["bits"], r["method"]) == (bits, method)]
        cells = []
        for text in texts:
            values = [r[text] for r in group]
            cells.append(f"{sum(values) / len(values):.1f} ± {(max(values) - min(values)) / 2:.1f}")
        lines.append(f"| {bits:g} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse, run, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--eval", action="append", required=True, help="NAME=SOURCE, repeatable")
    parser.add_argument("--bits", default="2,1.5")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--limit", type=int, help="windows per text")
    parser.add_argument("--extra", help="further options of gemq quantize")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = run(options)
    texts = [item.split("=", 1)[0] for item in options.eval]
    print(table(rows, texts))
    if options.json:
        options.json.write_text(json.dumps({"options": vars(options) | {"json": None}, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
