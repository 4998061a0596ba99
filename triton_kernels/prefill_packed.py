"""Multiply many tokens by packed experts; weights are unpacked in registers on their way to the tensor cores.

One program multiplies ``rows`` rows of an expert with ``columns`` of its tokens. The weights are the left operand,
from registers (wgmma on sm_90); the activations, in the column order of :func:`.prefill_inputs.column`, come to shared
memory by asynchronous copies, and so do the packed words and their (s, m), ``stages`` trips ahead.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .activation import gated_by, relu_squared
from .layout import HALF_STEP, K_LANES, ROW_LANES, STEP, TILE_ROWS, WARP, span_columns, span_words
from .prefill_inputs import leading_exponent, power_of_two
from .prefill_unpack import Span, half_weights, repeats, threads, trip_words
from .widths import at_width


@triton.jit
def grouped_order(blocks, tiles, TOGETHER: tl.constexpr = 16):
    """``(block, tile)`` of a program: TOGETHER blocks run side by side through all tiles, which the L2 then serves."""
    program = tl.program_id(0)
    group = program // (TOGETHER * tiles)
    size = tl.minimum(blocks - group * TOGETHER, TOGETHER)
    within = program - group * (TOGETHER * tiles)
    return group * TOGETHER + within % size, within // size


@triton.jit
def gated(gate, up, GATING: tl.constexpr):
    """``silu(gate) * up`` without an exponential that overflows, or what ``GATING`` says."""
    if GATING is not None:
        return gated_by(gate, up, GATING)
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


class Product(NamedTuple):
    """Run-time values of one program's product; ``tile``, ``row`` and ``lane`` say which row each thread loads."""

    codes: tl.tensor
    meta: tl.tensor
    # pointers at the first step's activations [STEP, columns]
    x: tl.tensor
    tile: tl.tensor
    row: tl.tensor
    lane: tl.tensor
    k: tl.tensor


