"""Multiply very many tokens an expert: experts are unpacked to float16 once, a few at a time, then multiplied as dense
ones."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .activation import relu_squared
from .layout import HALF_STEP, K_LANES, ROW_LANES, STEP, TILE_ROWS, WARP, span_columns, span_words
from .prefill_inputs import leading_exponent, power_of_two
from .prefill_packed import gated, grouped_order
from .prefill_unpack import Span, half_weights, repeats, threads, trip_words
from .widths import at_width


class Target(NamedTuple):
    """Run-time values of unpacking one span of a tile; ``row`` and ``lane`` say which row each thread loads."""

    codes: tl.tensor
    meta: tl.tensor
    # float16 rows, stride apart
    out: tl.tensor
    stride: tl.tensor
    tile: tl.tensor
    span: tl.tensor
    row: tl.tensor
    lane: tl.tensor
    k: tl.tensor


@triton.jit
def _unpack_tile(work, BITS: tl.constexpr, KW: tl.constexpr, HOW: tl.constexpr):
    """Unpack a :class:`Target`: every lane writes its 8 columns of a half as 16 bytes. Returns 0."""
    STEPS: tl.constexpr = span_columns(BITS, KW) // STEP
    spans = tl.cdiv(work.k, STEP * STEPS)
    groups = work.k // HOW.group
    if work.span < spans:
        words = work.codes + (work.tile * spans + work.span) * span_words(BITS, KW) + work.row * KW
        words = words + work.lane % (KW // 4) * 4 + tl.arange(0, 4)[None, None, :]
        pairs = work.meta + work.tile * (groups * TILE_ROWS) + work.row
        w0, w1, w2 = trip_words(words, 0, BITS, KW, STEPS, STEPS)
        span = Span(w0, w1, w2, words, 0, work.lane // 2, pairs, groups - 1)
        row_at = (work.tile * TILE_ROWS + work.row).to(tl.int64) * work.stride
        for half in tl.static_range(2 * STEPS):
            column = work.span * (STEP * STEPS) + HALF_STEP * half
            f = half_weights(span, column // HOW.group, half, BITS, KW, True, HOW.fast)
            f = tl.reshape(f, (f.shape[0], f.shape[1], 8))
            at = column + work.lane * 8 + tl.arange(0, 8)[None, None, :]
            tl.store(work.out + row_at + at, f, (work.row >= 0) & (at < work.stride))
    return 0


@triton.jit
def dequantize_kernel(
    codes_ptr, meta_ptr, bits_ptr, offsets_ptr, meta_offsets_ptr, counts_ptr, out_ptr, first, n_padded, k, stride,
    HOW: tl.constexpr,
):
    """``out [programs on axis 2, n_padded, stride]``: float16 weights of the experts from ``first`` that have tokens.

    Grid ``(spans of the narrowest width, tiles, experts)``; ``HOW`` is a :class:`.widths.Unpacking`.
    """
    slot = tl.program_id(2)
    expert = first + slot
    if tl.load(counts_ptr + expert) == 0:
        return
    bits = tl.load(bits_ptr + expert)
    codes = codes_ptr + tl.multiple_of(tl.load(offsets_ptr + expert) // 4, 16)
    meta = meta_ptr + tl.multiple_of(tl.load(meta_offsets_ptr + expert) // 2, 16)
    out = out_ptr + slot.to(tl.int64) * n_padded * stride
    thread = tl.arange(0, WARP * HOW.warps)
    # rows that the warps load at once, of those of a tile
    AT_ONCE: tl.constexpr = ROW_LANES * HOW.warps
    row = threads(thread // K_LANES, HOW.threads_first) + repeats(TILE_ROWS // AT_ONCE, HOW.threads_first) * AT_ONCE
    lane = threads(thread % K_LANES, HOW.threads_first)
    work = Target(codes, meta, out, stride, tl.program_id(1), tl.program_id(0), row, lane, k)
    at_width(_unpack_tile, bits, 0, work, HOW)


@triton.jit
def grouped_kernel(
    x_ptr, inverse_ptr, weights_ptr, bits_ptr, expert_ptr, pairs_ptr, out_ptr, exponent_ptr, first, until, experts,
    blocks, sharing, n, n_padded, k, k_padded, stride, COLUMNS: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    STAGES: tl.constexpr, bias_ptr=None, GATING: tl.constexpr = None, SQUARED: tl.constexpr = False,
):
    """Multiply as the packed kernel does by ``weights [until - first, n_padded, stride]``, of experts from ``first``.

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
    source = (tl.where(pair < 0, tl.load(block_pairs), pair) // sharing).to(tl.int64)
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
        if bias_ptr is not None:
            at_bias = bias_ptr + expert.to(tl.int64) * 2 * n + out_row
            if bits > 0:
                gate_bias = tl.load(at_bias, out_row < n, other=0.0)
                up_bias = tl.load(at_bias + n, out_row < n, other=0.0)
                gate += tl.reshape(gate_bias, (OUTPUTS // ROW_LANES, ROW_LANES))[None, :, :]
                up += tl.reshape(up_bias, (OUTPUTS // ROW_LANES, ROW_LANES))[None, :, :]
        result = tl.reshape(gated(gate, up, GATING), (COLUMNS, OUTPUTS))
    elif SQUARED:
        if bias_ptr is not None:  # noqa: SIM102 the outer condition is decided when compiling
            if bits > 0:
                acc += tl.load(bias_ptr + expert.to(tl.int64) * n + out_row, out_row < n, other=0.0)[None, :]
        result = tl.where(out_row[None, :] < n, relu_squared(acc), 0.0)
    else:
        result = acc
    if PARTS == 2 or SQUARED:
        exponent = leading_exponent(tl.max(result.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1))
        tl.store(exponent_ptr + pair.to(tl.int64) * tl.cdiv(n, OUTPUTS) + at_tile, exponent, pair >= 0)
        result = result * power_of_two(14 - exponent)[:, None]
    tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), inside)
