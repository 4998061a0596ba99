"""The kernel: one program multiplies a 64-row tile of one expert with a block of its tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from .body import tile_product


@triton.jit
def _width(
    codes, meta, x, sums, pair_ptr, row_pairs, lead, tile, part_tiles, split, rows, k, k_padded, BITS: tl.constexpr,
    KW: tl.constexpr, PLANE: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr,
    PARTS: tl.constexpr, SPLITS: tl.constexpr, MODE: tl.constexpr, PREFETCH: tl.constexpr,
    RUN: tl.constexpr,
):
    """tile_product for one width: where the tile lies and which spans are this split's."""
    NWORDS: tl.constexpr = 3 if BITS == 3 else (2 if BITS == 8 else 1)
    FIELDS: tl.constexpr = 4 if BITS == 4 or BITS == 8 else (8 if BITS == 2 else 16)
    spans = tl.cdiv(k, 2 * KW * FIELDS)
    groups = k // GROUP
    tile_words = spans * (NWORDS * 64 * KW)
    # whole steps of the loop, so that only the last split's warps can run past the matrix
    share = tl.cdiv(spans, SPLITS * (WARPS // PARTS)) * (WARPS // PARTS)
    spans_from = split * share
    spans_to = tl.minimum(spans_from + share, spans)
    if MODE == 2:
        x += PLANE * tl.cast(rows, tl.int64) * k_padded
    codes += tile.to(tl.int64) * tile_words
    meta += tile.to(tl.int64) * groups * 64
    # halves of the rows, one after the other, where all 64 would not fit the registers
    ROWS: tl.constexpr = 32 if BITS == 3 or COLUMNS > 8 else 64
    acc = tile_product(
        codes, meta, x, sums, pair_ptr, row_pairs, lead, spans_from, spans_to, spans, part_tiles * tile_words,
        part_tiles * groups * 64, groups - 1, k_padded, ROWS, BITS, KW, GROUP, COLUMNS, WARPS, PARTS, MODE,
        PREFETCH and NWORDS == 1, RUN,
    )
    if ROWS == 32:
        high = tile_product(
            codes + 32 * KW, meta + 32, x, sums, pair_ptr, row_pairs, lead, spans_from, spans_to, spans,
            part_tiles * tile_words, part_tiles * groups * 64, groups - 1, k_padded, ROWS, BITS, KW, GROUP, COLUMNS,
            WARPS, PARTS, MODE, PREFETCH and NWORDS == 1, RUN,
        )
        acc = tl.reshape(tl.permute(tl.join(acc, high), (0, 3, 1, 2)), (WARPS, 64, COLUMNS))
    return acc


@triton.jit
def moe_kernel(
    x_ptr, sums_ptr, inverse_ptr, codes_ptr, meta_ptr, bits_ptr, offsets_ptr, meta_offsets_ptr, expert_ptr, pairs_ptr,
    out_ptr, experts, rows, pairs, row_pairs, n, k, k_padded, KW1: tl.constexpr, KW2: tl.constexpr,
    KW3: tl.constexpr, KW4: tl.constexpr, KW8: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    WARPS: tl.constexpr, PARTS: tl.constexpr, SPLITS: tl.constexpr, MODE: tl.constexpr, PREFETCH: tl.constexpr,
    RUN: tl.constexpr, ONLY: tl.constexpr = -1,
):
    """``out [SPLITS, pairs, n]``, every element written once.

    Grid ``(blocks, tiles of 64 of the n rows, SPLITS)``: blocks of one expert are neighbours and share its weights in
    the L2. ``x [planes, rows, k_padded]`` as activations.normalize makes it, ``row_pairs`` pairs sharing a row.
    PARTS 2: the matrix has 2 n rows, gate then up, and the result is ``silu(gate) * up``. ``ONLY`` compiles a single
    width, for reports.
    """
    block = tl.program_id(0)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    expert = tl.load(expert_ptr + block)
    if expert < 0:
        return
    bits = 0
    codes = codes_ptr
    meta = meta_ptr
    if expert < experts:
        bits = tl.load(bits_ptr + expert)
        codes += tl.multiple_of(tl.load(offsets_ptr + expert) // 4, 16)
        meta += tl.multiple_of(tl.load(meta_offsets_ptr + expert) // 2, 16)

    block_pairs = pairs_ptr + block.to(tl.int64) * COLUMNS
    lead = tl.load(block_pairs)
    part_tiles = n // 64
    acc = tl.zeros([WARPS, 64, COLUMNS], tl.float32)
    if bits == 1 and (ONLY == -1 or ONLY == 1):
        acc = _width(
            codes, meta, x_ptr, sums_ptr, block_pairs, row_pairs, lead, tile, part_tiles, split, rows, k, k_padded,
            1, KW1, 0, GROUP, COLUMNS, WARPS, PARTS, SPLITS, MODE,
            PREFETCH, RUN,
        )
    elif bits == 2 and (ONLY == -1 or ONLY == 2):
        acc = _width(
            codes, meta, x_ptr, sums_ptr, block_pairs, row_pairs, lead, tile, part_tiles, split, rows, k, k_padded,
            2, KW2, 1, GROUP, COLUMNS, WARPS, PARTS, SPLITS, MODE,
            PREFETCH, RUN,
        )
    elif bits == 3 and (ONLY == -1 or ONLY == 3):
        acc = _width(
            codes, meta, x_ptr, sums_ptr, block_pairs, row_pairs, lead, tile, part_tiles, split, rows, k, k_padded,
            3, KW3, 2, GROUP, COLUMNS, WARPS, PARTS, SPLITS, MODE,
            PREFETCH, RUN,
        )
    elif bits == 4 and (ONLY == -1 or ONLY == 4):
        acc = _width(
            codes, meta, x_ptr, sums_ptr, block_pairs, row_pairs, lead, tile, part_tiles, split, rows, k, k_padded,
            4, KW4, 3, GROUP, COLUMNS, WARPS, PARTS, SPLITS, MODE,
            PREFETCH, RUN,
        )
    elif bits > 4 and (ONLY == -1 or ONLY == 8):
        acc = _width(
            codes, meta, x_ptr, sums_ptr, block_pairs, row_pairs, lead, tile, part_tiles, split, rows, k, k_padded,
            8, KW8, 4, GROUP, COLUMNS, WARPS, PARTS, SPLITS, MODE,
            PREFETCH, RUN,
        )

    column = tl.arange(0, COLUMNS)
    pair = tl.load(block_pairs + column)
    inverse = tl.load(inverse_ptr + tl.where(pair < 0, lead, pair) // row_pairs)
    if MODE == 0:
        unit = 1.0
    else:
        unit = 16777216.0
    KWARPS: tl.constexpr = WARPS // PARTS
    if PARTS == 2:
        both = tl.sum(tl.reshape(acc, (2, KWARPS, 64, COLUMNS)), 1)
        gate, up = tl.split(tl.permute(both, (1, 2, 0)))
        gate = gate * unit * inverse[None, :]
        up = up * unit * inverse[None, :]
        result = gate / (1.0 + tl.exp(-gate)) * up
    else:
        result = tl.sum(acc, 0) * unit * inverse[None, :]
    # a column that repeats the first pair, or an expert of width 0, whose NaN and infinity are not its own
    result = tl.where(bits == 0, 0.0, result)
    row = tile * 64 + tl.arange(0, 64)
    at = (split.to(tl.int64) * pairs + pair[None, :]) * n + row[:, None]
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), (pair[None, :] >= 0) & (row[:, None] < n))
