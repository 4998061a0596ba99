"""Layer first, then expert: the budget is divided over the layers, and each layer divides its share.

The hierarchical alternative to one program over all experts. A layer is first seen as a whole: its curve is what it
costs when all of its experts have one width, ``f_l(b) = sum_i c[l, i, b]``, linear in between. The layers' shares
``t_l`` (whole bits) minimise ``sum_l f_l(t_l / E)`` within the budget; then Eq. 7 is solved in each layer for its
share. The first step cannot see that a layer's few important experts make its first extra bits worth more than the
last ones, which is what one program over all experts does see.
"""

from __future__ import annotations

import time

import numpy as np

from gemq.algorithms.allocation import Allocation, feasible_range, joined, solve, total_bits
from gemq.algorithms.costs import Costs


def layer_shares(curves: np.ndarray, total: int, lowest: int, highest: int) -> list[int]:
    """Whole bits per layer, summing to at most ``total``, that minimise the curves' sum.

    ``curves`` ``[L, highest - lowest + 1]`` holds the cost of each layer at ``lowest``, ..., ``highest`` bits. Exact
    for any curves (dynamic programming, O(L * total * width)); of equal sums the one that gives earlier layers less.
    """
    num_layers, width = curves.shape
    if width != highest - lowest + 1 or not lowest * num_layers <= total:
        raise ValueError(f"curves must cover {lowest}..{highest} bits and total be >= {lowest * num_layers}, "
                         f"got {curves.shape} and {total}")
    spare = min(total - lowest * num_layers, (width - 1) * num_layers)
    # best[s]: least cost of the layers so far with at most s bits above their lowest
    best = np.zeros(spare + 1)
    picks = np.zeros((num_layers, spare + 1), dtype=np.int64)
    for layer in range(num_layers):
        following = np.full(spare + 1, np.inf)
        for extra in range(min(width - 1, spare) + 1):
            value = best[: spare + 1 - extra] + curves[layer, extra]
            better = value < following[extra:]
            following[extra:][better] = value[better]
            picks[layer, extra:][better] = extra
        best = following
    shares, left = [], spare
    for layer in reversed(range(num_layers)):
        extra = int(picks[layer, left])
        shares.append(lowest + extra)
        left -= extra
    return shares[::-1]


def _curves(costs: Costs, lowest: int, highest: int) -> np.ndarray:
    """Cost of each layer at every whole number of bits: its experts at one width, linear between the candidates."""
    uniform = costs.routed.sum(axis=1)  # [L, B]
    at = np.arange(lowest, highest + 1) / costs.routed.shape[1]
    return np.stack([np.interp(at, costs.candidates, row) for row in uniform])


def two_step(costs: Costs, budget: float, *, per_layer: str = "none", solver: str = "auto") -> Allocation:
    """Divide ``budget`` bits per expert over the layers, then each layer's share over its experts.

    ``costs`` and ``per_layer`` are those of :func:`gemq.algorithms.allocation.solve`. Shared experts have no place in
    a layer's curve: their width is not chosen, and ``budget`` is that of the routed experts, as in PMQ.

    Raises ``ValueError`` for a budget outside :func:`gemq.algorithms.allocation.feasible_range`.
    """
    start = time.monotonic()
    routed = Costs(costs.candidates, costs.routed, costs.layers)
    low, high = feasible_range(routed, per_layer=per_layer)
    num_layers, num_experts, _ = routed.routed.shape
    total = int(total_bits(budget, routed)) if 0 <= budget <= high + 1e-9 else -1
    lowest, highest = round(low * num_experts), routed.candidates[-1] * num_experts
    if total < lowest * num_layers:
        raise ValueError(f"budget must be in {low:.6g}..{high:.6g} bits per expert for these costs, got {budget}")
    shares = layer_shares(_curves(routed, lowest, highest), total, lowest, highest)
    parts = [
        solve(Costs(routed.candidates, routed.routed[row : row + 1], (row,)), share / num_experts, per_layer=per_layer,
              solver=solver)
        for row, share in enumerate(shares)
    ]
    return joined(parts, budget, time.monotonic() - start)
