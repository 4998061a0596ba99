"""Assign many (token, slot) pairs to blocks (:mod:`.blocks`), sorted by expert: two launches, no host sync."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_count, expert_of


@triton.jit
def count_kernel(ids_ptr, counts_ptr, pairs, experts, CHUNK: tl.constexpr):
    """One program an expert, and one for invalid ids: ``counts [experts + 1]``."""
    expert = tl.program_id(0)
    total = tl.zeros([CHUNK], tl.int32)
    for at in range(0, pairs, CHUNK):
        total += (expert_of(ids_ptr, at + tl.arange(0, CHUNK), pairs, experts) == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(total, 0))


@triton.jit
def place_kernel(
    ids_ptr, counts_ptr, expert_ptr, pairs_ptr, pairs, experts, blocks, EXPERTS: tl.constexpr, COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program an expert: its pairs, in their order, into the blocks that follow those of the experts before.

    The program of invalid ids also marks the blocks that remain.
    """
    expert = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    needed = (tl.load(counts_ptr + e, e <= experts, other=0) + COLUMNS - 1) // COLUMNS
    first = tl.sum(tl.where(e < expert, needed, 0), 0)
    count = tl.load(counts_ptr + expert)
    last = first + (count + COLUMNS - 1) // COLUMNS
    i = tl.arange(0, CHUNK)
    done = 0
    for at in range(0, pairs, CHUNK):
        mine = expert_of(ids_ptr, at + i, pairs, experts) == expert
        rank = done + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(pairs_ptr + first * COLUMNS + rank, at + i, mine)
        done += tl.sum(mine.to(tl.int32), 0)
    end = last
    if expert == experts:
        end = blocks
    for at in range(first * COLUMNS + count, end * COLUMNS, CHUNK):
        tl.store(pairs_ptr + at + i, tl.full([CHUNK], -1, tl.int32), at + i < end * COLUMNS)
    for at in range(first, end, CHUNK):
        tl.store(expert_ptr + at + i, tl.where(at + i < last, expert, -1), at + i < end)


def sort_pairs(ids: Tensor, experts: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(block_expert, block_pairs, counts int32 [experts + 1])`` of flat, contiguous ``ids``."""
    pairs = ids.numel()
    blocks = block_count(pairs, experts, columns)
    counts = torch.empty(experts + 1, dtype=torch.int32, device=ids.device)
    block_expert = torch.empty(blocks, dtype=torch.int32, device=ids.device)
    block_pairs = torch.empty(blocks, columns, dtype=torch.int32, device=ids.device)
    chunk = min(4096, max(128, triton.next_power_of_2(pairs)))
    count_kernel[(experts + 1,)](ids, counts, pairs, experts, CHUNK=chunk, num_warps=8)
    place_kernel[(experts + 1,)](
        ids, counts, block_expert, block_pairs, pairs, experts, blocks, EXPERTS=triton.next_power_of_2(experts + 1),
        COLUMNS=columns, CHUNK=chunk, num_warps=8,
    )
    return block_expert, block_pairs, counts
