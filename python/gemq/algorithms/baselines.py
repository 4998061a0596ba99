"""Allocations to compare with: one width for all, PMQ's program for each layer, and PMQ's over all layers at once."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np

from gemq.algorithms.allocation import BUDGET_SLACK, Allocation, feasible_range, joined, solve
from gemq.algorithms.costs import Costs
from gemq.format import MAX_BITS


def uniform(num_layers: int, num_experts: int, budget: float) -> Allocation:
    """Every expert of a layer at the same width, ``budget`` bits per expert on average.

    The first ``floor(fraction * num_layers)`` layers take ``ceil(budget)`` bits and the rest ``floor(budget)``,
    with ``fraction = budget - floor(budget)``. So 2.5 is the paper's baseline, the first half of the layers at 3
    bits and the second half at 2; of an odd number of layers the smaller half comes first, and the mean never
    exceeds the budget. No program is solved: ``objective`` and ``gap`` are NaN.

    Raises ``ValueError`` unless both counts are >= 1 and the budget is in 0..8.
    """
    if num_layers < 1 or num_experts < 1:
        raise ValueError(f"num_layers and num_experts must be >= 1, got {num_layers} and {num_experts}")
    if not 0 <= budget <= MAX_BITS:
        raise ValueError(f"budget must be in 0..{MAX_BITS} bits per expert, got {budget}")
    low = math.floor(budget)
    bits = np.full((num_layers, num_experts), low, dtype=np.int64)
    bits[: math.floor((budget - low) * num_layers + BUDGET_SLACK)] += 1
    return Allocation(bits, None, float(budget), objective=math.nan, gap=math.nan, seconds=0.0, solver="uniform")


def _pmq_costs(frequency: np.ndarray, weight: np.ndarray, loss: np.ndarray, exponents: Sequence[float]) -> np.ndarray:
    """The ``[L, E, B]`` coefficients of :func:`pmq`."""
    given = {"frequency": frequency, "weight": weight, "loss": loss}
    arrays = {name: np.asarray(value, dtype=np.float64) for name, value in given.items()}
    for name, array in arrays.items():
        shape = arrays["loss"].shape[:2] if name != "loss" else array.shape
        if array.shape != shape or arrays["loss"].ndim != 3:
            raise ValueError(f"{name} must be [L, E], and loss [L, E, B], got {[a.shape for a in arrays.values()]}")
        if not (np.isfinite(array) & (array >= 0)).all():
            raise ValueError(f"{name} must be finite and >= 0")
    if not all(0 <= e < math.inf for e in exponents):
        raise ValueError(f"alpha, beta and gamma must be finite and >= 0, got {exponents}")
    alpha, beta, gamma = exponents
    significance = arrays["frequency"] ** alpha * arrays["weight"] ** beta
    total = significance.sum(axis=1, keepdims=True)
    normalised = np.divide(significance, total, out=np.zeros_like(significance), where=total > 0)
    return normalised[..., None] * arrays["loss"] ** gamma


def pmq(
    frequency: np.ndarray,
    weight: np.ndarray,
    loss: np.ndarray,
    candidates: Sequence[int],
    budget: float,
    *,
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 1.0,
    solver: str = "auto",
) -> Allocation:
    """PMQ, pre-loading mixed-precision quantization: each layer divides the same budget among its experts.

    From "Mixture Compressor for Mixture-of-Experts LLMs Gains More" (MC-MoE, ICLR 2025, arXiv 2410.06270). The
    coefficient of expert ``i`` of a layer at ``b`` bits is::

        frequency[i]**alpha * weight[i]**beta / sum over the layer's experts of the same  *  loss[i, b]**gamma

    and each layer minimises their sum within ``floor(budget * E)`` bits, with at least one expert at the highest
    and one at the second highest candidate. The normalisation does not change a layer's allocation; it makes the
    layers' sums, of which ``objective`` is the total, comparable.

    ``frequency`` ``[L, E]`` is the share of calibration tokens routed to the expert, ``weight`` ``[L, E]`` its mean
    routing weight, and ``loss`` ``[L, E, B]`` the Frobenius norm of the error in the block's output when only that
    expert has that width. A layer whose experts saw no token has coefficients 0.

    Raises ``ValueError`` for wrong shapes, values that are not finite and >= 0, or a budget that is infeasible.
    """
    start = time.monotonic()
    coefficients = _pmq_costs(frequency, weight, loss, (alpha, beta, gamma))
    num_layers, num_experts, _ = coefficients.shape
    layers = [Costs(tuple(candidates), coefficients[i : i + 1], (i,)) for i in range(num_layers)]
    low, high = feasible_range(layers[0], per_layer="c2c3")
    if not low - BUDGET_SLACK <= budget <= high:
        raise ValueError(f"budget must be in {low:.6g}..{high:.6g} bits per expert for these candidates, got {budget}")
    per_layer = math.floor(budget * num_experts + BUDGET_SLACK) / num_experts
    parts = [solve(layer, per_layer, per_layer="c2c3", solver=solver) for layer in layers]
    return joined(parts, budget, time.monotonic() - start)


def global_pmq(
    frequency: np.ndarray,
    weight: np.ndarray,
    loss: np.ndarray,
    candidates: Sequence[int],
    budget: float,
    *,
    per_layer: str = "none",
    alpha: float = 1.0,
    beta: float = 1.5,
    gamma: float = 1.0,
    solver: str = "auto",
) -> Allocation:
    """PMQ's coefficients, as they are, in one program over all layers: the naive way to make it global.

    The coefficients are those of :func:`pmq`; ``per_layer`` as in :func:`gemq.algorithms.allocation.solve`. An error of
    a block's output counts the same in whichever layer it is, though the loss may feel it more or less, so nothing says
    that the sums of two layers may be traded against each other.

    Raises ``ValueError`` as :func:`pmq` does.
    """
    coefficients = _pmq_costs(frequency, weight, loss, (alpha, beta, gamma))
    costs = Costs(tuple(candidates), coefficients, tuple(range(len(coefficients))))
    return solve(costs, budget, per_layer=per_layer, solver=solver)
