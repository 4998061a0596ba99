"""Which (token, slot) pairs each program multiplies: blocks of pairs that share an expert, sizes static.

``block_expert [B]`` is the expert of a block, ``E`` for pairs without one (their output is zero), -1 for a block that
is not used; ``block_pairs [B, columns]`` the flat indices ``token * top_k + slot``, -1 where there is none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# the routing kernel compares all pairs with all pairs; above this, sorting is cheaper
MOST_PAIRS = 128


def block_count(pairs: int, experts: int, columns: int) -> int:
    """Blocks that any routing of ``pairs`` pairs fits in."""
    return min(pairs, pairs // columns + experts + 1)


@triton.jit
def route_kernel(ids_ptr, expert_ptr, pairs_ptr, pairs, experts, BLOCKS, P: tl.constexpr, COLUMNS: tl.constexpr):
    """All pairs in one program: a pair's place among those of its expert, then its block, by counting."""
    i = tl.arange(0, P)
    ids = tl.load(ids_ptr + i, i < pairs, other=-1).to(tl.int64)
    ids = tl.where((ids < 0) | (ids >= experts), experts, ids).to(tl.int32)
    ids = tl.where(i < pairs, ids, -1)
    earlier = i[None, :] < i[:, None]
    same = ids[None, :] == ids[:, None]
    rank = tl.sum((same & earlier).to(tl.int32), 1)
    leads = ((rank % COLUMNS) == 0) & (i < pairs)
    order = tl.sum((earlier & leads[None, :]).to(tl.int32), 1)
    part = rank // COLUMNS
    mine = same & leads[None, :] & (part[None, :] == part[:, None])
    block = tl.sum(tl.where(mine, order[None, :], 0), 1)
    for b in range(0, BLOCKS, P):
        at = b + i
        tl.store(expert_ptr + at, tl.full([P], -1, tl.int32), at < BLOCKS)
        for c in tl.static_range(COLUMNS):
            tl.store(pairs_ptr + at * COLUMNS + c, tl.full([P], -1, tl.int32), at < BLOCKS)
    # the stores above and below reach the same addresses from different threads
    tl.debug_barrier()
    tl.store(expert_ptr + block, ids, leads)
    tl.store(pairs_ptr + block * COLUMNS + rank % COLUMNS, i, i < pairs)


def _route_by_sorting(ids: Tensor, experts: int, columns: int, blocks: int) -> tuple[Tensor, Tensor]:
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


def route(ids: Tensor, experts: int, columns: int) -> tuple[Tensor, Tensor]:
    """``(block_expert int32 [B], block_pairs int32 [B, columns])`` of flat ``ids``; no host sync."""
    pairs = ids.numel()
    blocks = block_count(pairs, experts, columns)
    if pairs > MOST_PAIRS:
        return _route_by_sorting(ids, experts, columns, blocks)
    block_expert = torch.empty(blocks, dtype=torch.int32, device=ids.device)
    block_pairs = torch.empty(blocks, columns, dtype=torch.int32, device=ids.device)
    padded = max(16, triton.next_power_of_2(pairs))
    route_kernel[(1,)](ids, block_expert, block_pairs, pairs, experts, blocks, P=padded, COLUMNS=columns, num_warps=4)
    return block_expert, block_pairs
