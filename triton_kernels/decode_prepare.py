"""Prepare a block with one launch before its two products: routing tables, normalised activations, zeroed counters and
tails.

Each (row, group of columns) is multiplied by the power of two that brings its largest magnitude into
``[2**14, 2**15)``: exact, so that scaling by ``2**-pos`` next loses nothing that matters, and so that bfloat16 of any
range fits fp16. float32 inputs keep the 11 significant bits of fp16. ``groups [inputs, padded k / group, 2]`` holds,
per group, the sum of the activations and 1 / scale, both in units of the product's result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_count
from .blocks_by_counting import MOST_PAIRS, route_by_sorting, route_pairs
from .layout import LARGEST_SPAN, WIDTH_OF, WIDTHS, all_words_along_k, fields, padded_columns

# columns that a program normalises: a row's padded columns are whole chunks
CHUNK = LARGEST_SPAN
# columns of zeros that may follow k: up to a whole span, and the span that idle warps read
TAIL = 2 * LARGEST_SPAN


@triton.jit
def power_of_two(exponent):
    """``2.0 ** exponent`` for int32 exponents in -126..127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponent_of_largest(value, AXIS: tl.constexpr):
    """Exponents of the largest magnitudes of float32 along an axis, such that both scales are normal numbers."""
    # magnitudes order like their bit patterns, NaN and infinity on top
    largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)
    return tl.minimum(tl.maximum(largest >> 23, 15), 254) - 127


