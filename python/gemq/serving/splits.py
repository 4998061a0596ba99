"""Cut canonical buffers of packed matrices for tensor parallelism: whole rows, or columns at borders of 32.

A column cut may divide a group of 64 or 128 columns: both sides keep its scale and offset, each as a smaller group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemq import format as fmt
from gemq.errors import GemqError

# a row of 32 codes of any width ends with a byte
UNIT = 32
_MOST_RANKS = 64


class ServingError(GemqError, ValueError):
    """A checkpoint, or a way of splitting a model, that a serving plug-in does not run."""


@dataclass(frozen=True)
class Rank:
    """This process's place among those that share a layer."""

    index: int = 0
    size: int = 1


@dataclass(frozen=True)
class Matrix:
    """An ``n`` x ``k`` matrix of one width, its columns in groups of the size that ``preferred`` gives."""

    n: int
    k: int
    bits: int
    preferred: int

    @property
    def group(self) -> int:
        """Columns of a group."""
        return fmt.default_group_size(self.k, self.preferred)

    def elements(self, kind: str) -> int:
        """Bytes of the canonical codes, or float16 elements of the metadata (``kind`` "codes" or "meta")."""
        if kind == "codes":
            return fmt.codes_bytes(self.n, self.k, self.bits)
        return fmt.meta_elements(self.n, self.k, self.bits, self.group)

    def row_elements(self, kind: str) -> int:
        """The elements of one row."""
        return Matrix(1, self.k, self.bits, self.preferred).elements(kind)

    def cut(self, kind: str, stored: Tensor, rows: Sequence[slice], columns: slice) -> Tensor:
        """The flat buffer of some rows and columns of the flat buffer ``stored``; the columns' ends are multiples of
        :data:`UNIT`."""
        if self.bits == 0:
            return stored
        width = columns.stop - columns.start
        if kind == "codes":
            view, first = stored.view(self.n, -1), columns.start * self.bits // 8
            last = first + fmt.row_bytes(width, self.bits)
        else:
            group = fmt.default_group_size(width, self.preferred)
            view = stored.view(self.n, self.k // self.group, 2)
            # of a group that the cut divides, each part has all of the scale
            view = view.repeat_interleave(self.group // group, 1) if group != self.group else view
            first, last = columns.start // group, columns.stop // group
        return torch.cat([view[row, first:last].reshape(-1) for row in rows])


def check_columns(prefix: str, whole: int, size: int) -> None:
    """Raise :class:`ServingError` unless ``whole`` columns of packed rows can be divided among ``size`` ranks."""
    if whole % (size * UNIT):
        good = [count for count in range(1, _MOST_RANKS + 1) if whole % (count * UNIT) == 0]
        raise ServingError(
            f"{prefix}: {whole} columns of packed rows are not divided into {size} parts of a multiple of {UNIT}; "
            f"tensor parallel sizes that work for it: {', '.join(map(str, good))}"
        )


def own_rows(prefix: str, stored: int, local: int, rank: Rank, repeated: bool) -> slice:
    """The rows of a matrix of ``stored`` rows that this rank's ``local`` ones are. ``repeated``: ranks may share some,
    as those of keys and values that have fewer heads than there are ranks.

    Raises :class:`ServingError` for rows that are not those of the ranks.
    """
    pieces = stored // local
    if stored % local or rank.size % max(pieces, 1) or not (pieces == rank.size or repeated):
        raise ServingError(f"{prefix}: {stored} rows are not {rank.size} parts of {local}")
    at = rank.index * pieces // rank.size * local
    return slice(at, at + local)
