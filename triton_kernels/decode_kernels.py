"""The decode kernels: a program multiplies tiles of one expert with a block of its tokens.

Two launches make a block of experts: :func:`gate_up_kernel`, whose result is what the next product wants to read
(normalised, scaled for the width of that expert's down projection), and :func:`product_kernel`, whose programs leave
partial sums; of all that share a tile of the output, the last to arrive adds them up in the order of slots and splits,
so no two runs differ. A dense matrix is an expert that every token goes to.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .activation import gated_by, relu_squared
from .decode_prepare import exponent_of_largest, position, power_of_two
from .decode_tile import Tokens, Work, tile_product
from .layout import TILE_ROWS, WIDTH_OF
from .widths import at_width


class Experts(NamedTuple):
    """Pointers of a packed stack: int32 codes and (s, m), the experts' offsets in bytes and float16 elements."""

    codes: tl.tensor
    meta: tl.tensor
    offsets: tl.tensor
    meta_offsets: tl.tensor


@triton.jit
def _expert_product(experts, expert, bits, tokens, tile, up_tiles, split, HOW: tl.constexpr, DENSE: tl.constexpr):
    """float32 ``[parts, tiles, TILE_ROWS, columns]`` of an expert's tiles from ``tile`` on; zeros where ``bits`` is 0.

    ``DENSE``: one matrix, whose tables are not read.
    """
    codes = experts.codes
    meta = experts.meta
    if bits > 0 and not DENSE:
        codes += tl.multiple_of(tl.load(experts.offsets + expert) // 4, 16)
        meta += tl.multiple_of(tl.load(experts.meta_offsets + expert) // 2, 16)
    work = Work(codes, meta, tokens, tl.load(tokens.pairs), tile, up_tiles, split)
    # names of their own: triton 3.7 hands a field of a tuple on as an int, which no jitted function takes
    WARPS: tl.constexpr = HOW.warps
    COLUMNS: tl.constexpr = HOW.columns
    nothing = tl.zeros([WARPS, TILE_ROWS, COLUMNS], tl.float32)
    acc = at_width(tile_product, bits, nothing, work, HOW)
    KWARPS: tl.constexpr = WARPS // (HOW.parts * HOW.tiles)
    acc = tl.sum(tl.reshape(acc, (HOW.parts, HOW.tiles, KWARPS, TILE_ROWS, COLUMNS)), 2)
    if HOW.mode != 0:
        acc = acc * 16777216.0
    # a column that repeats the first pair, or an expert of width 0, whose NaN and infinity are not its own
    return tl.where(bits == 0, 0.0, acc)


@triton.jit
def _position_of(k, bits, KWS: tl.constexpr):
    """decode_prepare.position for a width known at run time."""
    pos = tl.where(bits == WIDTH_OF[0], position(k, KWS[0], WIDTH_OF[0]), 0)
    # the fields of the last width lie at bit 0
    for i in tl.static_range(1, len(KWS) - 1):
        pos = tl.where(bits == WIDTH_OF[i], position(k, KWS[i], WIDTH_OF[i]), pos)
    return pos


@triton.jit
def gate_up_kernel(
    x_ptr, groups_ptr, codes_ptr, meta_ptr, bits_ptr, offsets_ptr, meta_offsets_ptr, expert_ptr, pairs_ptr, act_ptr,
    act_groups_ptr, down_bits_ptr, experts, inputs, sharing, n, k, k_padded, act_padded, HOW: tl.constexpr,
    ACT_KWS: tl.constexpr, ACT_GROUP: tl.constexpr, bias_ptr=None, GATING: tl.constexpr = None,
):
    """``act [pairs, act_padded]``: the inner activations, normalised by groups and scaled for the down projection.

    Grid ``(blocks, n / (TILE_ROWS * tiles))``: blocks of one expert are neighbours and share its weights in the L2. The
    matrix has ``2 * n`` rows, gate then up; ``sharing`` pairs share an input. ``HOW`` is a
    :class:`.widths.Decode` of two parts (of one, and the matrix of ``n`` rows, where the activation has no gate);
    ``ACT_KWS`` and ``ACT_GROUP`` are of the down projection. ``bias [experts, rows]`` is added where there is one.
    """
    COLUMNS: tl.constexpr = HOW.columns
    TILES: tl.constexpr = HOW.tiles
    if HOW.pdl:
        tl.extra.cuda.gdc_wait()
    block = tl.program_id(0)
    tile = tl.program_id(1) * TILES
    expert = tl.load(expert_ptr + block)
    if expert < 0:
        return
    bits = 0
    if expert < experts:
        bits = tl.load(bits_ptr + expert)
    block_pairs = pairs_ptr + block.to(tl.int64) * COLUMNS
    stack = Experts(codes_ptr, meta_ptr, offsets_ptr, meta_offsets_ptr)
    tokens = Tokens(x_ptr, groups_ptr, block_pairs, sharing, inputs, k, k_padded)
    both = _expert_product(stack, expert, bits, tokens, tile, n // TILE_ROWS, 0, HOW, False)
    if HOW.pdl:
        tl.extra.cuda.gdc_launch_dependents()
    if bias_ptr is not None:
        at_row = tile * TILE_ROWS + tl.arange(0, HOW.parts)[:, None] * n + tl.arange(0, TILES * TILE_ROWS)[None, :]
        if bits > 0:
            bias = tl.load(bias_ptr + expert.to(tl.int64) * HOW.parts * n + at_row)
            both += tl.reshape(bias, (HOW.parts, TILES, TILE_ROWS))[:, :, :, None]
    if HOW.parts == 1:
        act = relu_squared(both)
    else:
        gate, up = tl.split(tl.permute(both, (1, 2, 3, 0)))
        act = gate / (1.0 + tl.exp(-gate)) * up if GATING is None else gated_by(gate, up, GATING)

    GROUPS: tl.constexpr = TILES * TILE_ROWS // ACT_GROUP
    act = tl.reshape(act, (GROUPS, ACT_GROUP, COLUMNS))
    exponent = exponent_of_largest(act, 1)
    act = (act * power_of_two(14 - exponent)[:, None, :]).to(tl.float16)
    inverse = power_of_two(exponent - 14)
    total = tl.sum(act.to(tl.float32), 1) * inverse
    column = tile * TILE_ROWS + tl.arange(0, TILES * TILE_ROWS)
    act = tl.reshape(act, (TILES * TILE_ROWS, COLUMNS))
    if HOW.mode == 2:
        # the products come in units of 2**-24
        total = total * 5.9604644775390625e-08
        down_bits = tl.load(down_bits_ptr + expert, expert < experts, other=0)
        pos = _position_of(column, down_bits, ACT_KWS)
        act = (act.to(tl.float32) * power_of_two(-pos)[:, None]).to(tl.float16)
    pair = tl.load(block_pairs + tl.arange(0, COLUMNS))
    mine = pair[None, :] >= 0
    pair = pair[None, :].to(tl.int64)
    tl.store(act_ptr + pair * act_padded + column[:, None], act, mine)
    group = tile * TILE_ROWS // ACT_GROUP + tl.arange(0, GROUPS)
    at = act_groups_ptr + (pair * (act_padded // ACT_GROUP) + group[:, None]) * 2
    tl.store(at, total, mine)
    tl.store(at + 1, inverse, mine)


@triton.jit
def _sum_slots(
    partial_ptr, out_ptr, ids_ptr, weights_ptr, bits_ptr, bias_ptr, row, experts, pairs, n, slots, SLOTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A tile's rows of ``out [tokens, n]``: the weighted sums over slots of the sums over splits.

    16 or more pairs at once; ``SLOTS`` is ``slots`` rounded up to a power of two.
    """
    TOKENS: tl.constexpr = 16 // SLOTS if SLOTS < 16 else 1
    i = tl.arange(0, TOKENS * SLOTS)
    slot = i % SLOTS
    tokens = pairs // slots
    for first in range(0, tokens, TOKENS):
        token = first + i // SLOTS
        pair = token * slots + slot
        here = (token < tokens) & (slot < slots)
        expert = tl.load(ids_ptr + pair, here, other=-1)
        valid = (expert >= 0) & (expert < experts)
        valid = valid & (tl.load(bits_ptr + expert, valid, other=0) > 0)
        weight = tl.load(weights_ptr + pair, valid, other=0.0).to(tl.float32)
        at = partial_ptr + pair.to(tl.int64)[:, None] * n + row[None, :]
        inside = valid[:, None] & (row[None, :] < n)
        value = tl.zeros([TOKENS * SLOTS, TILE_ROWS], tl.float32)
        for split in tl.static_range(SPLITS):
            # other programs wrote these: past this multiprocessor's own cache
            plane = tl.cast(pairs, tl.int64) * n * split
            value += tl.load(at + plane, inside, other=0.0, cache_modifier=".cg")
        if bias_ptr is not None:
            value += tl.load(bias_ptr + expert.to(tl.int64)[:, None] * n + row[None, :], inside, other=0.0)
        total = tl.sum(tl.reshape(value * weight[:, None], (TOKENS, SLOTS, TILE_ROWS)), 1)
        token = first + tl.arange(0, TOKENS)
        to = out_ptr + token.to(tl.int64)[:, None] * n + row[None, :]
        tl.store(to, total.to(out_ptr.dtype.element_ty), (token[:, None] < tokens) & (row[None, :] < n))


@triton.jit
def _sum_splits(
    partial_ptr, out_ptr, pair, row, pairs, n, SPLITS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A tile's rows of ``out [pairs, n]`` for one block's pairs."""
    inside = (pair[None, :] >= 0) & (row[:, None] < n)
    at = pair[None, :].to(tl.int64) * n + row[:, None]
    value = tl.zeros([TILE_ROWS, COLUMNS], tl.float32)
    for split in tl.static_range(SPLITS):
        plane = tl.cast(pairs, tl.int64) * n * split
        value += tl.load(partial_ptr + plane + at, inside, other=0.0, cache_modifier=".cg")
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def product_kernel(
    x_ptr, groups_ptr, codes_ptr, meta_ptr, bits_ptr, offsets_ptr, meta_offsets_ptr, expert_ptr, pairs_ptr, ids_ptr,
    weights_ptr, arrived_ptr, partial_ptr, out_ptr, experts, inputs, pairs, slots, sharing, n, k, k_padded,
    HOW: tl.constexpr, SLOTS: tl.constexpr, DENSE: tl.constexpr = 0, bias_ptr=None,
):
    """``out [tokens, n]``, weighted sums over ``slots``; ``out [pairs, n]``, unweighted, where ``SLOTS`` is 0.

    Grid ``(blocks, tiles of the n rows, splits)``. ``HOW`` is a :class:`.widths.Decode` of one part and tile; without
    its ``planes``, ``x`` is scaled for its pair's expert. Weighted sums are of products and ``bias [experts, n]``, if
    there is one. ``DENSE`` is the width of a single matrix, whose tables are
    not read.
    """
    COLUMNS: tl.constexpr = HOW.columns
    SPLITS: tl.constexpr = HOW.splits
    if HOW.pdl:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.program_id(0)
    tile = tl.program_id(1)
    split = tl.program_id(2)
    expert = tl.load(expert_ptr + block)
    if expert < 0:
        return
    bits = DENSE
    if DENSE == 0 and expert < experts:
        bits = tl.load(bits_ptr + expert)
    block_pairs = pairs_ptr + block.to(tl.int64) * COLUMNS
    stack = Experts(codes_ptr, meta_ptr, offsets_ptr, meta_offsets_ptr)
    tokens = Tokens(x_ptr, groups_ptr, block_pairs, sharing, inputs, k, k_padded)
    result = _expert_product(stack, expert, bits, tokens, tile, 0, split, HOW, DENSE != 0)
    result = tl.reshape(result, (TILE_ROWS, COLUMNS))
    pair = tl.load(block_pairs + tl.arange(0, COLUMNS))
    row = tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    at = pair[None, :].to(tl.int64) * n + row[:, None]
    inside = (pair[None, :] >= 0) & (row[:, None] < n)
    if SLOTS == 0 and SPLITS == 1:
        tl.store(out_ptr + at, result.to(out_ptr.dtype.element_ty), inside)
    else:
        tl.store(partial_ptr + split.to(tl.int64) * pairs * n + at, result, inside & ((SLOTS == 0) | (bits > 0)))
        # every thread's partial sums before the one thread's count, every read after it
        tl.debug_barrier()
        if SLOTS == 0:
            counter = arrived_ptr + 1 + tile * tl.num_programs(0) + block
            all_of_them = SPLITS
        else:
            counter = arrived_ptr + 1 + tile
            all_of_them = tl.load(arrived_ptr) * SPLITS
        before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        tl.debug_barrier()
        if before == all_of_them - 1:
            if SLOTS == 0:
                _sum_splits(partial_ptr, out_ptr, pair, row, pairs, n, SPLITS, COLUMNS)
            else:
                _sum_slots(
                    partial_ptr, out_ptr, ids_ptr, weights_ptr, bits_ptr, bias_ptr, row, experts, pairs, n, slots,
                    SLOTS, SPLITS,
                )
