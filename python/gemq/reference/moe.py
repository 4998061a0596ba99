"""Low-bit matrix products over experts in plain torch: dequantize, then multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq.activation import SILU, Activation
from gemq.format import codes_bytes, meta_elements
from gemq.reference.bits import dequantize
from gemq.reference.tiles import from_layout


def _expert_weight(
    qweight: Tensor, meta: Tensor, bits: int, code_at: int, meta_at: int, n: int, k: int, group_size: int,
    layout: str, dtype: torch.dtype,
) -> Tensor:
    codes = qweight[code_at : code_at + codes_bytes(n, k, bits, layout)]
    pairs = meta[meta_at : meta_at + meta_elements(n, k, bits, group_size, layout)]
    packed, plain_meta = from_layout(codes, pairs, bits, n, k, group_size, layout)
    return dequantize(packed, plain_meta, bits, k, group_size, dtype)


def lowbit_gemm(
    x: Tensor, qweight: Tensor, meta: Tensor, *, bits: int, n: int, group_size: int = 128,
    layout: str = "canonical", compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``x [..., k] @ W.T -> [..., n]`` for one packed matrix, computed in ``compute_dtype`` and not rounded back."""
    k = x.shape[-1]
    if bits == 0:
        return x.new_zeros(*x.shape[:-1], n, dtype=compute_dtype)
    weight = _expert_weight(qweight, meta, bits, 0, 0, n, k, group_size, layout, compute_dtype)
    return x.to(compute_dtype) @ weight.T


def moe_lowbit_gemm(
    x: Tensor, qweight: Tensor, meta: Tensor, expert_bits: Tensor, expert_offsets: Tensor, meta_offsets: Tensor,
    topk_ids: Tensor, topk_weights: Tensor | None = None, *, n: int, group_size: int = 128,
    layout: str = "canonical", compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Each token times the matrices of its experts; see :func:`gemq.ops.moe_lowbit_gemm`.

    ``x`` is ``[T, k]`` or ``[T, top_k, k]``; returns ``[T, top_k, n]``, or ``[T, n]`` when ``topk_weights`` is
    given, in ``compute_dtype``. Ids below 0 or at least ``E`` contribute zero.
    """
    tokens, top_k = topk_ids.shape
    k = x.shape[-1]
    rows = x[:, None].expand(tokens, top_k, k) if x.dim() == 2 else x
    out = torch.zeros(tokens, top_k, n, dtype=compute_dtype, device=x.device)
    for e in range(expert_bits.numel()):
        bits = int(expert_bits[e])
        hit = topk_ids == e
        if bits == 0 or not hit.any():
            continue
        weight = _expert_weight(
            qweight, meta, bits, int(expert_offsets[e]), int(meta_offsets[e]), n, k, group_size, layout, compute_dtype
        )
        out[hit] = rows[hit].to(compute_dtype) @ weight.T
    if topk_weights is None:
        return out
    valid = (topk_ids >= 0) & (topk_ids < expert_bits.numel())
    scale = torch.where(valid, topk_weights.to(compute_dtype), 0)
    return torch.einsum("tkn,tk->tn", out, scale)


def moe_lowbit_ffn(
    x: Tensor,
    gate_up: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    down: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    topk_ids: Tensor, topk_weights: Tensor, *, intermediate: int, group_size: int = 128,
    down_group_size: int | None = None, layout: str = "canonical", compute_dtype: torch.dtype = torch.float32,
    activation: Activation = SILU, gate_up_bias: Tensor | None = None, down_bias: Tensor | None = None,
) -> Tensor:
    """The whole expert block: gate and up, activation, down, weighted sum. ``[T, k] -> [T, k]``.

    ``gate_up`` and ``down`` are ``(qweight, meta, expert_bits, expert_offsets, meta_offsets)``; the rows of
    ``gate_up`` are the ``intermediate`` gate rows, then the up rows.
    """
    hidden = moe_lowbit_gemm(
        x, *gate_up, topk_ids, n=activation.rows(intermediate), group_size=group_size, layout=layout,
        compute_dtype=compute_dtype,
    )
    if gate_up_bias is not None:
        for e in gate_up[2].nonzero().flatten().tolist():
            hidden[topk_ids == e] += gate_up_bias[e].to(compute_dtype)
    out = moe_lowbit_gemm(
        activation(hidden), *down, topk_ids, topk_weights, n=x.shape[-1],
        group_size=down_group_size or group_size, layout=layout, compute_dtype=compute_dtype,
    )
    if down_bias is not None:
        for e in down[2].nonzero().flatten().tolist():
            scale = torch.where(topk_ids == e, topk_weights.to(compute_dtype), 0).sum(1)
            out += scale[:, None] * down_bias[e].to(compute_dtype)
    return out
