"""Drop the widths that no optimum of Eq. 7 can contain, before the solver runs.

Replace the budget by a price on every bit. Layers are then independent, and each takes its widths of least cost plus
price. The sum of these, less the price of the budget, is a lower bound on the optimum (the Lagrangian dual). At the
best price, these widths are an allocation within the budget once the bits that are left are spent; its cost is an upper
bound. If choosing a width would raise the lower bound above the upper bound, no optimum contains that width, and it is
dropped. The reduced program has the same optimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

# bounds are compared with a margin for the rounding of sums over all experts
_MARGIN = 1e-9
_PRICES = 64


@dataclass(frozen=True)
class Reduction:
    """``keep`` ``[rows, B]`` widths that may be in an optimum, ``chosen`` ``[rows]`` an allocation, ``objective`` its
    sum, and ``bound``, which no allocation is below."""

    keep: np.ndarray
    chosen: np.ndarray
    objective: float
    bound: float


@dataclass(frozen=True)
class _Priced:
    """Widths of least cost plus price that meet the per-layer constraints. ``penalty`` ``[rows]`` is the cost of the
    constraints in the layer of each row, ``locked`` ``[rows]`` is True where they decide the width."""

    chosen: np.ndarray
    locked: np.ndarray
    penalty: np.ndarray
    excess: np.ndarray  # [rows, B] priced cost above the row's least
    value: float


def _forced(excess: np.ndarray, kept: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Choose in each layer the cheapest experts for the widths that it must hold. ``excess`` ``[L, E, B]`` is the cost
    above each expert's least.

    Returns their indices ``[L, len(kept)]`` and what they cost ``[L]``.
    """
    rows = np.arange(len(excess))
    columns = [excess[:, :, -back] for back in kept]
    first = [np.argsort(column, axis=1, kind="stable")[:, :2] for column in columns]
    if len(kept) == 1:
        best = first[0][:, :1]
        return best, columns[0][rows, best[:, 0]]
    picks, costs = [], []
    for i in range(2):
        for j in range(2):
            a, b = first[0][:, i], first[1][:, j]
            picks.append(np.stack([a, b], axis=1))
            costs.append(np.where(a == b, np.inf, columns[0][rows, a] + columns[1][rows, b]))
    least = np.argmin(costs, axis=0)
    return np.stack(picks)[least, rows], np.stack(costs)[least, rows]


def _price(
    costs: np.ndarray, sizes: np.ndarray, shape: tuple[int, int], kept: tuple[int, ...], price: float
) -> _Priced:
    priced = costs + price * sizes
    chosen = priced.argmin(axis=1)
    excess = priced - priced.min(axis=1, keepdims=True)
    locked, penalty = np.zeros(len(costs), dtype=bool), np.zeros(len(costs))
    value = float(priced.min(axis=1).sum())
    if kept:
        layers, experts = shape
        routed = layers * experts
        picks, extra = _forced(excess[:routed].reshape(layers, experts, -1), kept)
        for column, back in zip(picks.T, kept, strict=True):
            rows = np.arange(layers) * experts + column
            chosen[rows], locked[rows] = sizes.shape[1] - back, True
        penalty[:routed] = np.repeat(extra, experts)
        value += float(extra.sum())
    return _Priced(chosen, locked, penalty, excess, value)


def _bits(sizes: np.ndarray, chosen: np.ndarray) -> float:
    return float(np.take_along_axis(sizes, chosen[:, None], axis=1).sum())


def _filled(costs: np.ndarray, sizes: np.ndarray, found: _Priced, total: float) -> np.ndarray:
    """Spend the bits that ``found`` leaves where a bit saves most. Each expert is widened at most once."""
    chosen = found.chosen.copy()
    left = total - _bits(sizes, chosen) + _MARGIN
    rows = np.arange(len(costs))
    saved = costs[rows, chosen][:, None] - costs
    more = sizes - sizes[rows, chosen][:, None]
    wider = (more > 0) & (saved > 0) & ~found.locked[:, None]
    ratio = np.divide(saved, more, out=np.zeros_like(saved), where=wider)
    best = ratio.argmax(axis=1)
    order = np.argsort(-ratio[rows, best], kind="stable")
    for row in order[: np.count_nonzero(ratio[rows, best])].tolist():
        need = more[row, best[row]]
        if need <= left:
            chosen[row] = best[row]
            left -= need
    return chosen


def reduce(
    costs: np.ndarray, sizes: np.ndarray, shape: tuple[int, int], total: float, kept: tuple[int, ...]
) -> Reduction:
    """Bounds of the program with ``costs`` and ``sizes`` ``[rows, B]`` of ascending widths: the first ``shape`` layers
    x experts rows are routed ones, and each layer holds one of them at each of the widths ``kept``, counted from the
    highest down; the sizes together are at most ``total``, which must be feasible."""

    def at(price: float) -> _Priced:
        return _price(costs, sizes, shape, kept, price)

    def over(found: _Priced) -> bool:
        return _bits(sizes, found.chosen) > total + _MARGIN

    price, best = 0.0, at(0.0)
    bound, feasible = best.value, best
    at_best = (price, best)
    if over(best):
        # the least price at which the budget is kept lies between these; prices span many decades
        high = 2 * float(costs.max())
        low, feasible = high * 1e-18, at(high)
        for _ in range(_PRICES):
            middle = math.sqrt(low * high)
            found = at(middle)
            value = found.value - middle * total
            if value > bound:
                bound, at_best = value, (middle, found)
            if over(found):
                low = middle
            else:
                high, feasible = middle, found
    chosen = _filled(costs, sizes, feasible, total)
    objective = float(np.take_along_axis(costs, chosen[:, None], axis=1).sum())
    price, best = at_best
    margin = _MARGIN * (objective + price * total)
    lifted = bound + np.maximum(0.0, best.excess - best.penalty[:, None])
    keep = lifted <= objective + margin
    np.put_along_axis(keep, chosen[:, None], True, axis=1)
    return Reduction(keep, chosen, objective, max(0.0, min(bound - margin, objective)))
