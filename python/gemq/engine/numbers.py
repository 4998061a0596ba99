"""Find NaN, infinity and numbers out of range, which no quantizer can use, while a model's files are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

from gemq.errors import CheckpointError
from gemq.integrity import TensorEntry
from gemq.tensor_files import DTYPES

# bytes that are read and looked at together: they stay in a near cache
_PIECE = 1 << 20


class Numbers:
    """Reads files that were indexed by their ``headers``, and looks at every tensor of floating-point numbers.

    ``kind`` gives the dtype that a tensor of the checkpoint is stored in at last, which bounds it, or None for one
    that is not used.
    """

    def __init__(self, headers: dict[Path, dict[str, TensorEntry]], kind: Callable[[str], torch.dtype | None]):
        self._headers, self._kind = headers, kind

    def __contains__(self, file: Path) -> bool:
        return file in self._headers

    def read(self, file: Path, handle: BinaryIO) -> str:
        """The SHA-256 of ``file``, read from the start of ``handle``.

        Raises :class:`CheckpointError` naming the first tensor whose numbers are not finite, or not in its dtype.
        """
        sums, at = hashlib.sha256(), 0
        for name, entry in sorted(self._headers[file].items(), key=lambda item: item[1].start):
            at += self._pass(handle, entry.start - at, sums)
            kind = self._kind(name) if DTYPES.get(entry.dtype, torch.int8).is_floating_point else None
            left = entry.bytes
            while left:
                data = bytearray(handle.read(min(left, _PIECE)))
                if not data:
                    raise CheckpointError(f"{file} ends before its last tensor")
                sums.update(data)
                if kind is not None:
                    self._look(file, name, entry, entry.bytes - left, data, kind)
                left -= len(data)
            at += entry.bytes
        self._pass(handle, -1, sums)
        return sums.hexdigest()

    @staticmethod
    def _pass(handle: BinaryIO, size: int, sums: hashlib._Hash) -> int:
        data = handle.read(size)
        sums.update(data)
        return len(data)

    @staticmethod
    def _look(file: Path, name: str, entry: TensorEntry, start: int, data: bytearray, kind: torch.dtype) -> None:
        dtype = DTYPES[entry.dtype]
        values = torch.frombuffer(data, dtype=dtype)
        extremes = torch.stack(torch.aminmax(values))
        # NaN passes through the extremes
        if bool(torch.isfinite(extremes.to(kind)).all()):
            return
        wrong = ~torch.isfinite(values.to(kind))
        index = int(wrong.int().argmax())
        value, at = float(values[index]), start // dtype.itemsize + index
        what = "NaN" if value != value else "infinity" if abs(value) == float("inf") else (
            f"{value:g}, beyond {torch.finfo(kind).max:g}, the largest number of {str(kind).removeprefix('torch.')}"
        )
        raise CheckpointError(
            f"{file}: the tensor {name} of shape {entry.shape} holds {what} at index {at:,}: the model cannot be "
            f"quantized"
        )
