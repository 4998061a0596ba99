"""The allocation program by enumeration, its constraints and its objective, for tests."""

from __future__ import annotations

import itertools
import math

import numpy as np

from gemq.algorithms import allocation

GAP = 1e-4
SOLVERS = ("highs", "cbc")


def solve(costs, budget, **options):
    """Solve with the paper's constraints unless told otherwise: the harder program."""
    return allocation.solve(costs, budget, **{"per_layer": "c2c3"} | options)


def feasible_range(costs, **options):
    """The range of :func:`solve`."""
    return allocation.feasible_range(costs, **{"per_layer": "c2c3"} | options)


def layer_options(costs, layer, per_layer, shared, units=1.0):
    """Every admissible (bits, cost) of one layer, by enumeration; bits count the shared expert ``units`` times."""
    widths = costs.candidates
    for choice in itertools.product(range(len(widths)), repeat=costs.routed.shape[1]):
        if per_layer == "c2c3" and len(widths) > 1 and not {len(widths) - 1, len(widths) - 2} <= set(choice):
            continue
        bits = sum(widths[c] for c in choice)
        cost = sum(costs.routed[layer, e, c] for e, c in enumerate(choice))
        for s in range(len(widths)) if shared else (None,):
            yield (bits, cost) if s is None else (bits + units * widths[s], cost + costs.shared[layer, s])


def best_by_bits(costs, per_layer, shared, units=1.0):
    """``{total bits: least cost}`` over all layers; a layer is enumerated, layers are combined exactly."""
    totals = {0: 0.0}
    for layer in range(costs.routed.shape[0]):
        least = {}
        for bits, cost in layer_options(costs, layer, per_layer, shared, units):
            least[bits] = min(cost, least.get(bits, math.inf))
        combined = {}
        for (b0, c0), (b1, c1) in itertools.product(totals.items(), least.items()):
            combined[b0 + b1] = min(c0 + c1, combined.get(b0 + b1, math.inf))
        totals = combined
    return totals


def total_by_hand(costs, budget, shared, accounting):
    layers, experts, _ = costs.routed.shape
    if not shared:
        return budget * experts * layers
    s = costs.shared_multiple
    set_aside = max(0, s - 1) * max(costs.candidates) if accounting == "paper" else 0
    return (budget * (experts + s) - set_aside) * layers


def check_constraints(costs, result, per_layer):
    assert result.bits.shape == costs.routed.shape[:2]
    assert result.bits.dtype == np.int64
    assert np.isin(result.bits, costs.candidates).all()
    assert result.bits_per_expert <= result.budget + 1e-9
    if per_layer == "c2c3" and len(costs.candidates) > 1:
        for width in costs.candidates[-2:]:
            assert (result.bits == width).any(axis=1).all()


def selected(costs, result):
    """The objective summed by hand."""
    value = sum(costs.routed[i][costs.candidates.index(b)] for i, b in np.ndenumerate(result.bits))
    if result.shared_multiple:
        value += sum(costs.shared[i, costs.candidates.index(b)] for i, b in enumerate(result.shared_bits))
    return value
