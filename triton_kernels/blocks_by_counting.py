"""Assign a few (token, slot) pairs to blocks (:mod:`.blocks`): one program compares all pairs with all."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import expert_of

# the routing kernel compares all pairs with all pairs; above this, sorting is cheaper
MOST_PAIRS = 128


@triton.jit
def route_pairs(
    ids_ptr, expert_ptr, pairs_ptr, used_ptr, pairs, experts, blocks, P: tl.constexpr, COLUMNS: tl.constexpr
):
    """Assign all pairs in one program: blocks in the order of experts, places by counting; ``used`` blocks have pairs.
    """
    CHUNK: tl.constexpr = 32 if P > 32 else P
    i = tl.arange(0, P)
    ids = expert_of(ids_ptr, i, pairs, experts)
    rank = tl.zeros([P], tl.int32)
    for first in range(0, P, CHUNK):
        j = first + tl.arange(0, CHUNK)
        same = expert_of(ids_ptr, j, pairs, experts)[None, :] == ids[:, None]
        rank += tl.sum((same & (j[None, :] < i[:, None])).to(tl.int32), 1)
    leads = ((rank % COLUMNS) == 0) & (i < pairs)
    # the pairs that open a block, by expert, for every thread to read; the tables' own memory holds them meanwhile
    tl.store(pairs_ptr + i, tl.where(leads, ids, experts + 1), i < pairs)
    tl.debug_barrier()
    block = rank // COLUMNS
    for first in range(0, P, CHUNK):
        j = first + tl.arange(0, CHUNK)
        opener = tl.load(pairs_ptr + j, j < pairs, other=experts + 1)
        block += tl.sum((opener[None, :] < ids[:, None]).to(tl.int32), 1)
    tl.debug_barrier()
    for b in range(0, blocks, P):
        tl.store(expert_ptr + b + i, tl.full([P], -1, tl.int32), b + i < blocks)
    for b in range(0, blocks * COLUMNS, P):
        tl.store(pairs_ptr + b + i, tl.full([P], -1, tl.int32), b + i < blocks * COLUMNS)
    # the stores above and below reach the same addresses from different threads
    tl.debug_barrier()
    tl.store(expert_ptr + block, ids, leads)
    tl.store(pairs_ptr + block * COLUMNS + rank % COLUMNS, i, i < pairs)
    tl.store(used_ptr, tl.sum(leads.to(tl.int32), 0))


def route_by_sorting(ids: Tensor, experts: int, columns: int, blocks: int) -> tuple[Tensor, Tensor]:
    """``(block_expert int32 [B], block_pairs int32 [B, columns])`` of flat ``ids``, by torch; no host sync."""
    pairs = ids.numel()
    ids = torch.where((ids < 0) | (ids >= experts), experts, ids).to(torch.int64)
    order = torch.sort(ids, stable=True).indices
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add(0, ids, torch.ones_like(ids))
    pairs_end = counts.cumsum(0)
    needed = (counts + columns - 1) // columns
    blocks_end = needed.cumsum(0)
    block = torch.arange(blocks, device=ids.device)
    expert = torch.searchsorted(blocks_end, block, right=True)
    e = expert.clamp(max=experts)
    place = (block - (blocks_end - needed)[e]) * columns
    place = place[:, None] + torch.arange(columns, device=ids.device)
    used = (expert <= experts)[:, None] & (place < counts[e][:, None])
    index = ((pairs_end - counts)[e][:, None] + place).clamp(0, pairs - 1)
    block_pairs = torch.where(used, order[index], -1)
    return torch.where(expert <= experts, expert, -1).to(torch.int32), block_pairs.to(torch.int32)
