"""One tile of a packed expert times a few token columns: the inner loop of every decode kernel.

Each of the warps multiplies spans of its own (the batch dimension of the dot), so a program needs no barrier before its
last sum. Everything is loaded in the places where the tensor core wants it, so that a thread reads 16 bytes at once and
the permutations that make matrices of it rename registers instead of moving data.

The word block of a span at 16 words along K, and the thread of a warp, ``lane = 4 * rl + c``, that loads each part::

                words 0..3   4..7    8..11   12..15        a thread holds, of its rows, the words 4 * c + v
                (c = 0)     (c = 1)  (c = 2)  (c = 3)       (VEC = KW / K_LANES = 4 of them, 16 bytes)
    row  0      lane  0     lane  1  lane  2  lane  3   |
    row  1      lane  4     lane  5  lane  6  lane  7   |  rl = 0 .. 7 (ROW_LANES), rh = 0
      :            :                            :       |
    row  7      lane 28     lane 29  lane 30  lane 31   |
    row  8      lane  0     lane  1     ..              |  rh = 1: the same lanes, eight rows on
      :
    row 63      lane 28        ..             lane 31      TILE_ROWS / ROW_LANES repeats of a load

    field f of word i, low half:   column f * FIELD + 2 * i       FIELD = 2 * KW columns
    field f of word i, high half:  column f * FIELD + 2 * i + 1   SPAN = FIELDS * FIELD columns

    codes:  span s, word block b, row r:  ((s * NWORDS + b) * TILE_ROWS + r) * KW + 4 * c      int32
    (s, m): group g, row r:               g * TILE_ROWS + r                                    int32

``run`` is how many int32 of a row the compiler's fragments keep together, a choice of its version
(:mod:`.launch_parameters`): the dot sees the columns in the order ``(v / run, c, v % run, half)``, and activations are
loaded in the same one. The versions where it is 2 also deal a load's threads out from the first axis, the others from
the last. A wrong one costs shuffles, never correctness.

Activations come normalised by group (:mod:`.decode_prepare`): fp16 times a power of two of each (column, group).

``mode`` 0 converts codes with plain arithmetic. 1 reads a field as an fp16 subnormal, ``q * 2**-24``. 2 also leaves
the field where it lies in the word, ``q * 2**(pos - 24)``, and expects activations scaled by ``2**-pos``. ``asm``
reinterprets 32 bits as two fp16 by one move; without it, by plain Triton, which the interpreter can run. ``ahead``
spans from now are fetched into the L2: registers hold one span a warp, and the compiler loads ``(s, m)`` late, so that
without it the latency of memory shows twice a span.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .layout import (
    K_LANES,
    LINE,
    ROW_LANES,
    ROWS,
    TILE_ROWS,
    WARP,
    fields,
    span_columns,
    span_words,
    width_index,
    word_blocks,
)  # fmt: skip


class Tokens(NamedTuple):
    """Normalised activations of a block's pairs, as :mod:`.decode_prepare` makes them."""

    # float16 [planes, inputs, k_padded], and float32 [inputs, groups, 2]: (sum, 1 / scale) of a group
    x: tl.tensor
    groups: tl.tensor
    # the pairs of the token columns, of which `sharing` share an input
    pairs: tl.tensor
    sharing: tl.tensor
    inputs: tl.tensor
    k: tl.tensor
    k_padded: tl.tensor


class Work(NamedTuple):
    """Run-time values of one program's product."""

    # int32 of the expert's first tile, and its (s, m), an int32 each
    codes: tl.tensor
    meta: tl.tensor
    tokens: Tokens
    # the first pair
    lead: tl.tensor
    # the first tile, and how many tiles further the other part begins
    tile: tl.tensor
    up_tiles: tl.tensor
    split: tl.tensor


class Tile(NamedTuple):
    """The first tile of a program, as it lies in memory at one width."""

    codes: tl.tensor
    meta: tl.tensor
    x: tl.tensor
    # int32 from a tile to the next, of codes and of (s, m)
    words: tl.tensor
    pairs: tl.tensor
    # spans of this split, of all there are
    first: tl.tensor
    end: tl.tensor
    spans: tl.tensor


