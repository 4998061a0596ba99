"""Entry points for :mod:`gemq.ops`: few tokens take the decode kernels, many the prefill kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from . import launch_parameters, prefill_launch
from .activation import SILU, Inner
from .decode_launch import check, dense_decode, device_name, ffn_decode, moe_decode
from .layout import Stack


def _fast(x: Tensor, fast: bool | None) -> bool:
    """Return True if inline assembly may be used. The interpreter does not support it."""
    return not triton.knobs.runtime.interpret and (x.is_cuda if fast is None else fast)


def moe_prefill(
    x: Tensor, qweight: Tensor, meta: Tensor, expert_bits: Tensor, expert_offsets: Tensor, meta_offsets: Tensor,
    topk_ids: Tensor, topk_weights: Tensor | None = None, *, n: int, group_size: int = 128, out: Tensor | None = None,
    fast: bool | None = None,
) -> Tensor:
    """:func:`.decode_launch.moe_decode` for many tokens, by the method of the launch table for so many an expert."""
    check(x, topk_ids, group_size)
    tokens, top_k = topk_ids.shape
    if out is None:
        out = x.new_empty((tokens, top_k, n) if topk_weights is None else (tokens, n))
    if topk_ids.numel() == 0 or n == 0:
        return out.zero_()
    stack = (qweight, meta, expert_bits, expert_offsets, meta_offsets)
    launch = launch_parameters.prefill_launch(
        device_name(x.device), tokens, expert_bits.numel(), top_k, n, x.shape[-1]
    )
    return prefill_launch.gemm(x, stack, topk_ids, topk_weights, n, group_size, out, _fast(x, fast), launch)


def moe_gemm(
    x: Tensor, qweight: Tensor, meta: Tensor, expert_bits: Tensor, expert_offsets: Tensor, meta_offsets: Tensor,
    topk_ids: Tensor, topk_weights: Tensor | None = None, **options,
) -> Tensor:
    """:func:`.decode_launch.moe_decode` or :func:`moe_prefill`, by the number of tokens."""
    op = moe_decode if launch_parameters.is_decode(device_name(x.device), x.shape[0]) else moe_prefill
    return op(x, qweight, meta, expert_bits, expert_offsets, meta_offsets, topk_ids, topk_weights, **options)


def moe_ffn(
    x: Tensor, gate_up: Stack, down: Stack, topk_ids: Tensor, topk_weights: Tensor, *, intermediate: int,
    group_size: int = 128, down_group_size: int | None = None, out: Tensor | None = None, fast: bool | None = None,
    between: Inner = SILU,
) -> Tensor:
    """:func:`.decode_launch.ffn_decode` or its prefill, by the number of tokens."""
    name = device_name(x.device)
    if launch_parameters.is_decode(name, x.shape[0]):
        return ffn_decode(
            x, gate_up, down, topk_ids, topk_weights, intermediate=intermediate, group_size=group_size,
            down_group_size=down_group_size, out=out, fast=fast, between=between,
        )
    check(x, topk_ids, group_size)
    out = torch.empty_like(x) if out is None else out
    if topk_ids.numel() == 0:
        return out.zero_()
    launch = launch_parameters.prefill_launch(
        name, x.shape[0], gate_up[2].numel(), topk_ids.shape[1], intermediate, x.shape[1]
    )
    return prefill_launch.ffn(
        x, gate_up, down, topk_ids, topk_weights, intermediate, group_size, down_group_size or group_size, out,
        _fast(x, fast), launch, between,
    )


def lowbit_gemm(
    x: Tensor, qweight: Tensor, meta: Tensor, *, bits: int, n: int, group_size: int = 128, out: Tensor | None = None,
    fast: bool | None = None,
) -> Tensor:
    """:func:`.decode_launch.dense_decode` or, as a stack of one expert, :func:`moe_prefill`."""
    tokens, device = x.shape[0], x.device
    if launch_parameters.is_decode(device_name(device), tokens):
        return dense_decode(x, qweight, meta, bits=bits, n=n, group_size=group_size, out=out, fast=fast)
    offset = torch.zeros(1, dtype=torch.int64, device=device)
    stack = (qweight, meta, torch.full((1,), bits, dtype=torch.int32, device=device), offset, offset)
    ids = torch.zeros(tokens, 1, dtype=torch.int32, device=device)
    out = None if out is None else out.view(tokens, 1, n)
    return moe_prefill(x, *stack, ids, n=n, group_size=group_size, out=out, fast=fast).view(tokens, n)
