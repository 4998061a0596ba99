"""Few outlier weights in 16 bits, the rest quantized: SpQR (arXiv 2306.03078) at a given total of bits.

A weight is an outlier if the layer's output error falls most when it is left out of its group: with ``d_j = [H^-1]_jj``
and the group's error ``sum_j (w_j - q_j)^2 / (2 d_j)``, its sensitivity is that error minus the error of the others on
the grid that they find without it (SpQR's leave-one-out criterion). The most sensitive share of each matrix keeps 16
bits; grids are found without them, and GPTQ's column loop passes over them with no error. An outlier costs its
16-bit value and a 16-bit column index, and its place among the codes stays: at ``b`` bits with a share ``r`` of
outliers a weight takes ``b + 32 r`` bits. Groups and their scales are those of this package's format, unquantized.

This is for comparison. The packed format has no place for outliers, so models are left dequantized.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gemq.algorithms.gptq import GptqConfig, GptqReport, inverse_factor
from gemq.algorithms.layerwise import Hessian
from gemq.algorithms.originals import Originals
from gemq.algorithms.sequential import BitPlan, quantize_weights
from gemq.format import default_group_size
from gemq.models import MoeModel
from gemq.nn.experts import QuantizedStack
from gemq.reference.grid import find_grid, round_to_grid

OUTLIER_BITS = 32  # a value and a column index, 16 bits each


def split_budget(budget: float) -> tuple[int, float]:
    """``(bits, share)`` of a budget in bits per weight: the next width below it, the rest spent on outliers.

    Raises ``ValueError`` unless the budget is above 1 and at most 9.
    """
    if not 1 < budget <= 9:
        raise ValueError(f"budget must be above 1 and at most 9 bits per weight, got {budget}")
    bits = math.ceil(budget) - 1
    return bits, (budget - bits) / OUTLIER_BITS


def _group_error(w: Tensor, keep: Tensor, inverse: Tensor, max_code: Tensor) -> tuple[Tensor, Tensor]:
    """Error of the kept weights of groups ``[..., g]`` on the grid fitted to them: summed over the group ``[...]``, and
    per weight."""
    s, m = find_grid(_without(w, keep, max_code), max_code, "none")
    lost = (round_to_grid(w, s, m, max_code) * s + m - w).square() / (2 * inverse) * keep
    return lost.sum(-1), lost


def _without(w: Tensor, keep: Tensor, max_code: Tensor) -> Tensor:
    """Replace the weights of ``w [..., g]`` that are not kept, so that they do not change the grid of the others. They
    become 0, which every range holds; at one bit, whose scale is the mean size, they become that mean."""
    mean = (w.abs() * keep).sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(keep, w, torch.where(max_code == 1, mean.copysign(w), 0.0))


def sensitivity(weight: Tensor, inverse: Tensor, bits: int, group_size: int) -> Tensor:
    """SpQR's leave-one-out sensitivity ``[E, n, k]`` of ``weight [E, n, k]``; ``inverse [E, k]`` is ``diag(H^-1)``.

    A weight that is neither the largest nor the smallest of its group leaves the grid as it is (above one bit), so it
    is its own error; for those two the grid is found again without them.
    """
    w = weight.float().unflatten(-1, (-1, group_size))
    d = inverse.float()[:, None].expand(weight.shape).unflatten(-1, (-1, group_size))
    max_code = torch.tensor(float(2**bits - 1), device=w.device)
    everything = torch.ones_like(w, dtype=torch.bool)
    total, found = _group_error(w, everything, d, max_code)
    for extreme in (w.argmax(-1, keepdim=True), w.argmin(-1, keepdim=True)):
        keep = everything.scatter(-1, extreme, False)
        left, _ = _group_error(w, keep, d, max_code)
        found = found.scatter(-1, extreme, (total - left)[..., None])
    return found.flatten(-2)


def pick_outliers(sensitivity: Tensor, share: float) -> Tensor:
    """Bool ``[E, n, k]``: of each matrix the ``floor(share * n * k)`` weights of the highest sensitivity."""
    flat = sensitivity.flatten(1)
    count = math.floor(share * flat.shape[1] + 1e-9)
    mask = torch.zeros_like(flat, dtype=torch.bool)
    return mask.scatter_(1, flat.topk(count, dim=1).indices, True).view(sensitivity.shape)


def _columns(weight: Tensor, factor: Tensor, bits: int, outlier: Tensor, group_size: int, clip: str) -> Tensor:
    """GPTQ's column loop over ``weight [E, n, k]``, passing over outliers; the dequantized result."""
    w, result = weight.clone(), torch.empty_like(weight)
    max_code = torch.full((len(w), 1, 1), float(2**bits - 1), device=w.device)
    for start in range(0, w.shape[-1], group_size):
        stop = start + group_size
        block, errors = w[..., start:stop].clone(), torch.empty_like(w[..., start:stop])
        s, m = find_grid(_without(block, ~outlier[..., start:stop], max_code), max_code, clip)
        for i in range(group_size):
            column, held = block[..., i : i + 1], outlier[..., start + i : start + i + 1]
            value = torch.where(held, column.half().float(), round_to_grid(column, s, m, max_code) * s + m)
            error = (column - value) / factor[:, start + i, start + i, None, None]
            block[..., i:] -= error * factor[:, start + i, None, start + i : stop]
            result[..., start + i], errors[..., i] = value.squeeze(-1), error.squeeze(-1)
        w[..., stop:].baddbmm_(errors, factor[:, start:stop, stop:], alpha=-1)
    return result


