"""The baselines' allocations, uniform and PMQ, against their formulas."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from allocation_by_hand import (
    GAP,
)

from gemq.algorithms.baselines import pmq, uniform


@pytest.mark.parametrize(
    ("layers", "budget", "first", "widths"),
    [(4, 2, 4, (2, 2)), (4, 2.5, 2, (3, 2)), (32, 1.5, 16, (2, 1)), (5, 2.5, 2, (3, 2)), (10, 2.3, 3, (3, 2)),
     (3, 0.5, 1, (1, 0)), (2, 8, 2, (8, 8)), (1, 2.9, 0, (3, 2))],
)  # fmt: skip
def test_uniform(layers, budget, first, widths):
    result = uniform(layers, 6, budget)
    assert result.bits.tolist() == [[widths[0]] * 6] * first + [[widths[1]] * 6] * (layers - first)
    assert result.bits_per_expert <= budget
    assert math.isnan(result.objective)


@pytest.mark.parametrize("arguments", [(0, 8, 2), (4, 0, 2), (4, 8, -1), (4, 8, 8.5), (4, 8, math.nan)])
def test_uniform_refuses(arguments):
    with pytest.raises(ValueError, match="must be"):
        uniform(*arguments)


def pmq_inputs(seed, layers=3, experts=4, widths=3):
    rng = np.random.default_rng(seed)
    frequency = rng.dirichlet(np.ones(experts), layers)
    return frequency, rng.uniform(0.2, 0.6, (layers, experts)), -np.sort(-rng.uniform(0, 50, (layers, experts, widths)))


@pytest.mark.parametrize("exponents", [(1.0, 1.5, 1.0), (0.5, 1.0, 2.0)])
@pytest.mark.parametrize("budget", [1.75, 2.0, 2.3, 2.5, 2.75, 3.0])
def test_pmq_is_each_layer_by_itself(budget, exponents):
    alpha, beta, gamma = exponents
    for seed in range(4):
        frequency, weight, loss = pmq_inputs(seed)
        result = pmq(frequency, weight, loss, (1, 2, 3), budget, alpha=alpha, beta=beta, gamma=gamma)
        objective = 0.0
        for phi, w, error, bits in zip(frequency, weight, loss, result.bits, strict=True):
            significance = [p**alpha * v**beta for p, v in zip(phi, w, strict=True)]
            cost = [[s / sum(significance) * e**gamma for e in row] for s, row in zip(significance, error, strict=True)]
            least = min(
                sum(cost[e][b - 1] for e, b in enumerate(choice))
                for choice in itertools.product((1, 2, 3), repeat=4)
                if sum(choice) <= math.floor(budget * 4) and {2, 3} <= set(choice)
            )
            assert {2, 3} <= set(bits.tolist())
            assert bits.sum() <= budget * 4
            assert sum(cost[e][b - 1] for e, b in enumerate(bits)) == pytest.approx(least, rel=GAP)
            objective += least
        assert result.objective == pytest.approx(objective, rel=GAP)
        assert result.gap <= GAP


def test_pmq_with_idle_experts_and_an_idle_layer():
    frequency, weight, loss = pmq_inputs(0)
    frequency[0, 1:], weight[0, 1:] = 0.0, 0.0
    frequency[1], weight[1] = 0.0, 0.0
    result = pmq(frequency, weight, loss, (1, 2, 3), 2.0)
    assert result.bits[0, 0] == 3
    assert (result.bits.sum(axis=1) <= 8).all()


@pytest.mark.parametrize("budget", [1.7, math.nan, -1, 3.5])
def test_pmq_infeasible_budget_names_the_range(budget):
    with pytest.raises(ValueError, match=r"budget must be in 1\.75\.\.3"):
        pmq(*pmq_inputs(0), (1, 2, 3), budget)


def test_pmq_refuses_bad_inputs():
    frequency, weight, loss = pmq_inputs(0)
    with pytest.raises(ValueError, match="weight must be"):
        pmq(frequency, weight[:, :2], loss, (1, 2, 3), 2.0)
    with pytest.raises(ValueError, match="loss"):
        pmq(frequency, weight, loss[..., 0], (1, 2, 3), 2.0)
    with pytest.raises(ValueError, match="frequency must be finite"):
        pmq(np.where(frequency == frequency[0, 0], np.nan, frequency), weight, loss, (1, 2, 3), 2.0)
    with pytest.raises(ValueError, match="alpha, beta and gamma"):
        pmq(frequency, weight, loss, (1, 2, 3), 2.0, beta=-1.0)
    with pytest.raises(ValueError, match=r"routed must be \[L, E, 2\]"):
        pmq(frequency, weight, loss, (1, 2), 2.0)
