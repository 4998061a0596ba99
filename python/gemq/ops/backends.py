"""Choose the kernels that run: the layout of the weights decides, and a wrong pairing is an error.

Every backend multiplies exact ``q * s + m`` into float32 sums and rounds once, at the end, to the dtype of ``x``.
Triton's takes the activations at float16's 11 significant bits, the CPU's as :func:`gemq.ops.set_cpu_activations` says.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from gemq import format as fmt
from gemq.activation import PLAIN, Between
from gemq.ops import checks, cpu
from gemq.ops.packed_stack import Stack
from gemq.ops.packing import dequantize, repack


def check(layout: str, device: torch.device) -> None:
    """Raise ``ValueError`` if no kernel reads ``layout`` on ``device``."""
    fmt.check_layout(layout)
    if layout == "cpu_tile" and device.type != "cpu":
        raise ValueError(f"layout cpu_tile is read on the CPU only, the tensors are on {device}; repack to gpu_tile")
    if layout == "gpu_tile" and device.type != "cuda" and not (device.type == "cpu" and _interpreting()):
        raise ValueError(
            f"layout gpu_tile is read on CUDA devices (or on the CPU under TRITON_INTERPRET=1), the tensors are on "
            f"{device}; repack to {'cpu_tile' if device.type == 'cpu' else 'canonical'}"
        )


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def moe_gemm(
    x: Tensor, stack: Stack, topk_ids: Tensor, topk_weights: Tensor | None, n: int, group_size: int, layout: str
) -> Tensor:
    """Forward of :func:`gemq.ops.moe_lowbit_gemm` on checked arguments; on the CPU it checks the offsets too."""
    if layout == "cpu_tile":
        return cpu.moe_gemm(x, stack, topk_ids, topk_weights, n, group_size)
    checks.expert_ids(topk_ids, stack[2].numel())
    if not x.is_cuda:
        checks.expert_bounds("weight", stack, n, x.shape[-1], group_size, layout)
    if layout == "gpu_tile":
        from gemq.triton_kernels import moe_gemm as triton_moe_gemm

        return triton_moe_gemm(x, *stack, topk_ids, topk_weights, n=n, group_size=group_size)
    return _moe_gemm_dense(x, stack, topk_ids, topk_weights, n, group_size)


def moe_ffn(
    x: Tensor, gate_up: Stack, down: Stack, topk_ids: Tensor, topk_weights: Tensor, intermediate: int,
    group_size: int, down_group_size: int, layout: str, between: Between = PLAIN,
) -> Tensor:
    """Forward of :func:`gemq.ops.moe_lowbit_ffn` on checked arguments; on the CPU it checks the offsets too."""
    if layout == "cpu_tile":
        return cpu.moe_ffn(
            x, gate_up, down, topk_ids, topk_weights, intermediate, group_size, down_group_size, between
        )
    rows = between.activation.rows(intermediate)
    checks.expert_ids(topk_ids, gate_up[2].numel())
    if not x.is_cuda:
        checks.expert_bounds("gate_up", gate_up, rows, x.shape[-1], group_size, layout)
        checks.expert_bounds("down", down, x.shape[-1], intermediate, down_group_size, layout)
    if layout == "gpu_tile":
        from gemq.triton_kernels import moe_ffn as triton_moe_ffn

        return triton_moe_ffn(
            x, gate_up, down, topk_ids, topk_weights, intermediate=intermediate, group_size=group_size,
            down_group_size=down_group_size, between=_for_triton(between),
        )
    hidden = _moe_gemm_dense(x.float(), gate_up, topk_ids, None, rows, group_size)
    if between.gate_up_bias is not None:
        hidden = hidden + bias_of(between.gate_up_bias, topk_ids, gate_up)
    out = _moe_gemm_dense(between.activation(hidden), down, topk_ids, topk_weights, x.shape[-1], down_group_size)
    if between.down_bias is not None:
        out = out + torch.einsum("tkn,tk->tn", bias_of(between.down_bias, topk_ids, down), topk_weights.float())
    return out.to(x.dtype)


def _for_triton(between: Between):
    from gemq.triton_kernels.activation import SILU, Gating, Inner

    activation, gate_up_bias, down_bias = between
    if between == PLAIN:
        return SILU
    how = activation.gating
    gating = Gating(how.slope, how.cubic, 0.0 if how.limit == math.inf else how.limit, how.shift)
    plain = not activation.gated or how == PLAIN.activation.gating
    return Inner(activation, activation.gated, None if plain else gating, gate_up_bias, down_bias)


def bias_of(bias: Tensor, topk_ids: Tensor, stack: Stack) -> Tensor:
    """Rows ``[T, top_k, n]`` of a bias ``[E, n]``; zeros for ids out of range and experts without bits in ``stack``."""
    bits, at = stack[2], topk_ids.long().clamp(0, len(bias) - 1)
    counts = (topk_ids >= 0) & (topk_ids < len(bias)) & (bits[at] > 0)
    return torch.where(counts[..., None], bias[at], 0.0)


def dense_gemm(
    x: Tensor, qweight: Tensor, meta: Tensor, bits: int, n: int, group_size: int, layout: str
) -> Tensor:
    """``[T, k] -> [T, n]`` for one packed matrix."""
    k = x.shape[1]
    if layout == "cpu_tile":
        return cpu.dense_gemm(x, qweight, meta, bits, n, group_size)
    if layout == "gpu_tile":
        from gemq.triton_kernels import lowbit_gemm as triton_lowbit_gemm

        return triton_lowbit_gemm(x, qweight, meta, bits=bits, n=n, group_size=group_size)
    weight = dense_weight(qweight, meta, bits, n, k, group_size, layout, torch.float32)
    return (x.float() @ weight.T).to(x.dtype)


def dense_weight(
    qweight: Tensor, meta: Tensor, bits: int, n: int, k: int, group_size: int, layout: str, dtype: torch.dtype
) -> Tensor:
    """The weights ``[n, k]`` of one packed matrix in any layout; the buffers may be longer than the matrix."""
    codes = qweight[: fmt.codes_bytes(n, k, bits, layout)]
    pairs = meta[: fmt.meta_elements(n, k, bits, group_size, layout)]
    if layout != "canonical":
        codes, pairs = repack(codes, pairs, bits, n, k, group_size, source=layout, target="canonical")
    return dequantize(codes.view(n, -1), pairs.view(n, k // group_size, 2), bits, k, group_size, dtype)


def _expert_weights(stack: Stack, n: int, k: int, group_size: int, layout: str):
    """Yield ``(expert, function that returns its float32 weights [n, k])`` for every expert that stores something."""
    qweight, meta, bits, offsets, meta_offsets = stack
    tables = zip(bits.tolist(), offsets.tolist(), meta_offsets.tolist(), strict=True)
    for e, (width, at, meta_at) in enumerate(tables):
        if width:
            yield e, lambda at=at, meta_at=meta_at, width=width: dense_weight(
                qweight[at:], meta[meta_at:], width, n, k, group_size, layout, torch.float32
            )


def _slot_rows(x: Tensor, topk_ids: Tensor) -> Tensor:
    return x[:, None].expand(-1, topk_ids.shape[1], -1) if x.dim() == 2 else x


def _moe_gemm_dense(
    x: Tensor, stack: Stack, topk_ids: Tensor, topk_weights: Tensor | None, n: int, group_size: int
) -> Tensor:
    rows = _slot_rows(x, topk_ids)
    out = x.new_zeros(*topk_ids.shape, n, dtype=torch.float32)
    for e, weight in _expert_weights(stack, n, x.shape[-1], group_size, "canonical"):
        token, slot = torch.where(topk_ids == e)
        if token.numel():
            out[token, slot] = rows[token, slot].float() @ weight().T
    if topk_weights is None:
        return out.to(x.dtype)
    scale = _valid_weights(topk_ids, topk_weights, stack)
    return torch.einsum("tkn,tk->tn", out, scale).to(x.dtype)


def _valid_weights(topk_ids: Tensor, topk_weights: Tensor, stack: Stack) -> Tensor:
    valid = (topk_ids >= 0) & (topk_ids < stack[2].numel())
    return torch.where(valid, topk_weights.float(), 0.0)


def moe_gemm_backward(
    grad: Tensor, x: Tensor, stack: Stack, topk_ids: Tensor, topk_weights: Tensor | None, n: int, group_size: int,
    layout: str,
) -> tuple[Tensor, Tensor]:
    """Gradients ``(x, topk_weights)``; the second is empty without weights. One expert is dequantized at a time."""
    rows = _slot_rows(x, topk_ids)
    grad_rows = x.new_zeros(rows.shape, dtype=torch.float32)
    grad_scale = grad_rows.new_zeros(topk_ids.shape)
    for e, weight in _expert_weights(stack, n, x.shape[-1], group_size, layout):
        token, slot = torch.where(topk_ids == e)
        if not token.numel():
            continue
        dense = weight()
        if topk_weights is None:
            grad_rows[token, slot] = grad[token, slot].float() @ dense
            continue
        outer = grad[token].float()
        scale = topk_weights[token, slot, None].float()
        back = outer @ dense
        grad_rows[token, slot] = back * scale
        grad_scale[token, slot] = (back * rows[token, slot].float()).sum(-1)
    grad_x = (grad_rows.sum(1) if x.dim() == 2 else grad_rows).to(x.dtype)
    if topk_weights is None:
        return grad_x, grad_scale.new_empty(0)
    return grad_x, grad_scale.to(topk_weights.dtype)
