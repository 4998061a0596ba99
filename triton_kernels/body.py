"""One tile of a packed expert times a few token columns: the inner loop of every kernel here.

Each of the ``WARPS`` warps multiplies spans of its own (the batch dimension of the dot), so a program needs no
barrier before its last sum. Everything is loaded in the places where the tensor core wants it, so that a thread reads
16 bytes at once and the permutations that make matrices of it rename registers instead of moving data:

* lane ``4 * rl + c`` of a warp holds rows ``8 * rh + rl`` and, of each, words ``VEC * c + v``;
* ``RUN`` is how many int32 of a row the compiler's fragments keep together, a choice of its version (:mod:`.tuning`):
  the dot sees the columns in the order ``(v / RUN, c, v % RUN, half)``, and activations are loaded in the same one.
  The versions where it is 2 also deal a load's threads out from the first axis, the others from the last.
  A wrong ``RUN`` costs shuffles, never correctness.

Activations come normalised by group (:mod:`.prepare`): fp16 times a power of two of each (column, group).

``MODE`` 0 converts codes with plain arithmetic. 1 reads a field as an fp16 subnormal, ``q * 2**-24``. 2 also leaves
the field where it lies in the word, ``q * 2**(pos - 24)``, and expects activations scaled by ``2**-pos``. ``ASM``
reinterprets 32 bits as two fp16 by one move; without it, by plain Triton, which the interpreter can run. ``AHEAD``
spans from now are fetched into the L2: registers hold one span a warp, and the compiler loads ``(s, m)`` late, so that
without it the latency of memory shows twice a span.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .layout import K_LANES, LINE, ROW_LANES, TILE_ROWS, WARP, fields, span_columns, span_words, word_blocks


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
def _fetch_span(
    codes, meta, code_at, meta_at, span, last, lane, ROWS: tl.constexpr, KW: tl.constexpr, NWORDS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Prefetch what a warp will read of a span: 128 bytes a lane of the codes, and its (s, m)."""
    span = tl.minimum(span, last)
    # a word block holds the whole tile's rows, of which these are read
    LINES: tl.constexpr = ROWS * KW // LINE
    BLOCK: tl.constexpr = TILE_ROWS * KW
    for r in tl.static_range(0, NWORDS * LINES, WARP):
        line = tl.minimum(r + lane, NWORDS * LINES - 1)
        _fetch(codes + (code_at + span * (NWORDS * BLOCK) + line // LINES * BLOCK + line % LINES * LINE))
    part = lane // GROUPS % (ROWS // LINE) * LINE
    _fetch(meta + (meta_at + span * (GROUPS * TILE_ROWS) + lane % GROUPS * TILE_ROWS + part))


@triton.jit
def token_row(pair_at, row_pairs, lead):
    """int64 rows of the activations for pairs; a column without one repeats ``lead``: the same cache lines, no mask."""
    pair = tl.load(pair_at)
    return (tl.where(pair < 0, lead, pair) // row_pairs).to(tl.int64)


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
def tile_product(
    codes, meta, x, groups, pair_ptr, row_pairs, lead, spans_from, spans_to, spans, up_tiles, tile_words, tile_meta,
    last_group, k_padded, ROWS: tl.constexpr, BITS: tl.constexpr, KW: tl.constexpr, GROUP: tl.constexpr,
    COLUMNS: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr, PARTS: tl.constexpr, MODE: tl.constexpr,
    ASM: tl.constexpr, AHEAD: tl.constexpr, RUN: tl.constexpr,
):
    """float32 ``[WARPS, ROWS, COLUMNS]``: each warp's share of ``W @ x`` for the first ROWS of the tile's rows, in
    units of ``2**-24`` unless MODE is 0.

    ``codes`` int32 and ``meta`` int32 (one ``(s, m)`` each) point at the first tile, of ``tile_words`` and
    ``tile_meta`` of them. The warps are shared out over ``PARTS * TILES`` tiles: ``TILES`` neighbours, then, for PARTS
    2, the same ``up_tiles`` further (one expert stays below 2**31 words). ``x`` is the normalised activations of this
    width, ``groups`` their ``(sum, 1 / scale)``, ``pair_ptr`` the pairs of the token columns.
    """
    FIELDS: tl.constexpr = fields(BITS)
    NWORDS: tl.constexpr = word_blocks(BITS)
    IN_WORD: tl.constexpr = 16 // BITS
    FIELD: tl.constexpr = 2 * KW
    SPAN: tl.constexpr = span_columns(BITS, KW)
    PER_GROUP: tl.constexpr = GROUP // FIELD
    VEC: tl.constexpr = KW // K_LANES
    KWARPS: tl.constexpr = WARPS // (PARTS * TILES)
    BLOCK: tl.constexpr = TILE_ROWS * KW

    thread = tl.arange(0, WARP * WARPS)
    warp = thread // WARP
    rl = thread // K_LANES % ROW_LANES
    lane = thread % K_LANES
    part = warp // KWARPS
    tile = part % TILES + part // TILES * up_tiles
    word = _threads(tile * tile_words + rl * KW + lane * VEC, RUN) + _repeats(ROWS // ROW_LANES, RUN) * (ROW_LANES * KW)
    word = word + tl.arange(0, VEC)[None, None, :]
    pairs = meta + (_threads(tile * tile_meta + rl, RUN) + _repeats(ROWS // ROW_LANES, RUN) * ROW_LANES)
    pair = pair_ptr + (_threads(rl, RUN) + _repeats(COLUMNS // ROW_LANES, RUN) * ROW_LANES)
    x_row = token_row(pair, row_pairs, lead) * k_padded
    x_at = x + x_row + (_threads(lane * (2 * VEC), RUN) + tl.arange(0, 2 * VEC)[None, None, :])

    # the repeats are (n, h) of columns 8 * n + 2 * c + h; an AND hides from the compiler that h is contiguous, for
    # which it would deal out the load's threads in another order than those of the loop
    repeat = _repeats(COLUMNS // K_LANES, RUN)
    pair = pair_ptr + (_threads(lane * 2, RUN) + repeat // 2 * ROW_LANES + (repeat & 1))
    groups_at = groups + token_row(pair, row_pairs, lead) * (k_padded // GROUP * 2) + tl.arange(0, 2)[None, None, :]

    acc = tl.zeros([WARPS, ROWS, COLUMNS], tl.float32)
    first = spans_from + warp % KWARPS
    last = spans_to - 1
    for d in tl.static_range(1, AHEAD):
        _fetch_span(
            codes, meta, tile * tile_words, tile * tile_meta, first + d * KWARPS, last, thread % WARP, ROWS, KW, NWORDS,
            SPAN // GROUP,
        )
    for step in range(0, spans_to - spans_from, KWARPS):
        # a warp beyond the last span repeats its words against the zeros that follow the activations
        mine = first + step
        span = word + _threads(tl.minimum(mine, last) * span_words(BITS, KW), RUN)
        w = _words(codes + span, ROWS, KW, WARPS, RUN)
        if AHEAD > 0:
            _fetch_span(
                codes, meta, tile * tile_words, tile * tile_meta, mine + AHEAD * KWARPS, last, thread % WARP, ROWS, KW,
                NWORDS, SPAN // GROUP,
            )
        mine = tl.minimum(mine, spans)
        column = _threads(mine * SPAN, RUN)
        group = mine * (SPAN // GROUP)
        for f in tl.static_range(FIELDS):
            if BITS == 3 and f == 15:
                q = spare  # noqa: F821 - the spare bits of the words before
            else:
                if f > 0 and f % IN_WORD == 0:
                    w = _words(codes + (span + (f // IN_WORD) * BLOCK), ROWS, KW, WARPS, RUN)
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
