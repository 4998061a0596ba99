"""Unpack 64 columns of packed rows to float16 weights ``q * s + m`` in registers; both prefill methods use it.

A *step* is 64 columns, two halves of 32; a *trip* of the loop loads words once for as many steps of their span as
shared memory leaves room for. Lane ``4 * g + c`` of a warp owns columns ``8 * c .. 8 * c + 7`` of a half,
of rows that share ``g``: four int32 words, loaded as 16 bytes. In a tile with 16 words along K a half is one field;
with 8 words it is two, lanes 2 and 3 taking the second from the words of lanes 0 and 1.

A pair of weights costs three instructions: ``(w & mask) | 0x6400`` is ``1024 + q * 2**pos`` as float16, one FMA makes
``q`` of it, exactly, and one more ``q * s + m``, rounded once. Shifts and metadata are shared by many pairs.

``THREADS_FIRST`` says which axis of a load the compiler deals its threads out from (:mod:`.launch_parameters`); the
wrong one costs data movement, never correctness.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .layout import TILE_ROWS


class Span(NamedTuple):
    """One trip of a span, as each thread holds it."""

    # what trip_words loaded
    w0: tl.tensor
    w1: tl.tensor
    w2: tl.tensor
    # pointer at the lane's first four int32 of its row's codes, and the trip's first field
    codes: tl.tensor
    start: tl.tensor
    # 0 in lanes 0 and 1, 1 in lanes 2 and 3
    lane_field: tl.tensor
    # pointer at the row's first (s, m), and the last group
    meta: tl.tensor
    last_group: tl.tensor


@triton.jit
def threads(value, THREADS_FIRST: tl.constexpr):
    """A value per thread along its axis of a three-axis load."""
    return value[:, None, None] if THREADS_FIRST else value[None, :, None]


@triton.jit
def repeats(COUNT: tl.constexpr, THREADS_FIRST: tl.constexpr):
    """``0 .. COUNT`` along the axis of what each thread loads for itself."""
    i = tl.arange(0, COUNT)
    return i[None, :, None] if THREADS_FIRST else i[:, None, None]


@triton.jit
def _scale_and_minimum(at, FAST: tl.constexpr):
    """``(s, m)`` of int32 words that hold both as float16: as float32, or each twice in an int32 if FAST."""
    pair = tl.load(at)
    if FAST:
        s = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, 0x1010;", "=r,r", [pair], tl.int32, is_pure=True, pack=1)
        m = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, 0x3232;", "=r,r", [pair], tl.int32, is_pure=True, pack=1)
    else:
        s = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        m = ((pair >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return s, m


@triton.jit
def _weights(w, s, m, AT: tl.constexpr, BITS: tl.constexpr, FAST: tl.constexpr):
    """float16 ``[.., 2]`` of the codes at bit AT of the low and high half of every word."""
    if FAST:
        # the mantissa has 10 bits: fields above are brought down
        POS: tl.constexpr = AT if AT + BITS <= 10 else 0
        v = w >> (AT - POS)
        low, high = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 t;
            lop3.b32 t, $2, $3, 0x64006400, 0xEA;
            fma.rn.f16x2 t, t, $4, $5;
            fma.rn.f16x2 t, t, $6, $7;
            mov.b32 {$0, $1}, t;
            }
            """,
            "=h,=h,r,r,r,r,r,r",
            [v, ((1 << BITS) - 1) * 0x00010001 << POS, ((15 - POS) << 10) * 0x00010001,
             (0x8000 | ((25 - POS) << 10)) * 0x00010001, s, m],
            dtype=(tl.float16, tl.float16), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        MASK: tl.constexpr = (1 << BITS) - 1
        low = (((w >> AT) & MASK).to(tl.float32) * s + m).to(tl.float16)
        high = (((w >> (AT + 16)) & MASK).to(tl.float32) * s + m).to(tl.float16)
    return tl.join(low, high)


@triton.jit
def _spare(w0, w1, w2):
    """Field 15 of 3 bits, whose bits are the top ones of the halves of three words."""
    return ((w0 >> 15) & 0x00010001) | ((w1 >> 14) & 0x00020002) | ((w2 >> 13) & 0x00040004)


