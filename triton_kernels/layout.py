"""Sizes of the ``gpu_tile`` format that the launchers need; mirrors ``gemq.format``, which documents it."""

from __future__ import annotations

ROWS = 64
WIDTHS = (1, 2, 3, 4, 8)
# fields of a span, by width
FIELDS = {1: 16, 2: 8, 3: 16, 4: 4, 8: 4}
LARGEST_SPAN = 512


def words_along_k(k: int, bits: int) -> int:
    """int32 words along K of a tile: 16 or 8, the one that pads ``k`` less, 16 on a tie."""
    wide, narrow = 32 * FIELDS[bits], 16 * FIELDS[bits]
    return 8 if -(-k // narrow) * narrow < -(-k // wide) * wide else 16


def padded_columns(k: int) -> int:
    """Columns of the normalised activations: zeros up to a whole span, and one largest span of zeros more.

    A warp that has no span left multiplies against that last one.
    """
    return -(-k // LARGEST_SPAN) * LARGEST_SPAN + LARGEST_SPAN
