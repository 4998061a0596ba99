"""Seconds to solve Eq. 7 for a model of Qwen3-30B-A3B's shape, and for a curve of 20 budgets.

    python benchmarks/allocation_speed.py --json benchmarks/results/allocation-<date>.json

48 layers of 128 experts at 1, 2 or 3 bits are 18,432 binary variables, twice as many if gate and up have one width
and down has another. The coefficients are random: log-normal between layers and between experts of a layer, falling by
e^1.4 a bit, times 0.5 to 2; those of single matrices share an expert's at random.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from record import conditions

from gemq.algorithms.allocation import curve, solve
from gemq.algorithms.costs import Costs


def random_costs(layers: int, experts: int, seed: int, spread: float) -> Costs:
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, spread, (layers, experts, 1)) + rng.normal(0, spread, (layers, 1, 1)))
    widths = np.array([1, 2, 3])
    routed = size * np.exp(-1.4 * widths) * rng.uniform(0.5, 2, (layers, experts, 3))
    share = rng.uniform(0.3, 0.8, (layers, experts, 1))
    matrices = np.stack([share, 1 - share], axis=2) * routed[:, :, None]
    return Costs((1, 2, 3), routed, tuple(range(layers)), matrices=matrices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--experts", type=int, default=128)
    options = parser.parse_args()
    rows = []
    for spread in (0.5, 1.5, 3.0):
        costs = random_costs(options.layers, options.experts, 0, spread)
        for granularity, solver in (("expert", "highs"), ("expert", "cbc"), ("matrix", "highs"), ("matrix", "cbc")):
            how = {"solver": solver, "granularity": granularity}
            for budget in (1.5, 2.0, 2.5):
                wall, cpu = time.perf_counter(), time.process_time()
                found = solve(costs, budget, **how)
                rows.append({"what": "solve", **how, "spread": spread, "budget": budget, "gap": found.gap,
                             "seconds": time.perf_counter() - wall, "cpu seconds": time.process_time() - cpu})
                print(rows[-1])
            wall, cpu = time.perf_counter(), time.process_time()
            found = curve(costs, 20, **how)
            rows.append({"what": "curve of 20", **how, "spread": spread, "gap": max(a.gap for a in found),
                         "seconds": time.perf_counter() - wall, "cpu seconds": time.process_time() - cpu})
            print(rows[-1])
    if options.json:
        load = f"{os.getloadavg()[0]:.2f}"
        result = {"conditions": conditions("python benchmarks/allocation_speed.py") | {"load": load}, "rows": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