@triton.jit
def _three_bits(span, field, last, BLOCK: tl.constexpr):
    """Words whose lowest 3 bits of each half are the run-time ``field`` of a span; ``last``: one of them may be 15."""
    whole = tl.minimum(field // 5, 2)
    w = tl.load(span + whole * BLOCK)
    q = w >> (3 * (field - 5 * whole))
    if last:
        q = tl.where(field == 15, _spare(tl.load(span), tl.load(span + BLOCK), w), q)
    return q


@triton.jit
def trip_words(span, start, BITS: tl.constexpr, KW: tl.constexpr, TRIP: tl.constexpr, STEPS: tl.constexpr):
    """The words that ``TRIP`` of a span's ``STEPS`` steps share, the first field ``start`` (a multiple of BITS shifted)
    at bit 0; as many of the three as there are, the others repeat the first."""
    BLOCK: tl.constexpr = TILE_ROWS * KW
    if BITS == 8 and TRIP < STEPS:
        w0 = tl.load(span + start // 2 * BLOCK)
    else:
        w0 = tl.load(span)
    w1 = w0
    w2 = w0
    if BITS == 8 and TRIP == STEPS:
        w1 = tl.load(span + BLOCK)
    if BITS == 3 and TRIP == STEPS:
        w1 = tl.load(span + BLOCK)
        w2 = tl.load(span + 2 * BLOCK)
    if BITS < 8 and TRIP < STEPS:
        w0 = w0 >> (start * BITS)
    return w0, w1, w2


@triton.jit
def _codes(span, HALF: tl.constexpr, BITS: tl.constexpr, KW: tl.constexpr, WHOLE: tl.constexpr):
    """Words that hold the codes of a trip's half number HALF, at the bit that :func:`half_weights` says."""
    w0, w1, w2 = span.w0, span.w1, span.w2
    start, lane_field = span.start, span.lane_field
    PER_WORD: tl.constexpr = 16 // BITS
    if BITS == 3 and not WHOLE:
        if KW == 8:
            field = start + 2 * HALF + lane_field
            w = _three_bits(span.codes, field, start + 2 * HALF == 14, TILE_ROWS * KW)
        else:
            w = _three_bits(span.codes, start + HALF, start + HALF == 15, TILE_ROWS * KW)
    elif KW == 8:
        # lanes 2 and 3 take the next field
        FIRST: tl.constexpr = 2 * HALF
        if BITS == 3:
            a = (w0 if FIRST < 5 else (w1 if FIRST < 10 else w2)) >> (3 * (FIRST % 5))
            NEXT: tl.constexpr = FIRST + 1
            if NEXT == 15:
                b = _spare(w0, w1, w2)
            else:
                b = (w0 if NEXT < 5 else (w1 if NEXT < 10 else w2)) >> (3 * (NEXT % 5))
            w = tl.where(lane_field == 1, b, a)
        else:
            w = (w0 if FIRST < PER_WORD else w1) >> (FIRST % PER_WORD * BITS + lane_field * BITS)
    elif BITS == 3:
        if HALF == 15:
            w = _spare(w0, w1, w2)
        else:
            w = w0 if HALF < 5 else (w1 if HALF < 10 else w2)
    else:
        w = w0 if HALF < PER_WORD else w1
    return w


@triton.jit
def half_weights(
    span, group, HALF: tl.constexpr, BITS: tl.constexpr, KW: tl.constexpr, WHOLE: tl.constexpr, FAST: tl.constexpr
):
    """float16 ``[*span.codes.shape, 2]``: the 32 columns of a trip's half number HALF, in group ``group``.

    ``span`` is a :class:`Span`; WHOLE: a trip is all of it.
    """
    PER_WORD: tl.constexpr = 5 if BITS == 3 else 16 // BITS
    s, m = _scale_and_minimum(span.meta + tl.minimum(group, span.last_group) * TILE_ROWS, FAST)
    w = _codes(span, HALF, BITS, KW, WHOLE)
    if KW == 8 or (BITS == 3 and (not WHOLE or HALF == 15)):
        AT: tl.constexpr = 0
    else:
        AT: tl.constexpr = HALF % PER_WORD * BITS
    return _weights(w, s, m, AT, BITS, FAST)
