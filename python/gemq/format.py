"""The weight format: what a packed matrix is, on disk and in memory, and how large.

A matrix of ``n`` rows and ``k`` columns quantized to ``bits`` is two buffers.

*Codes*, canonical layout: row after row, each a dense little-endian bit stream; code ``j`` of a row sits in
bits ``[j * bits, (j + 1) * bits)`` of that row. Three codes of 3 bits, 5, 1 and 6::

    code 2  code 1  code 0
      110     001     101      ->  bytes 0b10001101, 0b00000001  (bit 0 first)

*Metadata*: for each (row, group of ``group_size`` columns) two float16 numbers ``(s, m)``; a weight is
``w = q * s + m``. ``m = -s * z`` is rounded once, when quantizing; every reader uses the stored ``m``.

A width of 0 stores nothing and contributes zero. Bits of one weight: its width, and 32 bits of ``(s, m)`` over the
group size: 0.25 at 128 columns, 0.5 at 64, 1 at 32.

::

    canonical  [row 0: codes, whole bytes][row 1] ..          (s, m) [row][group]
    cpu_tile   [16 rows][group][plane][64 bytes] ..           s of 16 rows, m of 16 rows [block][group]
    gpu_tile   [64 rows][span][word][row][i] ..               (s, m) of 64 rows [tile][group]

    bits a weight at groups of 128, where rows fill blocks and columns fill spans:
    width                 1     2     3     4     5     6     7     8
    canonical, cpu_tile   1.25  2.25  3.25  4.25  5.25  6.25  7.25  8.25
    gpu_tile              1.25  2.25  3.25  4.25  8.25  8.25  8.25  8.25

Kernels read *tiles*, permutations of the canonical buffers made by :func:`gemq.ops.repack`:

``cpu_tile``
    16 rows a block. The code is cut into planes of 4, 2 and 1 bits from its low end (3 = 2 + 1; 8 stays
    whole). A plane of ``p`` bits is a run of 64-byte vectors: byte ``4 * row + j`` of vector ``v`` holds
    in its bits ``[p * f, p * (f + 1))`` the code of column ``v * 32 / p + 4 * f + j``. Order: block,
    group, plane, vector. Metadata: block, group, then 16 ``s`` and 16 ``m``.
``gpu_tile``
    64 rows a tile. A span of columns is ``F`` fields of ``2 * KW`` contiguous columns; field ``f`` of the
    low (high) half of int32 word ``i`` holds column ``f * 2 * KW + 2 * i`` (``+ 1``) of the span.
    Widths 1, 2 and 4 use one word for ``F`` = 16, 8, 4 fields; 8 uses two words of 2 fields; 3 uses three
    words of 5 fields, whose spare top bits hold bit 0, 1 and 2 of field 15. 5, 6 and 7 bits are stored as 8.
    Order: tile of 64 rows, span, word, row, ``i``. Metadata: tile, group, row, ``(s, m)``.

Rows are padded with zeros to the block, columns of ``gpu_tile`` to the span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LAYOUTS = ("canonical", "cpu_tile", "gpu_tile")
MAX_BITS = 8
# the width that stands for "left in 16 bits"; never a width of packed codes
UNQUANTIZED = 16
# widths of embeddings and heads
END_BITS = (4, 5, 6, 7, 8)
GROUP_SIZES = (32, 64, 128)

CPU_ROWS = 16
GPU_ROWS = 64
# words per (row, i), and fields per half over those words, by width
GPU_WORDS = {1: 1, 2: 1, 3: 3, 4: 1, 8: 2}
GPU_FIELDS = {1: 16, 2: 8, 3: 16, 4: 4, 8: 4}


def check_bits(bits: int, *, allow_zero: bool = False, name: str = "bits") -> int:
    """Return ``bits`` if it is a width of the format, else raise ``ValueError``."""
    low = 0 if allow_zero else 1
    if isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= MAX_BITS:
        raise ValueError(f"{name} must be an integer in {low}..{MAX_BITS}, got {bits!r}")
    return bits


def check_layout(layout: str) -> str:
    """Return ``layout`` if it is one of :data:`LAYOUTS`, else raise ``ValueError``."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    return layout


def check_group_size(group_size: int, k: int) -> int:
    """Return ``group_size`` if it divides ``k`` and is supported, else raise ``ValueError``."""
    # a tuple, not a union: torch 2.8 cannot trace a union
    if isinstance(group_size, (bool, float)) or group_size not in GROUP_SIZES:
        raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {group_size!r}")
    if k <= 0 or k % group_size:
        raise ValueError(f"the number of columns k={k} must be a positive multiple of group_size={group_size}")
    return group_size