@triton.jit
def position(k, KW: tl.constexpr, BITS: tl.constexpr):
    """The bit at which MODE 2 leaves the field of column ``k``; see decode_tile._field."""
    IN_WORD: tl.constexpr = 16 // BITS
    KEPT: tl.constexpr = 10 // BITS
    field = (k // (2 * KW)) % fields(BITS)
    pos = ((field % IN_WORD) % KEPT) * BITS
    if BITS == 3:
        pos = tl.where(field == 15, 0, pos)
    return pos


@triton.jit
def _normalize(
    x_ptr, out_ptr, groups_ptr, row, chunk, inputs, k, k_padded, KWS: tl.constexpr, GROUP: tl.constexpr,
    CHUNK: tl.constexpr, SCALED: tl.constexpr,
):
    """One row's ``CHUNK`` columns: ``out [planes, inputs, k_padded]`` and ``groups [inputs, k_padded / GROUP, 2]``.

    ``SCALED``: a plane a width, each column times ``2**-pos``; else one plane.
    """
    GROUPS: tl.constexpr = CHUNK // GROUP
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(x_ptr + row * k + at, at < k, other=0.0).to(tl.float32)
    value = tl.reshape(value, (GROUPS, GROUP))
    exponent = exponent_of_largest(value, 1)
    value = (value * power_of_two(14 - exponent)[:, None]).to(tl.float16)
    inverse = power_of_two(exponent - 14)
    total = tl.sum(value.to(tl.float32), 1) * inverse
    if SCALED:
        # the products come in units of 2**-24
        total = total * 5.9604644775390625e-08
    group = groups_ptr + (row * (k_padded // GROUP) + chunk * GROUPS + tl.arange(0, GROUPS)) * 2
    tl.store(group, total)
    tl.store(group + 1, inverse)
    value = tl.reshape(value, (CHUNK,))
    out = out_ptr + row * k_padded + at
    if SCALED:
        plane = tl.cast(inputs, tl.int64) * k_padded
        wide = value.to(tl.float32)
        LAST: tl.constexpr = len(KWS) - 1
        for i in tl.static_range(LAST):
            tl.store(out + i * plane, (wide * power_of_two(-position(at, KWS[i], WIDTH_OF[i]))).to(tl.float16))
        # the fields of the last width lie at bit 0
        tl.store(out + LAST * plane, value)
    else:
        tl.store(out, value)


@triton.jit
def _zero_tail(act_ptr, act_groups_ptr, pair, k, k_padded, GROUP: tl.constexpr, TAIL: tl.constexpr):
    """The columns after ``k`` of a pair's inner activations, which the next product reads and nobody else writes."""
    at = k + tl.arange(0, TAIL)
    tl.store(act_ptr + pair * k_padded + at, tl.zeros([TAIL], tl.float16), at < k_padded)
    group = k // GROUP * 2 + tl.arange(0, 2 * (TAIL // GROUP))
    groups = k_padded // GROUP * 2
    tl.store(act_groups_ptr + pair * groups + group, tl.zeros([2 * (TAIL // GROUP)], tl.float32), group < groups)


@triton.jit
def prepare_kernel(
    x_ptr, out_ptr, groups_ptr, ids_ptr, expert_ptr, pairs_ptr, arrived_ptr, act_ptr, act_groups_ptr, inputs, k,
    k_padded, pairs, experts, blocks, counters, act_k, act_padded, KWS: tl.constexpr, GROUP: tl.constexpr,
    ACT_GROUP: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr,
    ROUTE: tl.constexpr, ACT: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):
    """Grid ``1 + inputs * k_padded / CHUNK (+ pairs if ACT)``: the tables, the activations, the tails.

    ``arrived [1 + counters]`` is the number of used blocks, then zeros. ``ROUTE`` 0: tables are there already; 1:
    from ``ids``; 2: one matrix for all, pairs in order.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if program == 0:
        i = tl.arange(0, P)
        for at in range(0, counters, P):
            tl.store(arrived_ptr + 1 + at + i, tl.zeros([P], tl.int32), at + i < counters)
        if ROUTE == 1:
            route_pairs(ids_ptr, expert_ptr, pairs_ptr, arrived_ptr, pairs, experts, blocks, P, COLUMNS)
        elif ROUTE == 2:
            tl.store(arrived_ptr, blocks)
            for at in range(0, blocks, P):
                tl.store(expert_ptr + at + i, tl.zeros([P], tl.int32), at + i < blocks)
            for at in range(0, blocks * COLUMNS, P):
                tl.store(pairs_ptr + at + i, tl.where(at + i < pairs, at + i, -1), at + i < blocks * COLUMNS)
    else:
        chunks = k_padded // CHUNK
        piece = program - 1
        if piece < inputs * chunks:
            row = (piece // chunks).to(tl.int64)
            _normalize(
                x_ptr, out_ptr, groups_ptr, row, piece % chunks, inputs, k, k_padded, KWS, GROUP, CHUNK, SCALED
            )
        elif ACT:
            pair = (piece - inputs * chunks).to(tl.int64)
            _zero_tail(act_ptr, act_groups_ptr, pair, act_k, act_padded, ACT_GROUP, TAIL)


@dataclass(frozen=True)
class Activations:
    """Normalised activations: ``x fp16 [planes, inputs, padded k]`` and ``groups float32 [inputs, groups, 2]``."""

    x: Tensor
    groups: Tensor
    columns: int

    @staticmethod
    def empty(inputs: int, k: int, group_size: int, planes: int, device: torch.device) -> Activations:
        """Uninitialised, for ``inputs`` of ``k`` columns."""
        padded = padded_columns(k)
        x = torch.empty(planes, inputs, padded, dtype=torch.float16, device=device)
        return Activations(x, torch.empty(inputs, padded // group_size, 2, dtype=torch.float32, device=device), k)


@dataclass(frozen=True)
class Blocks:
    """Pairs that each program multiplies (:mod:`.blocks`), and the counters of what has arrived for the sums."""

    expert: Tensor
    pairs: Tensor
    arrived: Tensor

    @property
    def count(self) -> int:
        """Blocks in the grid, used or not."""
        return self.expert.numel()


def prepare(
    x: Tensor, ids: Tensor | None, experts: int, group_size: int, columns: int, counters_a_block: int, counters: int,
    scaled: bool, act: Activations | None = None, act_group: int = 128, pdl: bool = False,
) -> tuple[Activations, Blocks]:
    """One launch (a few more for over 128 pairs): the block tables of flat ``ids`` and contiguous ``x [inputs, k]``
    normalised.

    ``ids`` None is one matrix for all inputs. There are ``counters + counters_a_block * blocks`` counters. ``act`` are
    inner activations, a row a pair, whose tails are zeroed.
    """
    inputs, k = x.shape
    device = x.device
    pairs = inputs if ids is None else ids.numel()
    blocks = -(-pairs // columns) if ids is None else block_count(pairs, experts, columns)
    counters += counters_a_block * blocks
    arrived = torch.empty(1 + counters, dtype=torch.int32, device=device)
    sort = ids is not None and pairs > MOST_PAIRS
    if sort:
        expert, block_pairs = route_by_sorting(ids, experts, columns, blocks)
        arrived[:1] = (expert >= 0).sum()
    else:
        expert = torch.empty(blocks, dtype=torch.int32, device=device)
        block_pairs = torch.empty(blocks, columns, dtype=torch.int32, device=device)
    out = Activations.empty(inputs, k, group_size, len(WIDTHS) if scaled else 1, device)
    padded = out.x.shape[-1]
    pieces = inputs * (padded // CHUNK) + (pairs if act else 0)
    prepare_kernel[(1 + pieces,)](
        x, out.x, out.groups, arrived if ids is None else ids, expert, block_pairs, arrived, act.x if act else out.x,
        act.groups if act else out.groups, inputs, k, padded, pairs, experts, blocks, counters,
        act.columns if act else 0, act.x.shape[-1] if act else 0, KWS=all_words_along_k(k), GROUP=group_size,
        ACT_GROUP=act_group, CHUNK=CHUNK, TAIL=TAIL, P=max(16, triton.next_power_of_2(min(pairs, MOST_PAIRS))),
        COLUMNS=columns, ROUTE=2 if ids is None else (0 if sort else 1), ACT=act is not None, SCALED=scaled, PDL=pdl,
        num_warps=4,
        **({"launch_pdl": True} if pdl else {}),
    )
    return out, Blocks(expert, block_pairs, arrived)
