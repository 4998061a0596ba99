"""Compute routing from router logits in one launch: scores, the ``top_k`` largest, their weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# one warp a row of up to 128 experts
ROWS = 4


@triton.jit
def topk_kernel(
    logits_ptr, bias_ptr, weights_ptr, ids_ptr, tokens, experts, stride, scale, TOP_K: tl.constexpr, E: tl.constexpr,
    SLOTS: tl.constexpr, SIGMOID: tl.constexpr, NORMALIZE: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr,
):
    """``weights float32, ids int32 [tokens, TOP_K]`` of ``logits [tokens, experts]``, largest first, ties by index."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, E)
    inside = (row[:, None] < tokens) & (e[None, :] < experts)
    at = row.to(tl.int64)[:, None] * stride + e[None, :]
    logits = tl.load(logits_ptr + at, inside, other=0.0).to(tl.float32)
    logits = tl.where(e[None, :] < experts, logits, float("-inf"))
    if SIGMOID:
        score = 1.0 / (1.0 + tl.exp(-logits))
    else:
        shifted = tl.exp(logits - tl.max(logits, 1)[:, None])
        score = shifted / tl.sum(shifted, 1)[:, None]
    choice = score
    if BIASED:
        choice = score + tl.load(bias_ptr + e, e < experts, other=0.0).to(tl.float32)[None, :]
    # NaN is chosen first, as torch.topk does, so that it reaches the output; padding never is
    choice = tl.where(choice != choice, float("inf"), choice)
    choice = tl.where(e[None, :] < experts, choice, float("-inf"))
    left = e[None, :] < experts
    slot = tl.arange(0, SLOTS)
    weights = tl.zeros([ROWS, SLOTS], tl.float32)
    ids = tl.zeros([ROWS, SLOTS], tl.int32)
    for j in tl.static_range(TOP_K):
        best = tl.max(tl.where(left, choice, float("-inf")), 1)
        index = tl.min(tl.where(left & (choice == best[:, None]), e[None, :], E), 1)
        chosen = e[None, :] == index[:, None]
        left = left & (e[None, :] != index[:, None])
        weight = tl.sum(tl.where(chosen, score, 0.0), 1)
        weights = tl.where(slot[None, :] == j, weight[:, None], weights)
        ids = tl.where(slot[None, :] == j, index[:, None], ids)
    if NORMALIZE:
        weights = weights / tl.sum(weights, 1)[:, None]
    at = row[:, None] * TOP_K + slot[None, :]
    mine = (row[:, None] < tokens) & (slot[None, :] < TOP_K)
    tl.store(weights_ptr + at, weights * scale, mine)
    tl.store(ids_ptr + at, ids, mine)


def topk(
    logits: Tensor, top_k: int, *, sigmoid: bool = False, normalize: bool = True, scale: float = 1.0,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(weights float32 [T, top_k], ids int32 [T, top_k])`` of ``logits [T, E]``; see ``gemq.ops.topk_routing``."""
    tokens, experts = logits.shape
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    ids = torch.empty(tokens, top_k, dtype=torch.int32, device=logits.device)
    if tokens:
        topk_kernel[(triton.cdiv(tokens, ROWS),)](
            logits, logits if bias is None else bias, weights, ids, tokens, experts, logits.stride(0), float(scale),
            TOP_K=top_k, E=max(16, triton.next_power_of_2(experts)), SLOTS=triton.next_power_of_2(top_k),
            SIGMOID=sigmoid, NORMALIZE=normalize, BIASED=bias is not None, ROWS=ROWS, num_warps=4,
        )
    return weights, ids