@triton.constexpr_function
def rows_at_once(bits: int, columns: int) -> int:
    """Rows of a tile whose words and sums fit a warp's registers beside each other."""
    return min(ROWS, 32 if bits == 3 or columns > 8 else 64)


@triton.jit
def _as_fp16(q, ASM: tl.constexpr):
    """The low and high 16 bits of each int32, reinterpreted as fp16."""
    if ASM:
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [q], dtype=(tl.float16, tl.float16), is_pure=True, pack=1
        )
    else:
        low = (q & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        high = ((q >> 16) & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def _halves(q, MODE: tl.constexpr, ASM: tl.constexpr):
    """The low and high 16 bits of each int32 as fp16: reinterpreted, or converted from integers in MODE 0."""
    if MODE == 0:
        low = (q & 0xFFFF).to(tl.float16)
        high = ((q >> 16) & 0xFFFF).to(tl.float16)
    else:
        low, high = _as_fp16(q, ASM)
    return low, high


@triton.jit
def _field(w, AT: tl.constexpr, BITS: tl.constexpr, MODE: tl.constexpr):
    """Field ``AT`` of a word, in both halves of an int32, at bit ``pos`` of each (0 unless MODE is 2)."""
    MASK: tl.constexpr = ((1 << BITS) - 1) * 0x00010001
    if MODE == 2:
        # a subnormal has 10 bits: fields above are brought down by one shift that they share
        KEPT: tl.constexpr = 10 // BITS
        q = (w >> ((AT // KEPT) * KEPT * BITS)) & (MASK << ((AT % KEPT) * BITS))
    else:
        q = (w >> (AT * BITS)) & MASK
    return q


@triton.jit
def _threads(value, RUN: tl.constexpr):
    """A value per thread along its axis of a three-axis load, which is the one that the compiler deals out first."""
    return value[:, None, None] if RUN == 2 else value[None, :, None]


@triton.jit
def _repeats(count: tl.constexpr, RUN: tl.constexpr):
    """``0 .. count`` along the axis of what each thread loads for itself."""
    i = tl.arange(0, count)
    return i[None, :, None] if RUN == 2 else i[:, None, None]


@triton.jit
def _words(at, ROWS: tl.constexpr, KW: tl.constexpr, WARPS: tl.constexpr, RUN: tl.constexpr):
    """int32 ``[WARPS, ROWS, KW]`` of one word block."""
    RH: tl.constexpr = ROWS // ROW_LANES
    w = tl.load(at)
    if RUN == 2:
        w = tl.permute(tl.reshape(w, (WARPS, ROW_LANES, K_LANES, RH, KW // K_LANES // RUN, RUN)), (0, 3, 1, 4, 2, 5))
    else:
        w = tl.permute(tl.reshape(w, (RH, WARPS, ROW_LANES, K_LANES, KW // K_LANES // RUN, RUN)), (1, 0, 2, 4, 3, 5))
    return tl.reshape(w, (WARPS, ROWS, KW))


@triton.jit
def _columns(at, VEC: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, RUN: tl.constexpr):
    """fp16 ``[WARPS, 2 * K_LANES * VEC, COLUMNS]`` of activations."""
    CN: tl.constexpr = COLUMNS // ROW_LANES
    b = tl.load(at)
    if RUN == 2:
        b = tl.permute(tl.reshape(b, (WARPS, ROW_LANES, K_LANES, CN, VEC // RUN, 2 * RUN)), (0, 4, 2, 5, 3, 1))
    else:
        b = tl.permute(tl.reshape(b, (CN, WARPS, ROW_LANES, K_LANES, VEC // RUN, 2 * RUN)), (1, 4, 3, 5, 0, 2))
    return tl.reshape(b, (WARPS, 2 * K_LANES * VEC, COLUMNS))


@triton.jit
def _per_column(value, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, RUN: tl.constexpr):
    """``[WARPS, ROWS, COLUMNS]`` of a value per column, the same in every row."""
    CN: tl.constexpr = COLUMNS // ROW_LANES
    if RUN == 2:
        value = tl.permute(tl.reshape(value, (WARPS, ROW_LANES, K_LANES, CN, 2, 1)), (0, 5, 1, 3, 2, 4))
    else:
        value = tl.permute(tl.reshape(value, (CN, 2, WARPS, ROW_LANES, K_LANES, 1)), (2, 5, 3, 0, 4, 1))
    value = tl.broadcast_to(value, (WARPS, ROWS // ROW_LANES, ROW_LANES, CN, K_LANES, 2))
    return tl.reshape(value, (WARPS, ROWS, COLUMNS))


@triton.jit
def _fetch(at):
    """Bring the cache line of each pointer into the L2."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _fetch_span(tile, at_words, at_pairs, span, lane, ROWS: tl.constexpr, BITS: tl.constexpr, KW: tl.constexpr,
                GROUPS: tl.constexpr):  # fmt: skip
    """Prefetch what a warp will read of a span: 128 bytes a lane of the codes, and its (s, m)."""
    span = tl.minimum(span, tile.end - 1)
    # a word block holds the whole tile's rows, of which these are read
    LINES: tl.constexpr = ROWS * KW // LINE
    BLOCK: tl.constexpr = TILE_ROWS * KW
    NWORDS: tl.constexpr = word_blocks(BITS)
    for r in tl.static_range(0, NWORDS * LINES, WARP):
        line = tl.minimum(r + lane, NWORDS * LINES - 1)
        at = at_words + span * (NWORDS * BLOCK) + line // LINES * BLOCK + line % LINES * LINE
        _fetch(tile.codes + at)
    part = lane // GROUPS % (ROWS // LINE) * LINE
    _fetch(tile.meta + (at_pairs + span * (GROUPS * TILE_ROWS) + lane % GROUPS * TILE_ROWS + part))


@triton.jit
def input_of(pair_at, sharing, lead):
    """int64 inputs of pairs; a column without one repeats ``lead``: the same cache lines, no mask."""
    pair = tl.load(pair_at)
    return (tl.where(pair < 0, lead, pair) // sharing).to(tl.int64)


@triton.jit
def _per_row(value, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WARPS: tl.constexpr, RUN: tl.constexpr):
    """``[WARPS, ROWS, COLUMNS]`` of a value per row."""
    RH: tl.constexpr = ROWS // ROW_LANES
    if RUN == 2:
        value = tl.permute(tl.reshape(value, (WARPS, ROW_LANES, K_LANES, RH, 1, 1)), (0, 3, 1, 4, 2, 5))
    else:
        value = tl.permute(tl.reshape(value, (RH, WARPS, ROW_LANES, K_LANES, 1, 1)), (1, 0, 2, 4, 3, 5))
    value = tl.broadcast_to(value, (WARPS, RH, ROW_LANES, COLUMNS // ROW_LANES, K_LANES, 2))
    return tl.reshape(value, (WARPS, ROWS, COLUMNS))


@triton.jit
def _tile_product(work, tile, ROWS: tl.constexpr, BITS: tl.constexpr, KW: tl.constexpr, HOW: tl.constexpr):
    """float32 ``[warps, ROWS, columns]``: each warp's share of ``W @ x`` for the first ROWS of the rows of ``tile``.

    The warps are shared out over ``parts * tiles`` tiles: ``tiles`` neighbours, then, for 2 parts, the same
    ``work.up_tiles`` further (one expert stays below 2**31 words).
    """
    GROUP: tl.constexpr = HOW.group
    COLUMNS: tl.constexpr = HOW.columns
    WARPS: tl.constexpr = HOW.warps
    MODE: tl.constexpr = HOW.mode
    ASM: tl.constexpr = HOW.asm
    AHEAD: tl.constexpr = HOW.ahead if HOW.asm else 0
    RUN: tl.constexpr = HOW.run
    k_padded = work.tokens.k_padded
    sharing = work.tokens.sharing
    last_group = work.tokens.k // GROUP - 1
    FIELDS: tl.constexpr = fields(BITS)
    # fields of one word block, columns of a field and of a span, fields of a group of one (s, m)
    IN_WORD: tl.constexpr = 16 // BITS
    FIELD: tl.constexpr = 2 * KW
    SPAN: tl.constexpr = span_columns(BITS, KW)
    PER_GROUP: tl.constexpr = GROUP // FIELD
    # int32 of a row that a thread loads at once
    VEC: tl.constexpr = KW // K_LANES
    # warps that share a tile, each with spans of its own
    KWARPS: tl.constexpr = WARPS // (HOW.parts * HOW.tiles)
    # int32 from one word block of a span to the next
    BLOCK: tl.constexpr = TILE_ROWS * KW

    thread = tl.arange(0, WARP * WARPS)
    warp = thread // WARP
    rl = thread // K_LANES % ROW_LANES
    lane = thread % K_LANES
    part = warp // KWARPS
    own = part % HOW.tiles + part // HOW.tiles * work.up_tiles
    word = _threads(own * tile.words + rl * KW + lane * VEC, RUN) + _repeats(ROWS // ROW_LANES, RUN) * (ROW_LANES * KW)
    word = word + tl.arange(0, VEC)[None, None, :]
    pairs = tile.meta + (_threads(own * tile.pairs + rl, RUN) + _repeats(ROWS // ROW_LANES, RUN) * ROW_LANES)
    pair = work.tokens.pairs + (_threads(rl, RUN) + _repeats(COLUMNS // ROW_LANES, RUN) * ROW_LANES)
    x_row = input_of(pair, sharing, work.lead) * k_padded
    x_at = tile.x + x_row + (_threads(lane * (2 * VEC), RUN) + tl.arange(0, 2 * VEC)[None, None, :])

    # the repeats are (n, h) of columns 8 * n + 2 * c + h; an AND hides from the compiler that h is contiguous, for
    # which it would deal out the load's threads in another order than those of the loop
    repeat = _repeats(COLUMNS // K_LANES, RUN)
    pair = work.tokens.pairs + (_threads(lane * 2, RUN) + repeat // 2 * ROW_LANES + (repeat & 1))
    groups_at = work.tokens.groups + input_of(pair, sharing, work.lead) * (k_padded // GROUP * 2)
    groups_at = groups_at + tl.arange(0, 2)[None, None, :]

    acc = tl.zeros([WARPS, ROWS, COLUMNS], tl.float32)
    first = tile.first + warp % KWARPS
    for d in tl.static_range(1, AHEAD):
        ahead = first + d * KWARPS
        _fetch_span(tile, own * tile.words, own * tile.pairs, ahead, thread % WARP, ROWS, BITS, KW, SPAN // GROUP)
    for step in range(0, tile.end - tile.first, KWARPS):
        # a warp beyond the last span repeats its words against the zeros that follow the activations
        mine = first + step
        span = word + _threads(tl.minimum(mine, tile.end - 1) * span_words(BITS, KW), RUN)
        w = _words(tile.codes + span, ROWS, KW, WARPS, RUN)
        if AHEAD > 0:
            ahead = mine + AHEAD * KWARPS
            _fetch_span(tile, own * tile.words, own * tile.pairs, ahead, thread % WARP, ROWS, BITS, KW, SPAN // GROUP)
        mine = tl.minimum(mine, tile.spans)
        column = _threads(mine * SPAN, RUN)
        group = mine * (SPAN // GROUP)
        for f in tl.static_range(FIELDS):
            if BITS == 3 and f == 15:
                q = spare  # noqa: F821 - the spare bits of the words before
            else:
                if f > 0 and f % IN_WORD == 0:
                    w = _words(tile.codes + (span + (f // IN_WORD) * BLOCK), ROWS, KW, WARPS, RUN)
                if BITS == 3 and f == 0:
                    spare = (w >> 15) & 0x00010001
                if BITS == 3 and f == 5:
                    spare |= (w >> 14) & 0x00020002
                if BITS == 3 and f == 10:
                    spare |= (w >> 13) & 0x00040004
                q = _field(w, f % IN_WORD, BITS, MODE)
            low, high = _halves(q, MODE, ASM)
            weights = tl.reshape(tl.join(low, high), (WARPS, ROWS, FIELD))
            b = _columns(x_at + (column + f * FIELD), VEC, COLUMNS, WARPS, RUN)
            if f % PER_GROUP == 0:
                p = tl.dot(weights, b, out_dtype=tl.float32)
            else:
                p = tl.dot(weights, b, acc=p, out_dtype=tl.float32)
            if f % PER_GROUP == PER_GROUP - 1:
                g = group + f // PER_GROUP
                at = _threads(tl.minimum(g, last_group) * TILE_ROWS, RUN)
                s, m = _as_fp16(tl.load(pairs + at), ASM)
                total, inverse = tl.split(tl.load(groups_at + _threads(g * 2, RUN)))
                p = p * _per_column(inverse, ROWS, COLUMNS, WARPS, RUN)
                acc = tl.fma(p, _per_row(s.to(tl.float32), ROWS, COLUMNS, WARPS, RUN), acc)
                total = _per_column(total, ROWS, COLUMNS, WARPS, RUN)
                acc = tl.fma(_per_row(m.to(tl.float32), ROWS, COLUMNS, WARPS, RUN), total, acc)
    return acc


@triton.jit
def _rows_product(
    work, tile, FIRST: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr, KW: tl.constexpr, HOW: tl.constexpr
):
    """:func:`_tile_product` of ROWS rows from FIRST, in halves one after the other where all do not fit registers."""
    if rows_at_once(BITS, HOW.columns) >= ROWS:
        here = Tile(
            tile.codes + FIRST * KW, tile.meta + FIRST, tile.x, tile.words, tile.pairs, tile.first, tile.end, tile.spans
        )
        acc = _tile_product(work, here, ROWS, BITS, KW, HOW)
    else:
        low = _rows_product(work, tile, FIRST, ROWS // 2, BITS, KW, HOW)
        high = _rows_product(work, tile, FIRST + ROWS // 2, ROWS // 2, BITS, KW, HOW)
        acc = tl.reshape(tl.permute(tl.join(low, high), (0, 3, 1, 2)), (HOW.warps, ROWS, HOW.columns))
    return acc


@triton.jit
def tile_product(work, BITS: tl.constexpr, KW: tl.constexpr, HOW: tl.constexpr):
    """float32 ``[warps, TILE_ROWS, columns]``: each warp's share of ``W @ x`` at one width, in units of ``2**-24``
    unless the mode is 0.

    A :class:`Work` and :class:`.widths.Decode` say what is multiplied; the sum over the warps of a tile is the product.
    """
    KWARPS: tl.constexpr = HOW.warps // (HOW.parts * HOW.tiles)
    tokens = work.tokens
    spans = tl.cdiv(tokens.k, span_columns(BITS, KW))
    words = spans * span_words(BITS, KW)
    pairs = tokens.k // HOW.group * TILE_ROWS
    # whole steps of the loop, so that only the last split's warps can run past the matrix
    share = tl.cdiv(spans, HOW.splits * KWARPS) * KWARPS
    first = work.split * share
    PLANE: tl.constexpr = width_index(BITS) if HOW.planes else 0
    x = tokens.x + PLANE * tl.cast(tokens.inputs, tl.int64) * tokens.k_padded
    codes = work.codes + work.tile.to(tl.int64) * words
    meta = work.meta + work.tile.to(tl.int64) * pairs
    tile = Tile(codes, meta, x, words, pairs, first, tl.minimum(first + share, spans), spans)
    return _rows_product(work, tile, 0, TILE_ROWS, BITS, KW, HOW)
