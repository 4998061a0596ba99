"""Multiply very many tokens an expert: experts are unpacked to float16 once, a few at a time, then multiplied as dense
ones."""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import HALF_STEP, K_LANES, ROW_LANES, STEP, TILE_ROWS, WARP, span_columns, span_words
from .prefill import gated, grouped_order
from .token_rows import leading_exponent, power_of_two
from .unpack import half_weights, repeats, threads, trip_words


@triton.jit
def _unpack_tile(
    codes, meta, out, tile, at_span, row, lane, k, stride, BITS: tl.constexpr, KW: tl.constexpr,
    GROUP: tl.constexpr, FAST: tl.constexpr,
):
    """A tile's span: every lane writes its 8 columns of a half as 16 bytes."""
    STEPS: tl.constexpr = span_columns(BITS, KW) // STEP
    spans = tl.cdiv(k, STEP * STEPS)
    groups = k // GROUP
    if at_span < spans:
        words = codes + (tile * spans + at_span) * span_words(BITS, KW) + row * KW + lane % (KW // 4) * 4
        words = words + tl.arange(0, 4)[None, None, :]
        pairs = meta + tile * (groups * TILE_ROWS) + row
        w0, w1, w2 = trip_words(words, 0, BITS, KW, STEPS, STEPS)
        row_at = (tile * TILE_ROWS + row).to(tl.int64) * stride
        for half in tl.static_range(2 * STEPS):
            column = at_span * (STEP * STEPS) + HALF_STEP * half
            f = half_weights(
                w0, w1, w2, words, 0, lane // 2, pairs, column // GROUP, groups - 1, half, BITS, KW, True, FAST
            )
            f = tl.reshape(f, (f.shape[0], f.shape[1], 8))
            at = column + lane * 8 + tl.arange(0, 8)[None, None, :]
            tl.store(out + row_at + at, f, (row >= 0) & (at < stride))


@triton.jit
def dequantize_kernel(
    codes_ptr, meta_ptr, bits_ptr, offsets_ptr, meta_offsets_ptr, counts_ptr, out_ptr, first, n_padded, k, stride,
    KW1: tl.constexpr, KW2: tl.constexpr, KW3: tl.constexpr, KW4: tl.constexpr, KW8: tl.constexpr,
    GROUP: tl.constexpr, FAST: tl.constexpr, THREADS_FIRST: tl.constexpr, WARPS: tl.constexpr, ONLY: tl.constexpr = -1,
):
    """``out [programs on axis 2, n_padded, stride]``: float16 weights of the experts from ``first`` that have tokens.

    Grid ``(spans of the narrowest width, tiles, experts)``.
    """
    tile = tl.program_id(1)
    slot = tl.program_id(2)
    expert = first + slot
    if tl.load(counts_ptr + expert) == 0:
        return
    bits = tl.load(bits_ptr + expert)
    codes = codes_ptr + tl.multiple_of(tl.load(offsets_ptr + expert) // 4, 16)
    meta = meta_ptr + tl.multiple_of(tl.load(meta_offsets_ptr + expert) // 2, 16)
    out = out_ptr + slot.to(tl.int64) * n_padded * stride
    at_span = tl.program_id(0)
    thread = tl.arange(0, WARP * WARPS)
    lane = threads(thread % K_LANES, THREADS_FIRST)
    AT_ONCE: tl.constexpr = ROW_LANES * WARPS
    row = threads(thread // K_LANES, THREADS_FIRST) + repeats(TILE_ROWS // AT_ONCE, THREADS_FIRST) * AT_ONCE
    if bits == 1 and (ONLY == -1 or ONLY == 1):
        _unpack_tile(codes, meta, out, tile, at_span, row, lane, k, stride, 1, KW1, GROUP, FAST)
    if bits == 2 and (ONLY == -1 or ONLY == 2):
        _unpack_tile(codes, meta, out, tile, at_span, row, lane, k, stride, 2, KW2, GROUP, FAST)
    if bits == 3 and (ONLY == -1 or ONLY == 3):
        _unpack_tile(codes, meta, out, tile, at_span, row, lane, k, stride, 3, KW3, GROUP, FAST)
    if bits == 4 and (ONLY == -1 or ONLY == 4):
        _unpack_tile(codes, meta, out, tile, at_span, row, lane, k, stride, 4, KW4, GROUP, FAST)
    if bits > 4 and (ONLY == -1 or ONLY == 8):
        _unpack_tile(codes, meta, out, tile, at_span, row, lane, k, stride, 8, KW8, GROUP, FAST)


@triton.jit
def grouped_kernel(
    x_ptr, inverse_ptr, weights_ptr, bits_ptr, expert_ptr, pairs_ptr, out_ptr, exponent_ptr, first, until, experts,
    blocks, row_pairs, n, n_padded, k, k_padded, stride, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """prefill.packed_kernel on ``weights [until - first, n_padded, stride]`` of the experts ``first`` to ``until``.

    Blocks of other experts are left alone; the call with the last experts writes the zeros of invalid ids.
    """
    OUTPUTS: tl.constexpr = ROWS // PARTS
    block, at_tile = grouped_order(blocks, tl.cdiv(n, OUTPUTS))
    expert = tl.load(expert_ptr + block)
    if expert < first:
        return
    if expert >= until and (expert < experts or until < experts):
        return
    bits = 0
    if expert < experts:
        bits = tl.load(bits_ptr + expert)
    block_pairs = pairs_ptr + block.to(tl.int64) * COLUMNS
    pair = tl.load(block_pairs + tl.arange(0, COLUMNS))
    source = (tl.where(pair < 0, tl.load(block_pairs), pair) // row_pairs).to(tl.int64)
    x = x_ptr + (source * k_padded)[:, None] + tl.arange(0, STEP)[None, :]
    r = tl.arange(0, ROWS)
    if PARTS == 2:
        # gate and up rows in turns of 8, so that a thread has both
        row = at_tile * OUTPUTS + r // (2 * ROW_LANES) * ROW_LANES + r % ROW_LANES
        row = tl.minimum(row, n - 1) + r // ROW_LANES % 2 * n
    else:
        row = tl.minimum(at_tile * OUTPUTS + r, n - 1)
    slot = tl.maximum(tl.minimum(expert, until - 1) - first, 0).to(tl.int64)
    w = weights_ptr + slot * n_padded * stride + (row.to(tl.int64) * stride)[None, :] + tl.arange(0, STEP)[:, None]
    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    steps = tl.cdiv(k, STEP)
    if bits == 0:
        steps = 0
    for step in tl.range(0, steps, num_stages=STAGES):
        acc = tl.dot(tl.load(x + step * STEP), tl.load(w + step * STEP), acc)
    acc = acc * tl.load(inverse_ptr + source)[:, None]
    acc = tl.where(bits == 0, 0.0, acc)

    out_row = at_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    at = pair.to(tl.int64)[:, None] * n + out_row[None, :]
    inside = (pair[:, None] >= 0) & (out_row[None, :] < n)
    if PARTS == 2:
        gate, up = tl.split(tl.permute(tl.reshape(acc, (COLUMNS, ROWS // (2 * ROW_LANES), 2, ROW_LANES)), (0, 1, 3, 2)))
        result = tl.reshape(gated(gate, up), (COLUMNS, OUTPUTS))
        exponent = leading_exponent(tl.max(result.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
        tl.store(exponent_ptr + pair.to(tl.int64) * tl.cdiv(n, OUTPUTS) + at_tile, exponent, pair >= 0)
        result = result * power_of_two(14 - exponent)[:, None]
    else:
        result = acc
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), inside)
