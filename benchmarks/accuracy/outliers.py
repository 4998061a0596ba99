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
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from gemq.algorithms.gptq import GptqConfig, inverse_factor
from gemq.algorithms.layerwise import Hessian, capture_layer_calls, run_layer, watch_experts
from gemq.algorithms.matrices import quantize_linear
from gemq.algorithms.perturbation import hessians_of
from gemq.format import default_group_size
from gemq.models import MoeModel
from gemq.reference.grid import dequantize_codes, find_grid, round_to_grid
from gemq.widths import Widths

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


@dataclass
class _Run:
    """Options of a run, and the outliers and weights that it has counted."""

    widths: Widths
    share: float
    config: GptqConfig
    outliers: int = 0
    weights: int = 0

    def experts(self, weights: Tensor, hessians: list[Hessian], bits: int) -> None:
        """Quantize a stack ``[E, n, k]`` in place."""
        size = default_group_size(weights.shape[-1], self.config.group_size)
        hessian = torch.stack([h.value for h in hessians])
        found, outlier = outlier_gptq(weights, hessian, bits, self.share, self.config, size)
        weights.copy_(found)
        self.outliers += int(outlier.sum())
        self.weights += outlier.numel()

    def layer(self, moe: MoeModel, index: int, hidden: list[Tensor], kwargs: list[list[dict]], bits: int) -> None:
        """Quantize a decoder layer in place on the inputs ``hidden``."""
        under, routed = f"{moe.layer_path(index)}.", []
        linears = {p: pair for p, pair in moe.quantized_linears(self.widths).items() if p.startswith(under)}
        hessians = {path: Hessian(module.in_features, module.weight.device) for path, (module, _) in linears.items()}
        layer = next((m for m in moe.moe if m.index == index), None)
        with ExitStack() as stack:
            for path, (module, _) in linears.items():
                handle = module.register_forward_pre_hook(lambda m, args, p=path: hessians[p].add(args[0]))
                stack.callback(handle.remove)
            if layer is not None:
                stack.enter_context(watch_experts(layer, lambda seen, output: routed.append(seen)))
            for h, kw in zip(hidden, kwargs, strict=True):
                run_layer(moe.layers[index], h, kw[index])
        for path, (module, width) in linears.items():
            codes, meta, _ = quantize_linear(module, hessians[path], width, self.config)
            module.weight.copy_(dequantize_codes(codes, meta, module.weight.dtype))
        if layer is None:
            return
        gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
        rows = ([(r.rows(e)[0], 1.0) for e in range(len(gate_up))] for r in routed)
        pairs = hessians_of(gate_up, rows, down.shape[-1])
        self.experts(gate_up, [pair[0] for pair in pairs], bits)
        self.experts(down, [pair[1] for pair in pairs], bits)


@torch.no_grad()
def quantize_with_outliers(
    moe: MoeModel, windows: Tensor, budget: float, config: GptqConfig | None = None, *,
    attention: int = 4, dense: int = 4, shared: int = 4, batch_size: int = 8,
) -> float:
    """Quantize every routed expert of ``moe`` in place at ``budget`` bits a weight with outliers, the rest as usual.

    Layer by layer on ``windows`` int64 ``[N, T]``, each calibrated on the output of the quantized ones. Nothing that
    could be packed is made. Returns the bits per weight of the experts, with outliers.
    """
    bits, share = split_budget(budget)
    indices = [layer.index for layer in moe.moe]
    widths = Widths(
        {i: [bits] * moe.num_experts for i in indices}, {i: shared for i in indices} if moe.shared_multiple else {},
        attention, dense,
    )
    run = _Run(widths, share, config or GptqConfig())
    calls = capture_layer_calls(moe, list(windows.split(batch_size)))
    hidden = calls.hidden
    for index, module in enumerate(moe.layers):
        run.layer(moe, index, hidden, calls.kwargs, bits)
        hidden = [run_layer(module, h, kw[index]) for h, kw in zip(hidden, calls.kwargs, strict=True)]
    return bits + OUTLIER_BITS * run.outliers / run.weights
