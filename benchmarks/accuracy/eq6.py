"""Compare the loss increase that Eq. 6 predicts for one expert with the increase measured by quantizing just this
expert.

Eq. 6 sums squares of ``g * dz`` with ``g`` the gradient of a window's mean loss. With the Fisher information in place
of the Hessian the expected rise of that mean loss is ``(T - 1) / 2`` times as much: the mean of ``T - 1`` token
losses has gradients smaller by that factor, and curvature is one square of a token loss's gradient. ``calibrated``
applies this; a method that only ranks experts needs no such factor, but sums over windows must be in one unit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gemq.algorithms.layerwise import Routed, expert_hidden, watch_experts
from gemq.algorithms.perplexity import token_losses
from gemq.algorithms.perturbation import Perturbation
from gemq.models import MoeLayer, MoeModel
from gemq.reference.importance import expert_calls


@torch.no_grad()
def window_losses(moe: MoeModel, windows: Tensor, batch_size: int) -> float:
    """The sum over windows of their mean loss, in nats."""
    return sum(
        float(token_losses(moe.model, windows[at : at + batch_size]).double().mean(1).sum())
        for at in range(0, len(windows), batch_size)
    )


@torch.no_grad()
def _inputs(moe: MoeModel, layer: MoeLayer, windows: Tensor, batch_size: int) -> list[Routed]:
    seen: list[Routed] = []
    with watch_experts(layer, lambda routed, output: seen.append(routed)):
        for at in range(0, len(windows), batch_size):
            moe.decoder(input_ids=windows[at : at + batch_size], use_cache=False)
    return seen


@torch.no_grad()
def true_increases(
    moe: MoeModel, windows: Tensor, candidates: tuple[int, ...], perturbation: Perturbation, batch_size: int = 8
) -> np.ndarray:
    """Measure the rise of the loss on ``windows`` (as in Eq. 6: summed over windows) if one expert alone has a width.

    Float64 ``[L, E, B]``; negative where quantizing helps. ``moe`` holds its original weights, and does so after.
    """
    base = window_losses(moe, windows, batch_size)
    found = np.zeros((len(moe.moe), moe.num_experts, len(candidates)))
    for row, layer in enumerate(moe.moe):
        seen = _inputs(moe, layer, windows, batch_size)
        stacks = (layer.experts.gate_up_proj, layer.experts.down_proj)
        for e, (gate_up, down) in enumerate(zip(*(s.detach().clone() for s in stacks), strict=True)):
            changed = perturbation.expert(gate_up, down, candidates, [r.rows(e)[0] for r in seen])
            for b, pair in enumerate(changed):
                for stack, weight in zip(stacks, pair, strict=True):
                    stack[e].copy_(weight)
                found[row, e, b] = window_losses(moe, windows, batch_size) - base
            for stack, weight in zip(stacks, (gate_up, down), strict=True):
                stack[e].copy_(weight)
    return found


def first_order(
    moe: MoeModel, windows: Tensor, candidates: tuple[int, ...], perturbation: Perturbation, batch_size: int = 8
) -> np.ndarray:
    """The sum over tokens of ``g' dz``, float64 ``[L, E, B]``: what Eq. 6 leaves out because a trained model's gradient
    is zero in the mean, which on a few thousand tokens of a text it is not. Sign and units are those of
    :func:`true_increases`."""
    for parameter in moe.model.parameters():
        parameter.requires_grad_(False)
    experts = [layer.experts for layer in moe.moe]
    captured = [expert_calls(moe.model, experts, ids) for ids in windows.split(batch_size)]
    found = np.zeros((len(moe.moe), moe.num_experts, len(candidates)))
    with torch.no_grad():
        for row, layer in enumerate(moe.moe):
            seen = [(Routed(c.x, c.ids, c.weights), c.gradient) for c in (calls[row] for calls in captured)]
            stacks = (layer.experts.gate_up_proj, layer.experts.down_proj)
            for e, (gate_up, down) in enumerate(zip(*stacks, strict=True)):
                changed = perturbation.expert(gate_up, down, candidates, [r.rows(e)[0] for r, _ in seen])
                for routed, gradient in seen:
                    x, token = routed.rows(e)
                    weighted = gradient[token].float() * routed.weight_of(e, token)
                    before = expert_hidden(gate_up, x) @ down.T
                    for b, (first, second) in enumerate(changed):
                        change = expert_hidden(first, x) @ second.T - before
                        found[row, e, b] += float((weighted * change).double().sum())
    return found


def with_first_order(
    predicted: np.ndarray, first: np.ndarray, true: np.ndarray, length: int
) -> tuple[np.ndarray, float]:
    """Return ``first + a * calibrated(predicted)`` and ``a``. ``a`` is fitted to ``true``: it is the median of the
    values that would make each prediction exact."""
    second = calibrated(predicted, length)
    multiple = float(np.median((true - first)[second > 0] / second[second > 0]))
    return first + multiple * second, multiple


def calibrated(predicted: np.ndarray, length: int) -> np.ndarray:
    """Convert costs of Eq. 6 to the expected rise of the summed mean losses; ``length`` is the tokens of a window."""
    return predicted * (length - 1) / 2


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, ties sharing their mean."""
    order = np.argsort(values, kind="stable")
    found = np.empty(len(values))
    found[order] = np.arange(len(values))
    for value in np.unique(values):
        same = values == value
        found[same] = found[same].mean()
    return found


def spearman(one: np.ndarray, two: np.ndarray) -> float:
    """Rank correlation of two flat arrays."""
    return float(np.corrcoef(ranks(np.ravel(one)), ranks(np.ravel(two)))[0, 1])


def summary(predicted: np.ndarray, true: np.ndarray, candidates: list[int], length: int) -> list[dict]:
    """Summarise by width: Spearman's rank correlation, and the quartiles of true over predicted rise where that is
    positive."""
    rows = []
    for b, bits in enumerate(candidates):
        ratio = true[..., b] / np.maximum(calibrated(predicted[..., b], length), 1e-300)
        used = predicted[..., b] > 0
        low, middle, high = np.quantile(ratio[used], [0.25, 0.5, 0.75])
        rows.append({
            "bits": bits, "spearman": spearman(predicted[..., b], true[..., b]),
            "within_layers": float(np.mean([spearman(p, t) for p, t in
                                            zip(predicted[..., b], true[..., b], strict=True)])),
            "ratio": [float(low), float(middle), float(high)],
            "total": float(true[..., b].sum() / calibrated(predicted[..., b], length).sum()),
        })
    return rows