@triton.jit
def _product(work, BITS: tl.constexpr, KW: tl.constexpr, HOW: tl.constexpr):
    """float32 ``[rows, columns]`` of a :class:`Product` at one width."""
    GROUP: tl.constexpr = HOW.group
    ROOM: tl.constexpr = HOW.room
    k = work.k
    STEPS: tl.constexpr = span_columns(BITS, KW) // STEP
    SPAN: tl.constexpr = span_words(BITS, KW)
    # three words that share a bit are worth a whole span at a time, with fewer of them on their way
    WHOLE: tl.constexpr = STEPS <= ROOM or (BITS == 3 and STEPS * HOW.columns <= 256)
    TRIP: tl.constexpr = STEPS if WHOLE else ROOM
    TRIPS: tl.constexpr = STEPS // TRIP
    AHEAD: tl.constexpr = 2 if BITS == 3 and STEPS > ROOM else HOW.stages
    spans = tl.cdiv(k, STEP * STEPS)
    groups = k // GROUP
    words = work.codes + (work.tile * (spans * SPAN) + work.row * KW + work.lane % (KW // 4) * 4)
    words = words + tl.arange(0, 4)[None, None, :]
    pairs = work.meta + (work.tile * (groups * TILE_ROWS) + work.row)
    lane_field = work.lane // 2
    # names of their own: triton 3.7 hands a field of a tuple on as an int, which no jitted function takes
    ROWS: tl.constexpr = HOW.rows
    COLUMNS: tl.constexpr = HOW.columns
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for trip in tl.range(0, tl.cdiv(k, STEP * TRIP), num_stages=AHEAD):
        span = words + (trip // TRIPS) * SPAN
        start = (trip % TRIPS) * (TRIP * STEP // (2 * KW))
        w0, w1, w2 = trip_words(span, start, BITS, KW, TRIP, STEPS)
        trip_span = Span(w0, w1, w2, span, start, lane_field, pairs, groups - 1)
        for j in tl.static_range(TRIP):
            b = tl.load(work.x + (trip * TRIP + j) * STEP)
            if TRIP * STEP % GROUP == 0:
                group = trip * (TRIP * STEP // GROUP) + j * STEP // GROUP
            else:
                group = trip * TRIP * STEP // GROUP
            next_group = group + 1 if GROUP == HALF_STEP else group
            f0 = half_weights(trip_span, group, 2 * j, BITS, KW, TRIPS == 1, HOW.fast)
            f1 = half_weights(trip_span, next_group, 2 * j + 1, BITS, KW, TRIPS == 1, HOW.fast)
            acc = tl.dot(_operand(f0, f1, HOW.rows, HOW.warps, HOW.threads_first), b, acc)
    return acc


@triton.jit
def packed_kernel(
    x_ptr, inverse_ptr, codes_ptr, meta_ptr, bits_ptr, offsets_ptr, meta_offsets_ptr, expert_ptr, pairs_ptr,
    out_ptr, exponent_ptr, experts, blocks, sharing, n, k, k_padded, HOW: tl.constexpr, bias_ptr=None,
    GATING: tl.constexpr = None, SQUARED: tl.constexpr = False,
):
    """``out [pairs, n]``, every element written once; grid of ``blocks * cdiv(n, rows / parts)`` programs.

    ``x`` float16 ``[inputs, k_padded]`` and ``inverse [inputs]`` as prefill_inputs.normalize makes them, ``sharing``
    pairs share an input. ``HOW`` is a :class:`.widths.Packed`. Two parts: the matrix has 2 n rows, gate then up, and
    the result is ``silu(gate) * up``, as float16 scaled by ``2**(14 - exponent)`` with an ``exponent
    [pairs, n / (rows / 2)]`` for each of a pair's blocks of rows; ``bias [experts, 2 n]`` is added first, if there is
    one, and ``GATING`` is another activation. One part and ``SQUARED``: ``relu(x)^2`` likewise, of a matrix and bias of
    ``n`` rows, with an exponent for every ``rows``.
    """
    ROWS: tl.constexpr = HOW.rows
    COLUMNS: tl.constexpr = HOW.columns
    PARTS: tl.constexpr = HOW.parts
    WARPS: tl.constexpr = HOW.warps
    THREADS_FIRST: tl.constexpr = HOW.threads_first
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
    source = (tl.where(pair < 0, tl.load(block_pairs), pair) // sharing).to(tl.int64)
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

    work = Product(codes, meta, x, tile, row, lane, k)
    acc = at_width(_product, bits, tl.zeros([ROWS, COLUMNS], tl.float32), work, HOW)
    acc = acc * tl.load(inverse_ptr + source)[None, :]
    # a column that repeats the first pair, or an expert of width 0, whose NaN and infinity are not its own
    acc = tl.where(bits == 0, 0.0, acc)

    out_row = first + tl.arange(0, OUTPUTS)
    at = pair.to(tl.int64)[None, :] * n + out_row[:, None]
    inside = (pair[None, :] >= 0) & (out_row[:, None] < n)
    if PARTS == 2:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (ROWS // (2 * ROW_LANES), 2, ROW_LANES, COLUMNS)), (0, 2, 3, 1)))
        if bias_ptr is not None:
            at_bias = bias_ptr + expert.to(tl.int64) * 2 * n + out_row
            if bits > 0:
                gate_bias = tl.load(at_bias, out_row < n, other=0.0)
                up_bias = tl.load(at_bias + n, out_row < n, other=0.0)
                gate += tl.reshape(gate_bias, (OUTPUTS // ROW_LANES, ROW_LANES))[:, :, None]
                up += tl.reshape(up_bias, (OUTPUTS // ROW_LANES, ROW_LANES))[:, :, None]
        result = tl.reshape(gated(gate, up, GATING), (OUTPUTS, COLUMNS))
    elif SQUARED:
        if bias_ptr is not None:  # noqa: SIM102 the outer condition is decided when compiling
            if bits > 0:
                acc += tl.load(bias_ptr + expert.to(tl.int64) * n + out_row, out_row < n, other=0.0)[:, None]
        # rows beyond the last repeat others or are padding: no part of the exponent
        result = tl.where(out_row[:, None] < n, relu_squared(acc), 0.0)
    else:
        result = acc
    if PARTS == 2 or SQUARED:
        exponent = leading_exponent(tl.max(result.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0))
        tl.store(exponent_ptr + pair.to(tl.int64) * tl.cdiv(n, OUTPUTS) + at_tile, exponent, pair >= 0)
        result = result * power_of_two(14 - exponent)[None, :]
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), inside)
