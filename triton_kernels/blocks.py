"""Blocks: pairs of (token, slot) that share an expert, in static sizes, so that no grid depends on the routing.

``block_expert int32 [B]`` is the expert of a block, ``E`` for pairs without one (their output is zero), -1 for a block
that is not used; ``block_pairs int32 [B, columns]`` the flat indices ``token * top_k + slot``, -1 where there is none::

    ids of 4 pairs, 2 columns        block_expert   0        1        E=3      -1 ..
    [1, 0, 7, 1]              ->     block_pairs    [1, -1]  [0, 3]   [2, -1]  [-1, -1] ..
"""

from __future__ import annotations

import triton
import triton.language as tl


def block_count(pairs: int, experts: int, columns: int) -> int:
    """Blocks that any routing of ``pairs`` pairs fits in."""
    return min(pairs, pairs // columns + experts + 1)


@triton.jit
def expert_of(ids_ptr, i, pairs, experts):
    """int32 experts of pairs ``i``: ``experts`` for an id out of range, -1 past the last pair."""
    ids = tl.load(ids_ptr + i, i < pairs, other=0).to(tl.int64)
    ids = tl.where((ids < 0) | (ids >= experts), experts, ids).to(tl.int32)
    return tl.where(i < pairs, ids, -1)
