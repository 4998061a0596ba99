"""Widths that a budget yields, before it is known which expert gets which."""

from __future__ import annotations

import math

import numpy as np

from gemq.algorithms.allocation import BUDGET_SLACK, PER_LAYER, feasible_range, total_bits
from gemq.algorithms.costs import Costs
from gemq.algorithms.method import ROUTED_ONLY, MethodConfig, allocate, overridden, routed_budget
from gemq.algorithms.tensor_bits import resolve
from gemq.models import MoeModel
from gemq.models.ends import end_widths
from gemq.packed_config import PackedConfig
from gemq.widths import Widths


def _empty_costs(moe: MoeModel, method: MethodConfig) -> Costs:
    layers = [layer.index for layer in moe.moe]
    routed = np.zeros((len(layers), moe.num_experts, len(method.candidates)))
    if method.method in ROUTED_ONLY or not moe.shared_multiple:
        return Costs(method.candidates, routed, tuple(layers))
    shared = np.zeros((len(layers), len(method.candidates)))
    return Costs(method.candidates, routed, tuple(layers), shared, moe.shared_multiple)


def budget_range(moe: MoeModel, method: MethodConfig) -> tuple[float, float]:
    """The ``(lowest, highest)`` budget in bits per expert that ``method`` can meet for a model."""
    if not method.measures:
        return 0.0, 8.0
    costs = _empty_costs(moe, method)
    if method.method in ROUTED_ONLY:
        kept = "c2c3" if method.method == "pmq" else method.per_layer
        low, high = feasible_range(costs, per_layer=kept)
        # the budget at which routed experts get these
        set_aside = routed_budget(moe, 0.0, method)
        per_bit = routed_budget(moe, 1.0, method) - set_aside
        return (low - set_aside) / per_bit, (high - set_aside) / per_bit
    fixed = method.shared_bits if costs.shared_multiple else None
    return feasible_range(
        costs, per_layer=method.per_layer, fixed_shared_bits=fixed, accounting=method.accounting
    )


def check_budgets(moe: MoeModel, method: MethodConfig) -> None:
    """Refuse a budget that no allocation meets, before the long measuring; ``ValueError`` names the range.

    A given allocation is fitted to the model instead.
    """
    if method.given is not None:
        allocate(moe, None, method.budgets[0], method)
    low, high = budget_range(moe, method)
    for budget in method.budgets:
        if not low - BUDGET_SLACK <= budget <= high + BUDGET_SLACK:
            raise ValueError(f"the budget must be in {low:.6g}..{high:.6g} bits per expert for this model and these "
                             f"candidates, got {budget:g}")


def _spread(total: int, count: int, candidates: tuple[int, ...]) -> list[int]:
    """``count`` widths that sum to ``total`` (at most the highest), of two neighbouring candidates but for one."""
    low = max((c for c in candidates if c * count <= total), default=candidates[0])
    high = min((c for c in candidates if c > low), default=low)
    raised, rest = divmod(total - low * count, high - low) if high > low else (0, 0)
    found = [high] * min(raised, count) + [low] * max(0, count - raised)
    if rest and raised < count:
        found[raised] += rest
    return found


def _bounds(moe: MoeModel, method: MethodConfig, per_layer: str) -> tuple[int, int]:
    """The fewest and the most bits that the routed experts of a layer take together."""
    kept = PER_LAYER[per_layer] if len(method.candidates) > 1 else ()
    narrowest, widest = method.candidates[0], method.candidates[-1]
    least = moe.num_experts * narrowest + sum(method.candidates[-back] - narrowest for back in kept)
    return least, moe.num_experts * widest - sum(widest - method.candidates[-back] for back in kept)


def _program_bits(moe: MoeModel, method: MethodConfig, budget: float, shared: int) -> tuple[int, int]:
    """``(bits of all routed experts together, width of the shared ones)`` that Eq. 7 comes to."""
    costs, layers = _empty_costs(moe, method), len(moe.moe)
    least, most = _bounds(moe, method, method.per_layer)
    variable = bool(costs.shared_multiple) and method.shared_bits is None
    if method.method in ROUTED_ONLY:
        budget = routed_budget(moe, budget, method)
    total = total_bits(budget, costs, count_shared=variable, accounting=method.accounting)
    if variable:
        units = layers * (moe.shared_multiple if method.accounting == "exact" else 1)
        fitting = [b for b in method.candidates if total - b * units >= least * layers]
        shared = max(fitting, default=method.candidates[0])
        total -= shared * units
    return min(math.floor(total + BUDGET_SLACK), most * layers), shared


def planned_widths(moe: MoeModel, method: MethodConfig, budget: float) -> PackedConfig:
    """Widths with the sums that an allocation of ``budget`` bits per expert will have.

    Which expert gets which is not known before measuring, and no byte depends on it, unless 0 is a candidate: then
    the sizes are those with as few experts of 0 bits as possible, an upper bound. Where the program chooses the
    shared experts' width, they are counted at the widest candidate that leaves the routed ones their narrowest: what
    the published allocations chose, and an estimate.
    """
    check_budgets(moe, method)
    if not method.measures:
        _, widths = overridden(moe, allocate(moe, None, budget, method), method)
        return PackedConfig(widths, method.gptq.group_size)
    layers, widest = [layer.index for layer in moe.moe], max(method.candidates)
    count = moe.num_experts
    shared = widest if method.shared_bits is None else method.shared_bits
    if method.method == "pmq":
        _, most = _bounds(moe, method, "c2c3")
        each = min(int(routed_budget(moe, budget, method) * count + BUDGET_SLACK), most)
        rows = [_spread(each, count, method.candidates)] * len(layers)
    else:
        total, shared = _program_bits(moe, method, budget, shared)
        # dealt out like cards, so that layers are alike
        flat = _spread(total, count * len(layers), method.candidates)
        rows = [flat[i :: len(layers)] for i in range(len(layers))]
    head, embedding = end_widths(moe.model, method.head_bits, method.embedding_bits)
    widths = Widths(
        dict(zip(layers, rows, strict=True)), dict.fromkeys(layers, shared) if moe.shared_multiple else {},
        method.attention_bits, method.dense_bits, method.router_bits, head=head, embedding=embedding,
    )
    return PackedConfig(widths.overridden(*resolve(moe, method.tensor_bits)), method.gptq.group_size)
