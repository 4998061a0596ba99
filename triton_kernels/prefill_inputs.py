"""Inputs, before, between and after the products of many tokens.

An input is multiplied by the power of two that brings its largest magnitude into ``[2**14, 2**15)`` and rounded to
float16: bfloat16 of any range fits, float32 keeps 11 significant bits, and an input's NaN or infinity stays its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import LARGEST_SPAN

# a normalised input is padded with zeros to the longest trip of the packed kernel
PAD = LARGEST_SPAN


def padded_columns(k: int) -> int:
    """Columns of normalised inputs."""
    return -(-k // PAD) * PAD


@triton.jit
def power_of_two(exponent):
    """``2.0 ** exponent`` for int32 exponents in -126..127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def leading_exponent(magnitude):
    """Exponent of the float32 whose bits are ``magnitude``, kept to -112..127 so that a power of two undoes it."""
    return tl.minimum(tl.maximum(magnitude >> 23, 15), 254) - 127


@triton.jit
def column(place):
    """The column at a place of an input in the packed kernel's order.

    There lane ``c`` owns columns ``8 * c`` to ``8 * c + 7`` of each 32; the tensor core wants of it, of each 16, the
    pairs at ``2 * c`` and ``8 + 2 * c``.
    """
    at = place % 32
    return place - at + at % 8 // 2 * 8 + at // 16 * 4 + at % 16 // 8 * 2 + at % 2


@triton.jit
def normalize_kernel(
    x_ptr, out_ptr, inverse_ptr, k, k_padded, BLOCK: tl.constexpr, ORDERED: tl.constexpr
):
    """An input: ``out [inputs, k_padded]`` float16 and ``inverse [inputs]``, what undoes the scaling."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    largest = tl.zeros([BLOCK], tl.int32)
    for at in range(0, k, BLOCK):
        value = tl.load(x_ptr + row * k + at + i, at + i < k, other=0.0).to(tl.float32)
        # magnitudes order like their bit patterns, NaN and infinity on top
        largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    exponent = leading_exponent(tl.max(largest, 0))
    tl.store(inverse_ptr + row, power_of_two(exponent - 14))
    scale = power_of_two(14 - exponent)
    for at in range(0, k_padded, BLOCK):
        source = at + i
        if ORDERED:
            source = column(source)
        value = tl.load(x_ptr + row * k + source, source < k, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * k_padded + at + i, (value * scale).to(tl.float16), at + i < k_padded)


@triton.jit
def rescale_kernel(
    x_ptr, exponent_ptr, out_ptr, inverse_ptr, k, k_padded, parts, PART: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, ORDERED: tl.constexpr,
):
    """:func:`normalize_kernel` of float16 inputs whose blocks of ``PART`` columns have an exponent each."""
    row = tl.program_id(0).to(tl.int64)
    p = tl.arange(0, PARTS)
    exponent = tl.max(tl.load(exponent_ptr + row * parts + p, p < parts, other=-112), 0)
    tl.store(inverse_ptr + row, power_of_two(exponent - 14))
    i = tl.arange(0, BLOCK)
    for at in range(0, k_padded, BLOCK):
        source = at + i
        if ORDERED:
            source = column(source)
        value = tl.load(x_ptr + row * k + source, source < k, other=0.0).to(tl.float32)
        own = tl.load(exponent_ptr + row * parts + source // PART, source < k, other=-112)
        value = value * power_of_two(tl.maximum(own - exponent, -126))
        tl.store(out_ptr + row * k_padded + at + i, value.to(tl.float16), at + i < k_padded)


@triton.jit
def combine_kernel(
    partial_ptr, ids_ptr, weights_ptr, out_ptr, n, experts, SLOTS: tl.constexpr, BLOCK: tl.constexpr, bits_ptr=None,
    bias_ptr=None,
):
    """``out [tokens, n]``: float32 ``[tokens * SLOTS, n]`` weighted and summed over a token's slots, in their order.

    ``bias [experts, n]``, if there is one, is added to the products of experts that have bits.
    """
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for slot in range(SLOTS):
        pair = token * SLOTS + slot
        expert = tl.load(ids_ptr + pair)
        if (expert >= 0) & (expert < experts):
            weight = tl.load(weights_ptr + pair).to(tl.float32)
            value = tl.load(partial_ptr + pair * n + at, at < n, other=0.0)
            if bias_ptr is not None:  # noqa: SIM102 the outer condition is decided when compiling
                if tl.load(bits_ptr + expert) > 0:
                    value += tl.load(bias_ptr + expert.to(tl.int64) * n + at, at < n, other=0.0)
            acc += value * weight
    tl.store(out_ptr + token * n + at, acc.to(out_ptr.dtype.element_ty), at < n)


def normalize(x: Tensor, ordered: bool) -> tuple[Tensor, Tensor]:
    """``(float16 [inputs, padded k], what undoes the scaling [inputs])`` of contiguous ``x [inputs, k]``.

    ``ordered``: in the column order of the packed kernel, else as they are.
    """
    inputs, k = x.shape
    padded = padded_columns(k)
    out = torch.empty(inputs, padded, dtype=torch.float16, device=x.device)
    inverse = torch.empty(inputs, dtype=torch.float32, device=x.device)
    block = min(4096, triton.next_power_of_2(k))
    normalize_kernel[(inputs,)](x, out, inverse, k, padded, BLOCK=block, ORDERED=ordered, num_warps=4)
    return out, inverse


def rescale(x: Tensor, exponents: Tensor, part: int, ordered: bool) -> tuple[Tensor, Tensor]:
    """Apply :func:`normalize` to float16 ``x [inputs, k]`` that is scaled by ``2**(14 - exponents[input, column //
    part])``."""
    inputs, k = x.shape
    padded, parts = padded_columns(k), exponents.shape[1]
    out = torch.empty(inputs, padded, dtype=torch.float16, device=x.device)
    inverse = torch.empty(inputs, dtype=torch.float32, device=x.device)
    rescale_kernel[(inputs,)](
        x, exponents, out, inverse, k, padded, parts, PART=part, PARTS=triton.next_power_of_2(parts),
        BLOCK=min(4096, triton.next_power_of_2(k)), ORDERED=ordered, num_warps=4,
    )
    return out, inverse


def combine(
    partial: Tensor, ids: Tensor, weights: Tensor, out: Tensor, bits: Tensor, bias: Tensor | None = None
) -> None:
    """Sum float32 ``partial [tokens * slots, n]`` into ``out [tokens, n]``, with a ``bias [E, n]`` where experts have
    ``bits``; invalid ids count as zero."""
    tokens, n = out.shape
    block = min(1024, triton.next_power_of_2(n))
    combine_kernel[(tokens, triton.cdiv(n, block))](
        partial, ids, weights, out, n, bits.numel(), SLOTS=partial.shape[0] // tokens, BLOCK=block,
        bits_ptr=None if bias is None else bits, bias_ptr=bias, num_warps=4,
    )