def outlier_gptq(
    weight: Tensor, hessian: Tensor, bits: int, share: float, config: GptqConfig, group_size: int
) -> tuple[Tensor, Tensor]:
    """Quantize ``weight [E, n, k]`` to ``bits`` with a share of outliers, given ``hessian [E, k, k]`` (sum of x x').

    Returns ``(dequantized float32 [E, n, k], outliers bool [E, n, k])``. A matrix whose Hessian is not positive
    definite under any damping is rounded without propagation. Raises ``ValueError`` for a share outside 0..1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in 0..1, got {share}")
    weight = weight.float()
    factor, damping = inverse_factor(hessian.float(), config.damping)
    factor[~torch.isfinite(damping)] = torch.eye(weight.shape[-1], device=weight.device)
    inverse = factor.square().sum(1)  # the diagonal of U' U
    outlier = pick_outliers(sensitivity(weight, inverse, bits, group_size), share)
    return _columns(weight, factor, bits, outlier, group_size, config.clip), outlier


class _Quantizer:
    """Quantizes a stack in place with outliers; what :func:`gemq.algorithms.sequential.quantize_weights` calls."""

    def __init__(self, bits: int, share: float):
        self.bits, self.share = bits, share
        self.outliers = self.weights = 0

    def __call__(
        self, weights: Tensor, hessians: list[Hessian], bits: list[int], config: GptqConfig
    ) -> tuple[QuantizedStack, dict[int, GptqReport]]:
        size = default_group_size(weights.shape[-1], config.group_size)
        hessian = torch.stack([h.value for h in hessians])
        found, outlier = outlier_gptq(weights, hessian, self.bits, self.share, config, size)
        delta = weights.float() - found
        lost = ((delta @ hessian) * delta).sum((-1, -2))
        scale = ((weights.float() @ hessian) * weights.float()).sum((-1, -2)).clamp(min=1e-30)
        weights.copy_(found)
        self.outliers += int(outlier.sum())
        self.weights += outlier.numel()
        reports = {
            e: GptqReport(h.tokens, config.damping, "", float(lost[e] / scale[e])) for e, h in enumerate(hessians)
        }
        return QuantizedStack([None] * len(bits), [None] * len(bits), [0] * len(bits)), reports


def quantize_weights_with_outliers(
    moe: MoeModel, windows: Tensor, budget: float, originals: Originals, config: GptqConfig | None = None, *,
    attention: int = 4, dense: int = 4, shared: int = 4, batch_size: int = 8,
) -> float:
    """Quantize every routed expert of the model at ``budget`` bits a weight with outliers, the rest as usual.

    As :func:`gemq.algorithms.sequential.quantize_weights`, layer by layer on ``windows`` int64 ``[N, T]``; the
    dequantized weights are left in the model, and nothing that could be packed is returned, but the bits per weight
    of the experts, with outliers.
    """
    bits, share = split_budget(budget)
    quantizer = _Quantizer(bits, share)
    indices = [layer.index for layer in moe.moe]
    has_shared = moe.moe[0].shared is not None
    plan = BitPlan(
        {i: [bits] * moe.num_experts for i in indices}, {i: shared for i in indices} if has_shared else {},
        attention, dense,
    )
    quantize_weights(moe, windows, plan, originals, config, batch_size=batch_size, quantizer=quantizer)
    return bits + OUTLIER_BITS * quantizer.outliers / quantizer.weights
