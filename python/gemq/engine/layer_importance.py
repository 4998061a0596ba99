"""Eq. 6 for all experts of one layer and all candidate widths, from a trace of the experts' calls.

The sums of :mod:`gemq.reference.importance`. Experts are taken in groups so that Hessians and quantized copies stay
within a share of the layer. An expert's widths are multiplied in one product, and only the tokens routed to it are
evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from gemq import distributed
from gemq.activation import PLAIN, SILU, Activation, Between, Inner
from gemq.algorithms.layer_costs import DOWN, GATE_UP, WHOLE, LayerCosts
from gemq.algorithms.layerwise import Routed, expert_hidden
from gemq.algorithms.perturbation import Perturbation
from gemq.engine.layers import Trace
from gemq.engine.source import return_memory
from gemq.engine.stored_experts import StoredStack

Pair = tuple[Tensor, Tensor]
# both projections of a layer's experts, taken by slices
Stacks = tuple[Tensor | StoredStack, Tensor | StoredStack]


def _perturbed(
    base: Pair, widths: list[int], perturbation: Perturbation, rows: Callable[[], Iterable[list[Tensor]]],
    acts: list[Inner],
) -> list[Pair | None]:
    """Per expert of a group its projections at all widths, stacked: ``[B * 2I, H]`` and ``[B, H, I]``."""
    first, second = perturbation.experts(*base, widths, rows, acts)
    return [
        (torch.cat([w[e] for w in first]), torch.stack([w[e] for w in second])) if widths else None
        for e in range(len(base[0]))
    ]


def _changes(
    x: Tensor, base: Pair, quantized: Pair | None, widths: tuple[int, ...], parts: tuple[int, ...], act: Inner,
    bias: Tensor | float = 0.0,
) -> Iterator[tuple[int, int, Tensor]]:
    """``(column, part, E(x) - E^b(x) [t, H])`` of one expert for every width, in order, and each of ``parts`` that is
    quantized alone; an expert of 0 bits gives nothing, not even its ``bias``."""
    inner = expert_hidden(base[0], x, act)
    out = inner @ base[1].T
    for column in [column for column, b in enumerate(widths) if not b]:
        yield from ((column, part, out + bias) for part in parts)
    if quantized is None:
        return
    kept = [column for column, b in enumerate(widths) if b]
    given = act((x @ quantized[0].T).unflatten(-1, (len(kept), -1))).transpose(0, 1)
    for part in parts:
        if part == GATE_UP:
            after = given @ base[1].T
        else:
            after = torch.bmm(inner.expand_as(given) if part == DOWN else given, quantized[1].transpose(1, 2))
        yield from ((column, part, out - one) for column, one in zip(kept, after, strict=True))


def _group_costs(
    sums: LayerCosts, group: range, base: Stacks, trace: Trace, candidates: tuple[int, ...],
    perturbation: Perturbation, length: int, between: Between,
) -> None:
    widths, acts, bias = [b for b in candidates if b], between.of(group), between.down_bias
    gate_up, down = (w[group.start : group.stop] for w in base)
    quantized = _perturbed(
        (gate_up, down), widths, perturbation, lambda: ([r.rows(e)[0] for e in group] for r, _ in trace), acts
    )
    for routed, gradient in trace:
        assert gradient is not None
        for at, expert in enumerate(group):
            x, token = routed.rows(expert)
            if not len(token):
                continue
            scale = routed.weight_of(expert, token)
            sums.seen(expert, scale)
            g, window = gradient[token].float() * scale, token // length
            changes = _changes(x, (gate_up[at], down[at]), quantized[at], candidates, sums.parts, acts[at],
                               0.0 if bias is None else bias[expert])
            for column, part, change in changes:
                sums.add(expert, column, part, change, g, scale, window)


def _shared_inputs(routed: Routed) -> Tensor:
    return (routed.x if routed.shared is None else routed.shared)[:]


def _shared_costs(
    sums: LayerCosts, shared: tuple[Tensor, ...], gate: nn.Module | None, trace: Trace,
    candidates: tuple[int, ...], perturbation: Perturbation, act: Inner,
) -> None:
    widths = [b for b in candidates if b]
    base = (torch.cat(shared[:-1]), shared[-1])
    (quantized,) = _perturbed(
        (base[0][None], base[1][None]), widths, perturbation, lambda: ([_shared_inputs(r)] for r, _ in trace), [act]
    )
    for routed, gradient in trace:
        assert gradient is not None
        x, g = _shared_inputs(routed), gradient[:].float() * trace.shared_share
        if routed.shared_gradient is not None:
            # at its own output, before any gate
            g = routed.shared_gradient[:].float()
        elif gate is not None:
            g = g * torch.sigmoid(gate(x))
        sums.add_shared((change for _, _, change in _changes(x, base, quantized, candidates, (WHOLE,), act)), g)


@torch.no_grad()
def layer_costs(
    base: Stacks, shared: tuple[Tensor, ...] | None, shared_gate: nn.Module | None, trace: Trace,
    candidates: tuple[int, ...], perturbation: Perturbation, length: int, budget: int, matrices: bool = False,
    between: Between = PLAIN, shared_activation: Activation = SILU,
) -> LayerCosts:
    """Eq. 6 of one layer.

    Args:
        base: the experts that are perturbed, ``[E, 2I, H]`` and ``[E, H, I]``, taken by slices. Of several processes
            each measures its share of them.
        shared: gate (if it has one), up and down of the shared expert, if there is one, and ``shared_gate`` its sigmoid
            gate.
        trace: the calls of the experts and the gradients at their output.
        candidates: widths 0..8.
        length: tokens of a window.
        budget: bytes that Hessians and quantized copies of a group of experts may take, beyond one expert's.
        matrices: measure gate and up alone and down alone, too.
        between: the routed experts' activation and biases; ``shared_activation`` is the shared one's.
    """
    sums = LayerCosts.zeros(len(base[0]), len(candidates), matrices)
    per_group, own = experts_at_once(base, budget, len(candidates)), distributed.share(len(base[0]))
    for start in range(own.start, own.stop, per_group):
        group = range(start, min(start + per_group, own.stop))
        _group_costs(sums, group, base, trace, candidates, perturbation, length, between)
        return_memory()
    if shared is not None and distributed.world().first:
        _shared_costs(sums, shared, shared_gate, trace, candidates, perturbation, shared_activation)
    sums.complete()
    sums.tokens = sum(len(routed.x) for routed, _ in trace)
    return sums


def experts_at_once(base: Stacks, budget: int, widths: int = 1) -> int:
    """Number of experts that are quantized together, from the sizes alone: the grouping must not depend on the machine.
    ``budget`` is in bytes."""
    _, rows, hidden = base[0].shape
    intermediate = base[1].shape[2]
    weights = (rows + intermediate) * hidden
    # quantized copies, and what GPTQ works with: a copy of the larger projection as it was and as it becomes, codes,
    # the result, the error; per Hessian the damped one, factors and their inverse; what fitted projections need
    working = 4 * (widths * weights + 4 * rows * hidden)
    hessians = 4 * (hidden**2 + 2 * intermediate**2 + 4 * max(hidden, intermediate) ** 2)
    return max(1, min(len(base[0]), budget // (working + hessians)))
