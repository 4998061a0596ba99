"""What :mod:`gemq.ops` calls: few tokens take the decode kernels, many the prefill kernels."""

from __future__ import annotations

from torch import Tensor

from .decode import Stack, dense_decode, ffn_decode, moe_decode


def moe_gemm(
    x: Tensor, qweight: Tensor, meta: Tensor, expert_bits: Tensor, expert_offsets: Tensor, meta_offsets: Tensor,
    topk_ids: Tensor, topk_weights: Tensor | None = None, **options,
) -> Tensor:
    """:func:`.decode.moe_decode` or prefill, by the number of tokens."""
    return moe_decode(
        x, qweight, meta, expert_bits, expert_offsets, meta_offsets, topk_ids, topk_weights, **options
    )


def moe_ffn(
    x: Tensor, gate_up: Stack, down: Stack, topk_ids: Tensor, topk_weights: Tensor, **options
) -> Tensor:
    """:func:`.decode.ffn_decode` or prefill, by the number of tokens."""
    return ffn_decode(x, gate_up, down, topk_ids, topk_weights, **options)


def lowbit_gemm(x: Tensor, qweight: Tensor, meta: Tensor, **options) -> Tensor:
    """:func:`.decode.dense_decode` or prefill, by the number of tokens."""
    return dense_decode(x, qweight, meta, **options)
moe_prefill = moe_decode