def default_group_size(k: int, preferred: int = 128) -> int:
    """The group size used for ``k`` columns: ``preferred``, or the next smaller one that divides ``k``.

    Raises ``ValueError`` if none of :data:`GROUP_SIZES` does.
    """
    for size in sorted(GROUP_SIZES, reverse=True):
        if size <= preferred and k % size == 0:
            return size
    raise ValueError(f"k={k} columns cannot be grouped: it must be a multiple of {min(GROUP_SIZES)}")


def by_weight(gate_up: Sequence[int], down: Sequence[int]) -> list[int]:
    """Widths of experts' projections (gate, up and down), each repeated by its third of the expert's weights."""
    return [*gate_up, *gate_up, *down]


def mean_width(gate_up: Sequence[int], down: Sequence[int]) -> float:
    """Mean width of experts' weights."""
    found = by_weight(gate_up, down)
    return sum(found) / len(found)


def row_bytes(k: int, bits: int) -> int:
    """Bytes of one canonical row of ``k`` codes."""
    return (k * bits + 7) // 8


def cpu_planes(bits: int) -> list[tuple[int, int]]:
    """Planes of the ``cpu_tile`` layout as ``(width, shift of its lowest bit in the code)``."""
    if bits == 8:
        return [(8, 0)]
    planes, shift = [], 0
    for width in (4, 2, 1):
        if bits & width:
            planes.append((width, shift))
            shift += width
    return planes


def gpu_bits(bits: int) -> int:
    """The width that ``gpu_tile`` stores ``bits`` with."""
    return bits if bits in GPU_WORDS or bits == 0 else 8


def gpu_kw(k: int, bits: int) -> int:
    """Words along K of a ``gpu_tile`` (16 or 8): the one that pads ``k`` less, 16 on a tie."""
    fields = GPU_FIELDS[gpu_bits(bits)]
    padded = {kw: -(-k // (2 * kw * fields)) * 2 * kw * fields for kw in (16, 8)}
    return 8 if padded[8] < padded[16] else 16


def gpu_spans(k: int, bits: int) -> tuple[int, int]:
    """``(number of spans, columns a span)`` of a ``gpu_tile`` matrix with ``k`` columns."""
    span = 2 * gpu_kw(k, bits) * GPU_FIELDS[gpu_bits(bits)]
    return -(-k // span), span


def codes_bytes(n: int, k: int, bits: int, layout: str = "canonical") -> int:
    """Bytes of the codes of an ``n`` x ``k`` matrix in ``layout``."""
    check_layout(layout)
    if bits == 0:
        return 0
    if layout == "canonical":
        return n * row_bytes(k, bits)
    if layout == "cpu_tile":
        return -(-n // CPU_ROWS) * CPU_ROWS * k * bits // 8
    spans, _ = gpu_spans(k, bits)
    words = GPU_WORDS[gpu_bits(bits)]
    return -(-n // GPU_ROWS) * spans * words * GPU_ROWS * gpu_kw(k, bits) * 4


def meta_elements(n: int, k: int, bits: int, group_size: int, layout: str = "canonical") -> int:
    """float16 elements of the metadata of an ``n`` x ``k`` matrix in ``layout``."""
    check_layout(layout)
    if bits == 0:
        return 0
    block = {"canonical": 1, "cpu_tile": CPU_ROWS, "gpu_tile": GPU_ROWS}[layout]
    return -(-n // block) * block * (k // group_size) * 2


@dataclass(frozen=True)
class ExpertLayout:
    """Location of each expert of a stack in the flat buffers.

    ``code_offsets`` are bytes into the codes, ``meta_offsets`` float16 elements into the metadata; both are
    the running sums of the experts' sizes, in expert order, with no gaps.
    """

    bits: tuple[int, ...]
    code_offsets: tuple[int, ...]
    meta_offsets: tuple[int, ...]
    code_bytes: int
    meta_elements: int


def expert_layout(bits: list[int] | tuple[int, ...], n: int, k: int, group_size: int, layout: str) -> ExpertLayout:
    """Offsets and total sizes of a stack of ``len(bits)`` experts of ``n`` x ``k`` in ``layout``.

    Raises ``ValueError`` for a width outside 0..8, an unknown layout or a group size that does not divide ``k``.
    """
    check_group_size(group_size, k)
    codes, metas, code_at, meta_at = [], [], 0, 0
    for index, width in enumerate(bits):
        check_bits(width, allow_zero=True, name=f"expert_bits[{index}]")
        codes.append(code_at)
        metas.append(meta_at)
        code_at += codes_bytes(n, k, width, layout)
        meta_at += meta_elements(n, k, width, group_size, layout)
    return ExpertLayout(tuple(bits), tuple(codes), tuple(metas), code_at, meta_at)
