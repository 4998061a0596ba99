"""One ladder from a width known at run time to code compiled for it, and what the decode kernels hand down it.

A function of the ladder takes ``(work, BITS, KW, HOW)``: ``work`` is a tuple of run-time values, ``HOW`` one of
compile-time choices with at least ``kws``, the words along K of every width in the order of
:data:`gemq.triton_kernels.layout.WIDTHS`, and ``only``, the single width to compile or 0 for all.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from .layout import WIDTH_OF


class Decode(NamedTuple):
    """Compile-time choices of a decode product."""

    kws: tuple[int, ...]
    # columns of K that share one (s, m)
    group: int
    # token columns of a program
    columns: int
    # warps of a program, shared out over parts * tiles tiles
    warps: int
    # neighbouring tiles of a program, in each of its parts
    tiles: int
    # 2: the tiles of gate and those of up; else 1
    parts: int
    # programs that share K
    splits: int
    # how codes become float16: see tile_product
    mode: int
    asm: bool
    # spans that weights are fetched ahead into the L2
    ahead: int
    # int32 that the compiler's fragments keep together
    run: int
    # activations come once a width, scaled for it
    planes: bool
    # the launch may overlap the end of the one before it
    pdl: bool
    only: int = 0


class Packed(NamedTuple):
    """Compile-time choices of the packed prefill product."""

    kws: tuple[int, ...]
    group: int
    # rows and token columns of a program; parts as in Decode
    rows: int
    columns: int
    parts: int
    warps: int
    # trips of the loop that are on their way, and steps of one
    stages: int
    room: int
    # the bit tricks in inline assembly
    fast: bool
    # the axis that the compiler deals threads out from
    threads_first: bool
    only: int = 0


class Unpacking(NamedTuple):
    """Compile-time choices of unpacking to memory; as in :class:`Packed`."""

    kws: tuple[int, ...]
    group: int
    warps: int
    fast: bool
    threads_first: bool
    only: int = 0


@triton.jit
def _stores(bits, WIDTH: tl.constexpr):
    """True if codes of ``bits`` are stored at WIDTH: 5, 6 and 7 lie at 8."""
    return bits > 4 if WIDTH == 8 else bits == WIDTH


@triton.jit
def at_width(function: tl.constexpr, bits, nothing, work, HOW: tl.constexpr):
    """``function(work, BITS, KW, HOW)`` for the width that stores ``bits``; ``nothing``, a value alike, for 0 bits.

    One ``if`` after the other: the compiler gives nested branches shared memory beside each other, not in turn.
    """
    result = nothing
    for i in tl.static_range(len(HOW.kws)):
        # the outer condition is decided when compiling
        if HOW.only == 0 or HOW.only == WIDTH_OF[i]:  # noqa: SIM102
            if _stores(bits, WIDTH_OF[i]):
                result = function(work, WIDTH_OF[i], HOW.kws[i], HOW)
    return result
