"""Costs from the Fisher information of the weights, the usual alternative to Eq. 6's gradients of the outputs.

``c[l, i, b] = sum over windows n, weights w of (dL_n / dw)^2 * (w - w_b)^2`` for the weights ``w`` of expert ``i`` of
MoE layer ``l`` and their values ``w_b`` at ``b`` bits: the diagonal of the empirical Fisher matrix stands for the
Hessian of the loss (Optimal Brain Damage, LeCun et al., 1989; as in SqueezeLLM, arXiv 2306.07629). ``L_n`` is the
token-mean cross-entropy of window ``n``, as in :mod:`gemq.algorithms.importance`, so both costs are in the same unit. A
squared gradient of a window's mean loss is not the mean of its tokens' squared gradients; per-token gradients of
weights would cost a backward pass a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gemq.algorithms.costs import Costs
from gemq.algorithms.layerwise import Routed, watch_experts
from gemq.algorithms.perplexity import token_losses
from gemq.algorithms.perturbation import Perturbation
from gemq.models import MoeLayer, MoeModel
from gemq.nn.experts import PROJECTIONS

Progress = Callable[[int, int], None]


def _weights(layer: MoeLayer) -> list[Tensor]:
    """The parameters whose gradients are needed: both expert stacks, and a shared expert's three matrices."""
    experts: Any = layer.experts
    shared = [linear.weight for linear in layer.shared_linears().values()]
    return [*layer.form.weights(experts), *shared]


@contextmanager
def _only_trainable(moe: MoeModel, weights: list[Tensor]) -> Iterator[None]:
    """Enable gradients for ``weights`` alone, in evaluation mode. The previous state is restored on exit."""
    was_training, required = moe.model.training, {p: p.requires_grad for p in moe.model.parameters()}
    chosen = {id(p) for p in weights}
    for p in required:
        p.requires_grad_(id(p) in chosen)
    moe.model.eval()
    try:
        yield
    finally:
        for p, value in required.items():
            p.requires_grad_(value)
        moe.model.train(was_training)


@dataclass
class _Inputs:
    """Inputs of a layer's experts, and those ``[T, H]`` of its shared expert, which may be others; an entry a call."""

    routed: list[Routed] = field(default_factory=list)
    shared: list[Tensor] = field(default_factory=list)


@contextmanager
def _watching(layer: MoeLayer, inputs: _Inputs) -> Iterator[None]:
    """Record the inputs of every call."""

    def shared_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs.shared.append(args[0].detach().flatten(0, -2))

    with ExitStack() as stack:
        stack.enter_context(watch_experts(layer, lambda routed, _: inputs.routed.append(routed)))
        if layer.shared is not None:
            stack.callback(layer.shared.register_forward_pre_hook(shared_input).remove)
        yield


def _information(
    moe: MoeModel, windows: Tensor, progress: Progress | None, steps: int
) -> tuple[list[list[Tensor]], list[_Inputs]]:
    """Per layer the summed squared gradients of :func:`_weights`, and the experts' inputs."""
    weights = [_weights(layer) for layer in moe.moe]
    flat = [p for row in weights for p in row]
    sums = [[torch.zeros_like(p, dtype=torch.float32) for p in row] for row in weights]
    inputs = [_Inputs() for _ in moe.moe]
    with _only_trainable(moe, flat), ExitStack() as stack, torch.enable_grad():
        for seen, layer in zip(inputs, moe.moe, strict=True):
            stack.enter_context(_watching(layer, seen))
        for done, window in enumerate(windows, 1):
            loss = token_losses(moe.model, window[None]).mean()
            gradients = iter(torch.autograd.grad(loss, flat, allow_unused=True))
            for row in sums:
                for total in row:
                    gradient = next(gradients)
                    if gradient is not None:
                        total += gradient.float().square()
            if progress:
                progress(done, steps)
    return sums, inputs


def _cost(information: Sequence[Tensor], base: Sequence[Tensor], quantized: Sequence[Tensor]) -> float:
    terms = zip(information, base, quantized, strict=True)
    return sum(float((f * (w.float() - q.float()).square()).sum(dtype=torch.float64)) for f, w, q in terms)


def _layer_costs(
    layer: MoeLayer, sums: list[Tensor], seen: _Inputs, perturbation: Perturbation, candidates: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Costs ``[E, B]`` of an original layer's routed experts and ``[B]`` of its shared one."""
    stacks = [layer.form.standard(n, w.detach()) for n, w in zip(PROJECTIONS, _weights(layer), strict=False)]
    sums = [layer.form.standard(n, s) for n, s in zip(PROJECTIONS, sums, strict=False)] + sums[2:]
    gate_up, down = stacks
    acts = layer.form.between(layer.experts).of(range(len(gate_up)))
    routed = np.zeros((len(gate_up), len(candidates)))
    for e in range(len(gate_up)):
        base = (gate_up[e], down[e])
        found = perturbation.expert(*base, candidates, [r.rows(e)[0] for r in seen.routed], acts[e])
        routed[e] = [_cost([s[e] for s in sums[:2]], base, pair) for pair in found]
    if layer.shared is None:
        return routed, None
    *first, down = (linear.weight for linear in layer.shared_linears().values())
    base = (torch.cat(first), down)
    found = perturbation.expert(*base, candidates, seen.shared, layer.shared_activation)
    merged = [torch.cat(sums[2:-1]), sums[-1]]
    return routed, np.array([_cost(merged, base, pair) for pair in found])


def weight_fisher(
    moe: MoeModel, windows: Tensor, candidates: tuple[int, ...], originals: MoeModel | None = None, *,
    perturbation: Perturbation | None = None, progress: Progress | None = None,
) -> Costs:
    """Weight-Fisher costs of every expert and candidate width, for :func:`gemq.algorithms.allocation.solve`.

    ``windows`` is int64 ``[N, T]``, one backward pass each; gradients are taken at the weights that ``moe`` holds, the
    change is that of ``originals`` (default: ``moe``), quantized as ``perturbation`` says. Needs as much memory again
    as the experts' weights in float32, twice (the sums and one window's gradients).
    """
    perturbation, steps = perturbation or Perturbation(), len(windows) + len(moe.moe)
    sums, inputs = _information(moe, windows, progress, steps)
    rows = []
    with torch.no_grad():
        for at, layer in enumerate((originals or moe).moe):
            rows.append(_layer_costs(layer, sums[at], inputs[at], perturbation, candidates))
            if progress:
                progress(len(windows) + at + 1, steps)
    shared = [own for _, own in rows if own is not None]
    return Costs(
        candidates=candidates,
        routed=np.stack([routed for routed, _ in rows]),
        shared=np.stack(shared) if shared else None,
        shared_multiple=moe.shared_multiple,
        layers=tuple(layer.index for layer in moe.moe),
    )
