"""The ``gpu_tile`` layout in numbers. Kernels, launchers and reports derive every size and stride from this file.

How codes and scales of an expert lie in memory (``n`` x ``k``, 2 bits, 16 words along K, groups of 128)::

    codes   tile 0 (rows 0..63)                                         tile 1 ..
            span 0 (256 columns)              span 1 ..
            row 0: 16 int32 | row 1 | .. | row 63       span_words = word_blocks * ROWS * 16
            int32 i:  high half [f7 f6 .. f1 f0] low half [f7 f6 .. f1 f0]
                      field f: columns 32 * f + 2 * i + 1 and 32 * f + 2 * i of the span

    3 bits  three word blocks of a span, each with all rows: fields 0..4, 5..9, 10..14, a spare bit on top of each half
            that together are field 15
    8 bits  two word blocks: fields 0 and 1, fields 2 and 3

    scales  tile 0: group 0: (s, m) of row 0, row 1, .., row 63 | group 1 .. | tile 1 ..

:data:`ROWS` is the one number to change for tiles of another height; ``gemq.format`` and ``csrc/include/gemq`` state
the same layout for the packers, and tests and ``static_assert`` hold them together. :func:`fields` and the like are
evaluated at compile time inside a kernel and are plain functions outside.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# (qweight uint8, meta float16, expert_bits int32 [E], expert_offsets int64 [E] bytes, meta_offsets int64 [E] elements)
Stack = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

# rows of a tile: a power of two, and at least the rows that four warps load words of at once
ROWS = 64
WIDTHS = (1, 2, 3, 4, 8)

# columns of K that the prefill kernels multiply at a time, two halves
STEP_COLUMNS = 64


def _constant(value):
    """As kernels may read it: the compiler asks for a constexpr, the interpreter, which has none, for a number."""
    return value if triton.knobs.runtime.interpret else tl.constexpr(value)


TILE_ROWS = _constant(ROWS)
WIDTH_OF = _constant(WIDTHS)
STEP = _constant(STEP_COLUMNS)
HALF_STEP = _constant(STEP_COLUMNS // 2)
# threads of a warp: ROW_LANES rows lie side by side, K_LANES threads share a row (the tensor core's fragments)
WARP = _constant(32)
ROW_LANES = _constant(8)
K_LANES = _constant(4)
# int32 of a cache line of 128 bytes
LINE = _constant(32)

if ROWS < 32 or ROWS & (ROWS - 1):
    raise ImportError(f"a gpu_tile must have 32 rows or a larger power of two, not {ROWS}")


@triton.constexpr_function
def word_blocks(bits: int) -> int:
    """int32 words that hold a span's fields, one block of ``ROWS * KW`` words after the other."""
    return {3: 3, 8: 2}.get(bits, 1)


@triton.constexpr_function
def fields(bits: int) -> int:
    """Fields of a span. Each is in both halves of its words; field 15 of 3 bits is in the spare bits of all three."""
    return 16 if bits == 3 else 16 // bits * word_blocks(bits)


@triton.constexpr_function
def span_columns(bits: int, kw: int) -> int:
    """Columns of a span: a field is ``kw`` words of two columns."""
    return 2 * kw * fields(bits)


@triton.constexpr_function
def span_words(bits: int, kw: int) -> int:
    """int32 from one span of a tile to the next."""
    return word_blocks(bits) * ROWS * kw


@triton.constexpr_function
def stored_bits(bits: int) -> int:
    """The width that codes of ``bits`` are stored with."""
    return bits if bits in (0, *WIDTHS) else 8


@triton.constexpr_function
def width_index(bits: int) -> int:
    """Place of a stored width among :data:`WIDTHS`, which is the order of everything that comes once a width."""
    return sum(width < bits for width in WIDTHS)


LARGEST_SPAN = max(span_columns(bits, 16) for bits in WIDTHS)


def words_along_k(k: int, bits: int) -> int:
    """int32 words along K of a tile: 16 or 8, the one that pads ``k`` less, 16 on a tie."""
    wide, narrow = span_columns(bits, 16), span_columns(bits, 8)
    return 8 if -(-k // narrow) * narrow < -(-k // wide) * wide else 16


def all_words_along_k(k: int) -> tuple[int, ...]:
    """:func:`words_along_k` of every width, in the order of :data:`WIDTHS`."""
    return tuple(words_along_k(k, bits) for bits in WIDTHS)


def padded_columns(k: int) -> int:
    """Columns of the normalised activations: zeros up to a whole span, and one largest span of zeros more.

    A warp that has no span left multiplies against that last one.
    """
    return -(-k // LARGEST_SPAN) * LARGEST_SPAN + LARGEST_SPAN
