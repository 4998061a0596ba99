"""Preview a quantization from a model's configuration alone: widths and sizes, nothing written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from gemq.algorithms.method import allocate
from gemq.algorithms.saved_costs import saved_statistics
from gemq.algorithms.tensor_bits import resolve
from gemq.ambient import plain_torch
from gemq.checkpoint import check_output
from gemq.format import UNQUANTIZED, codes_bytes, default_group_size, expert_layout
from gemq.model_config import skeleton
from gemq.models import MoeModel, describe
from gemq.models.ends import end_widths, ends_of
from gemq.nn.experts import PROJECTIONS
from gemq.packed_model import kept_in_float32
from gemq.pipeline import QuantizeConfig, check_model, load_costs, target_of
from gemq.planning import check_budgets
from gemq.widths import Widths


@dataclass(frozen=True)
class TensorPlan:
    """One tensor: its shape, bytes in 16 bits, and its width and bytes after.

    ``bits`` is a mean for the stacked experts of a layer, whose widths are in ``widths`` if they are known: without
    costs the program cannot be solved, and each layer stands for the budget.
    """

    name: str
    shape: tuple[int, ...]
    before: int
    bits: float
    after: int
    widths: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Preview:
    """All tensors at one budget. ``exact`` says whether the experts' widths are those that would be chosen."""

    budget: float
    tensors: list[TensorPlan]
    exact: bool

    @property
    def before(self) -> int:
        """Bytes of all tensors in 16 bits."""
        return sum(t.before for t in self.tensors)

    @property
    def after(self) -> int:
        """Bytes of all tensors of the checkpoint."""
        return sum(t.after for t in self.tensors)


@plain_torch()
def preview(config: QuantizeConfig) -> list[Preview]:
    """Predict the result of :func:`gemq.quantize` with ``config``, per budget from the highest; reads no weights or
    text.

    Checks what can be checked so: output folder, family, budgets, patterns, costs. With costs (``config.costs``) or
    uniform widths the result is exact, up to what later budgets of a progression would measure anew. Raises what
    :func:`gemq.quantize` raises.
    """
    for budget in config.method.budgets:
        check_output(target_of(config, budget), config.model, config.overwrite)
    declared = check_model(config.model, config.trust_remote_code)
    moe = describe(skeleton(declared, config.trust_remote_code))
    check_budgets(moe, config.method)
    return [_at(config, moe, budget) for budget in sorted(config.method.budgets, reverse=True)]


GATE_UP, DOWN = PROJECTIONS
# by projection, decoder layer and expert
Routed = Mapping[str, Mapping[int, Sequence[float]]]


def _experts(config: QuantizeConfig, moe: MoeModel, budget: float) -> tuple[Routed, dict[int, int]]:
    """Widths of routed experts, and of shared ones by decoder layer; fractions where they are not known."""
    method, indices = config.method, [layer.index for layer in moe.moe]
    shared = dict.fromkeys(indices, method.shared_bits or max(method.candidates))
    if config.costs is None and method.measures:
        return {name: {index: [budget] * moe.num_experts for index in indices} for name in PROJECTIONS}, shared
    statistics = None if config.costs is None else saved_statistics(load_costs(config.costs), moe, method)
    found = allocate(moe, statistics, budget, method)
    if found.shared_bits is not None:
        shared = {index: int(b) for index, b in zip(indices, found.shared_bits, strict=True)}
    routed = {
        name: dict(zip(indices, bits.tolist(), strict=True))
        for name, bits in zip(PROJECTIONS, found.widths, strict=True)
    }
    return routed, shared


def _at(config: QuantizeConfig, moe: MoeModel, budget: float) -> Preview:
    method, (experts, linears) = config.method, resolve(moe, config.method.tensor_bits)
    routed, shared = _experts(config, moe, budget)
    shared = shared if moe.shared_multiple else {}
    # fractions pass through as whole widths do
    gate_up, down = (cast(dict[int, list[int]], routed[name]) for name in (GATE_UP, DOWN))
    head, embedding = end_widths(moe.model, method.head_bits, method.embedding_bits)
    given = Widths(gate_up, shared, method.attention_bits, method.dense_bits, down=down, head=head, embedding=embedding)
    given = given.overridden(experts, linears)
    routed = {GATE_UP: given.experts, DOWN: given.down or given.experts}
    stacks: dict[int, Sequence[float]] = {}
    for layer in moe.moe:
        for name in PROJECTIONS:
            stacks[id(getattr(layer.experts, name))] = routed[name][layer.index]
    widths = {id(linear.weight): bits for linear, bits in moe.quantized_linears(given).values()}
    ends = ends_of(moe.model)
    widths |= {id(ends.head.weight): head, id(ends.embedding.weight): embedding}
    group = config.method.gptq.group_size
    tensors = [_tensor(name, p, group, stacks.get(id(p)), widths.get(id(p), UNQUANTIZED))
               for name, p in moe.model.named_parameters()]
    tensors += [TensorPlan(name, tuple(t.shape), 4 * t.numel(), 32, 4 * t.numel())
                for name, t in _float32_buffers(moe.model).items()]
    exact = all(float(b).is_integer() for rows in routed.values() for row in rows.values() for b in row) and (
        config.costs is not None or not config.method.measures)
    return Preview(budget, tensors, exact)


def _float32_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Correction biases, which stay as they are before and after."""
    buffers = dict(model.named_buffers())
    return {name: buffers[name] for name in sorted(kept_in_float32(model)) if name in buffers}


def _tensor(name: str, parameter: nn.Parameter, group: int, stack: Sequence[float] | None, width: int) -> TensorPlan:
    shape, before = tuple(parameter.shape), 2 * parameter.numel()
    if stack is None:
        if width == UNQUANTIZED:
            return TensorPlan(name, shape, before, UNQUANTIZED, before)
        n, k = shape
        after = codes_bytes(n, k, width) + 4 * n * (k // default_group_size(k, group))
        return TensorPlan(name, shape, before, width, after)
    n, k = shape[1:]
    size = default_group_size(k, group)
    known = all(float(b).is_integer() for b in stack)
    after = _stack_bytes(stack, n, k, size)
    widths = tuple(int(b) for b in stack) if known else None
    return TensorPlan(name, shape, before, sum(stack) / len(stack), after, widths)


def _stack_bytes(widths: Sequence[float], n: int, k: int, group: int) -> int:
    """Bytes of a stack; one of a mean width is taken between the two whole widths around it."""
    floor = [math.floor(b) for b in widths]
    share = sum(widths) - sum(floor)
    low, high = (_whole_bytes(w, n, k, group) for w in (floor, [math.ceil(b) for b in widths]))
    several = sum(math.ceil(b) for b in widths) - sum(floor)
    return low if not several else round(low + (high - low) * share / several)


def _whole_bytes(widths: list[int], n: int, k: int, group: int) -> int:
    plan = expert_layout(widths, n, k, group, "canonical")
    return plan.code_bytes + 2 * plan.meta_elements
