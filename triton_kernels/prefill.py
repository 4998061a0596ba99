"""Multiply many tokens by packed experts; weights are unpacked in registers on their way to the tensor cores.

One program multiplies ``ROWS`` rows of an expert with ``COLUMNS`` of its tokens. The weights are the left operand,
from registers (wgmma on sm_90); the activations, in the column order of :func:`gemq.triton_kernels.token_rows.column`,
come to shared memory by asynchronous copies, and so do the packed words and their metadata, ``STAGES`` trips ahead.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import HALF_STEP, K_LANES, ROW_LANES, STEP, TILE_ROWS, WARP, span_columns, span_words
from .token_rows import leading_exponent, power_of_two
from .unpack import half_weights, repeats, threads, trip_words


@triton.jit
def grouped_order(blocks, tiles, TOGETHER: tl.constexpr = 16):
    """``(block, tile)`` of a program: TOGETHER blocks run side by side through all tiles, which the L2 then serves."""
    program = tl.program_id(0)
    group = program // (TOGETHER * tiles)
    size = tl.minimum(blocks - group * TOGETHER, TOGETHER)
    within = program - group * (TOGETHER * tiles)
    return group * TOGETHER + within % size, within // size


@triton.jit
def gated(gate, up):
    """``silu(gate) * up`` without an exponential that overflows."""
    small = tl.exp(-tl.abs(gate))
    return gate * (tl.where(gate < 0, small, 1.0) / (1.0 + small)) * up


@triton.jit
def _operand(f0, f1, ROWS: tl.constexpr, WARPS: tl.constexpr, THREADS_FIRST: tl.constexpr):
    """float16 ``[ROWS, STEP]`` of two halves: registers take the places that the tensor core reads, no data moves."""
    REP: tl.constexpr = ROWS // (2 * ROW_LANES * WARPS)
    both = tl.join(f0, f1)
    if THREADS_FIRST:
        both = tl.reshape(both, (WARPS, ROW_LANES, K_LANES, REP, 2, 2, 2, 2, 2))
        both = tl.permute(both, (3, 0, 4, 1, 8, 5, 6, 2, 7))
    else:
        both = tl.reshape(both, (REP, 2, WARPS, ROW_LANES, K_LANES, 2, 2, 2, 2))
        both = tl.permute(both, (0, 2, 1, 3, 8, 5, 6, 4, 7))
    return tl.reshape(both, (ROWS, STEP))


@triton.jit
def _product(
    codes, meta, x, tile, row, lane, k, BITS: tl.constexpr, KW: tl.constexpr, GROUP: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, ROOM: tl.constexpr,
    THREADS_FIRST: tl.constexpr,
):
    """float32 ``[ROWS, COLUMNS]`` at one width; ``tile``, ``row`` and ``lane`` say which row each thread loads."""
    STEPS: tl.constexpr = span_columns(BITS, KW) // STEP
    SPAN: tl.constexpr = span_words(BITS, KW)
    # three words that share a bit are worth a whole span at a time, with fewer of them on their way
    WHOLE: tl.constexpr = STEPS <= ROOM or (BITS == 3 and STEPS * COLUMNS <= 256)
    TRIP: tl.constexpr = STEPS if WHOLE else ROOM
    TRIPS: tl.constexpr = STEPS // TRIP
    AHEAD: tl.constexpr = 2 if BITS == 3 and STEPS > ROOM else STAGES
    spans = tl.cdiv(k, STEP * STEPS)
    groups = k // GROUP
    words = codes + (tile * (spans * SPAN) + row * KW + lane % (KW // 4) * 4)
    words = words + tl.arange(0, 4)[None, None, :]
    pairs = meta + (tile * (groups * TILE_ROWS) + row)
    lane_field = lane // 2
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for trip in tl.range(0, tl.cdiv(k, STEP * TRIP), num_stages=AHEAD):
        span = words + (trip // TRIPS) * SPAN
        start = (trip % TRIPS) * (TRIP * STEP // (2 * KW))
        w0, w1, w2 = trip_words(span, start, BITS, KW, TRIP, STEPS)
        for j in tl.static_range(TRIP):
            b = tl.load(x + (trip * TRIP + j) * STEP)
            if TRIP * STEP % GROUP == 0:
                group = trip * (TRIP * STEP // GROUP) + j * STEP // GROUP
            else:
                group = trip * TRIP * STEP // GROUP
            next_group = group + 1 if GROUP == HALF_STEP else group
            f0 = half_weights(
                w0, w1, w2, span, start, lane_field, pairs, group, groups - 1, 2 * j, BITS, KW, TRIPS == 1, FAST
            )
            f1 = half_weights(
                w0, w1, w2, span, start, lane_field, pairs, next_group, groups - 1, 2 * j + 1, BITS, KW, TRIPS == 1,
                FAST,
            )
            acc = tl.dot(_operand(f0, f1, ROWS, WARPS, THREADS_FIRST), b, acc)
    return acc


@triton.jit
def packed_kernel(
    x_ptr, inverse_ptr, codes_ptr, meta_ptr, bits_ptr, offsets_ptr, meta_offsets_ptr, expert_ptr, pairs_ptr,
    out_ptr, exponent_ptr, experts, blocks, row_pairs, n, k, k_padded, KW1: tl.constexpr, KW2: tl.constexpr,
    KW3: tl.constexpr, KW4: tl.constexpr, KW8: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
    ROOM: tl.constexpr, THREADS_FIRST: tl.constexpr, ONLY: tl.constexpr = -1,
):
    """``out [pairs, n]``, every element written once; grid of ``blocks * cdiv(n, ROWS / PARTS)`` programs.

    ``x`` float16 ``[rows, k_padded]`` and ``inverse [rows]`` as token_rows.normalize makes them, ``row_pairs`` pairs
    sharing a row. PARTS 2: the matrix has 2 n rows, gate then up, and the result is ``silu(gate) * up``, as float16
    scaled by ``2**(14 - exponent)`` with an ``exponent [pairs, n / (ROWS / 2)]`` for each of a pair's blocks of rows.
    A trip of the loop is ROOM steps of 64 columns. ``ONLY`` compiles a single width, for reports.
    """
    OUTPUTS: tl.constexpr = ROWS // PARTS
    block, at_tile = grouped_order(blocks, tl.cdiv(n, OUTPUTS))
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
    pair = tl.load(block_pairs + tl.arange(0, COLUMNS))
    # a column without a pair repeats the first one: the same cache lines, and no mask
    source = (tl.where(pair < 0, tl.load(block_pairs), pair) // row_pairs).to(tl.int64)
    x = x_ptr + (source * k_padded)[None, :] + tl.arange(0, STEP)[:, None]

    first = at_tile * OUTPUTS
    tiles = tl.cdiv(n, TILE_ROWS)
    thread = tl.arange(0, WARP * WARPS)
    lane = threads(thread % K_LANES, THREADS_FIRST)
    g = threads(thread // K_LANES % ROW_LANES, THREADS_FIRST)
    rep = repeats(ROWS // (ROW_LANES * WARPS), THREADS_FIRST)
    sixteen = rep // 2 * WARPS + threads(thread // WARP, THREADS_FIRST)
    if PARTS == 2:
        # row r of the product is 8 * (r // 16) + r % 8 of gate, if r // 8 is even, or of up: a thread has both
        row = first + sixteen * ROW_LANES + g
        tile = tl.minimum(row // TILE_ROWS, tiles - 1) + rep % 2 * tiles
    else:
        row = first + sixteen * (2 * ROW_LANES) + rep % 2 * ROW_LANES + g
        tile = tl.minimum(row // TILE_ROWS, tiles - 1)
    row = row % TILE_ROWS

    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if bits == 1 and (ONLY == -1 or ONLY == 1):
        acc = _product(
            codes, meta, x, tile, row, lane, k, 1, KW1, GROUP, FAST, ROWS, COLUMNS, WARPS, STAGES, ROOM,
            THREADS_FIRST,
        )
    if bits == 2 and (ONLY == -1 or ONLY == 2):
        acc = _product(
            codes, meta, x, tile, row, lane, k, 2, KW2, GROUP, FAST, ROWS, COLUMNS, WARPS, STAGES, ROOM,
            THREADS_FIRST,
        )
    if bits == 3 and (ONLY == -1 or ONLY == 3):
        acc = _product(
            codes, meta, x, tile, row, lane, k, 3, KW3, GROUP, FAST, ROWS, COLUMNS, WARPS, STAGES, ROOM,
            THREADS_FIRST,
        )
    if bits == 4 and (ONLY == -1 or ONLY == 4):
        acc = _product(
            codes, meta, x, tile, row, lane, k, 4, KW4, GROUP, FAST, ROWS, COLUMNS, WARPS, STAGES, ROOM,
            THREADS_FIRST,
        )
    if bits > 4 and (ONLY == -1 or ONLY == 8):
        acc = _product(
            codes, meta, x, tile, row, lane, k, 8, KW8, GROUP, FAST, ROWS, COLUMNS, WARPS, STAGES, ROOM,
            THREADS_FIRST,
        )
    acc = acc * tl.load(inverse_ptr + source)[None, :]
    # a column that repeats the first pair, or an expert of width 0, whose NaN and infinity are not its own
    acc = tl.where(bits == 0, 0.0, acc)

    out_row = first + tl.arange(0, OUTPUTS)
    at = pair.to(tl.int64)[None, :] * n + out_row[:, None]
    inside = (pair[None, :] >= 0) & (out_row[:, None] < n)
    if PARTS == 2:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (ROWS // (2 * ROW_LANES), 2, ROW_LANES, COLUMNS)), (0, 2, 3, 1)))
        result = tl.reshape(gated(gate, up), (OUTPUTS, COLUMNS))
        exponent = leading_exponent(tl.max(result.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))
        tl.store(exponent_ptr + pair.to(tl.int64) * tl.cdiv(n, OUTPUTS) + at_tile, exponent, pair >= 0)
        result = result * power_of_two(14 - exponent)[None, :]
    else:
        result = acc
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), inside)
