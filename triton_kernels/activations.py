"""Normalised fp16 activations, their group sums, and the sums over slots and splits at the end.

A row is multiplied by the power of two that brings its largest magnitude into ``[2**14, 2**15)``: exact, so that
scaling by ``2**-pos`` next loses nothing that matters, and so that bfloat16 of any range fits fp16. float32 rows
keep the 11 significant bits of fp16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import WIDTHS, padded_columns, words_along_k

CHUNK = 512


@triton.jit
def _power_of_two(exponent):
    """``2.0 ** exponent`` for int32 exponents in -126..127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _position(k, KW: tl.constexpr, BITS: tl.constexpr):
    """The bit at which MODE 2 leaves the field of column ``k``; see body._field."""
    FIELDS: tl.constexpr = 4 if BITS == 4 or BITS == 8 else (8 if BITS == 2 else 16)
    IN_WORD: tl.constexpr = 16 // BITS
    KEPT: tl.constexpr = 10 // BITS
    field = (k // (2 * KW)) % FIELDS
    pos = ((field % IN_WORD) % KEPT) * BITS
    if BITS == 3:
        pos = tl.where(field == 15, 0, pos)
    return pos


@triton.jit
def normalize_kernel(
    x_ptr, out_ptr, sums_ptr, inverse_ptr, rows, k, k_padded, KW1: tl.constexpr, KW2: tl.constexpr, KW3: tl.constexpr,
    KW4: tl.constexpr, GROUP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
):
    """One row's ``CHUNK`` columns; ``out [5 or 1, rows, k_padded]``, ``sums [rows, k_padded / GROUP]``."""
    row = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.int32)
    for at in range(0, k, BLOCK):
        value = tl.load(x_ptr + row * k + at + i, at + i < k, other=0.0).to(tl.float32)
        # magnitudes order like their bit patterns, NaN and infinity on top
        largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    exponent = tl.minimum(tl.maximum(tl.max(largest, 0) >> 23, 15), 254) - 127
    if chunk == 0:
        tl.store(inverse_ptr + row, _power_of_two(exponent - 14))

    at = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(x_ptr + row * k + at, at < k, other=0.0).to(tl.float32)
    value = (value * _power_of_two(14 - exponent)).to(tl.float16)
    GROUPS: tl.constexpr = CHUNK // GROUP
    total = tl.sum(tl.reshape(value.to(tl.float32), (GROUPS, GROUP)), 1)
    if SCALED:
        # the products come in units of 2**-24
        total = total * 5.9604644775390625e-08
    tl.store(sums_ptr + row * (k_padded // GROUP) + chunk * GROUPS + tl.arange(0, GROUPS), total)
    out = out_ptr + row * k_padded + at
    plane = tl.cast(rows, tl.int64) * k_padded
    if SCALED:
        wide = value.to(tl.float32)
        tl.store(out, (wide * _power_of_two(-_position(at, KW1, 1))).to(tl.float16))
        tl.store(out + plane, (wide * _power_of_two(-_position(at, KW2, 2))).to(tl.float16))
        tl.store(out + 2 * plane, (wide * _power_of_two(-_position(at, KW3, 3))).to(tl.float16))
        tl.store(out + 3 * plane, (wide * _power_of_two(-_position(at, KW4, 4))).to(tl.float16))
        tl.store(out + 4 * plane, value)
    else:
        tl.store(out, value)


@triton.jit
def combine_kernel(
    partial_ptr, ids_ptr, weights_ptr, out_ptr, pairs, n, experts, SLOTS: tl.constexpr, SPLITS: tl.constexpr,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):
    """``out [row, n]``: the sum over slots, then splits, of float32 ``[SPLITS, pairs, n]``, in that fixed order."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    plane = tl.cast(pairs, tl.int64) * n
    acc = tl.zeros([BLOCK], tl.float32)
    for slot in range(SLOTS):
        pair = row * SLOTS + slot
        value = tl.zeros([BLOCK], tl.float32)
        for split in range(SPLITS):
            value += tl.load(partial_ptr + split * plane + pair * n + at, inside, other=0.0)
        if WEIGHTED:
            expert = tl.load(ids_ptr + pair)
            weight = tl.load(weights_ptr + pair).to(tl.float32)
            value = value * tl.where((expert >= 0) & (expert < experts), weight, 0.0)
        acc += value
    tl.store(out_ptr + row * n + at, acc.to(out_ptr.dtype.element_ty), inside)


def normalize(x: Tensor, group_size: int, scaled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``(activations fp16 [5 or 1, rows, padded k], group sums, 1 / scale)`` of contiguous ``x [rows, k]``.

    ``scaled``: one plane a width, each multiplied by ``2**-pos`` of its fields.
    """
    rows, k = x.shape
    padded = padded_columns(k)
    out = torch.empty(len(WIDTHS) if scaled else 1, rows, padded, dtype=torch.float16, device=x.device)
    sums = torch.empty(rows, padded // group_size, dtype=torch.float32, device=x.device)
    inverse = torch.empty(rows, dtype=torch.float32, device=x.device)
    kws = {f"KW{bits}": words_along_k(k, bits) for bits in (1, 2, 3, 4)}
    block = min(4096, triton.next_power_of_2(k))
    normalize_kernel[(rows, padded // CHUNK)](
        x, out, sums, inverse, rows, k, padded, **kws, GROUP=group_size, CHUNK=CHUNK, BLOCK=block, SCALED=scaled,
        num_warps=4,
    )
    return out, sums, inverse


def combine(partial: Tensor, ids: Tensor, weights: Tensor | None, out: Tensor, experts: int) -> None:
    """Sum float32 ``partial [splits, pairs, n]`` into ``out [rows, n]``; rows are tokens if ``weights``, else pairs."""
    splits, pairs, n = partial.shape
    block = min(1024, triton.next_power_of_2(n))
    slots = pairs // out.shape[0]
    combine_kernel[(out.shape[0], triton.cdiv(n, block))](
        partial, ids, ids if weights is None else weights, out, pairs, n, experts, SLOTS=slots, SPLITS=splits,
        WEIGHTED=weights is not None, BLOCK=block, num_warps=4,
    )
