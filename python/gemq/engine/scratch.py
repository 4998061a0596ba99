"""Calibration activations, batch by batch: in memory, or in files that a resumed run can trust.

An array is written once, in order, and read by batch. On disk it is ``<name>.bin``, the batches one after another,
and ``<name>.index``, sealed: dtype, shapes and the CRC-32 of each batch. An array whose index is missing or whose
bytes do not fit it does not exist.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gemq import durable
from gemq.errors import CheckpointError


class Writer:
    """Writer of the batches of one array, in order."""

    def __init__(self, handle: BinaryIO | None = None):
        self.handle = handle
        self.batches: list[Tensor] = []
        self.index: list[list[Any]] = []
        self._at = 0

    def append(self, batch: Tensor) -> None:
        """Add the next batch."""
        batch = batch.detach().cpu().contiguous()
        if self.handle is None:
            self.batches.append(batch.clone())
            return
        data = batch.view(-1).view(torch.uint8).numpy().data
        durable.passing("write scratch")
        self.handle.write(data)
        self.index.append([str(batch.dtype).removeprefix("torch."), list(batch.shape), self._at, zlib.crc32(data)])
        self._at += data.nbytes


class Scratch:
    """Named arrays of batches in ``folder``, or in memory for None."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self._memory: dict[str, list[Tensor]] = {}
        self._indices: dict[str, list] = {}
        # batches that were read whole and found to be what was written
        self._sound: set[tuple[str, int]] = set()
        if folder is not None:
            with durable.explained(folder):
                folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def writing(self, name: str, lasting: bool = False) -> Iterator[Writer]:
        """Write the array ``name``; it exists once the block ends. ``lasting``: also for a later process."""
        if self.folder is None:
            writer = Writer()
            yield writer
            self._memory[name] = writer.batches
            return
        partial, final = self._file(name, ".tmp"), self._file(name, ".bin")
        self.drop(name)
        with durable.explained(final), partial.open("wb") as handle:
            writer = Writer(handle)
            yield writer
        with durable.explained(final):
            if lasting:
                durable.sync(partial)
            durable.rename(partial, final)
        if lasting:
            durable.seal_json(self._file(name, ".index"), writer.index)
        self._indices[name] = writer.index

    def _file(self, name: str, suffix: str) -> Path:
        assert self.folder is not None
        return self.folder / (name + suffix)

    def batch(self, name: str, at: int) -> Tensor:
        """Batch ``at`` of an array, on the CPU. Raises :class:`CheckpointError` for bytes that changed."""
        if self.folder is None:
            return self._memory[name][at]
        return self._read(name, self._indices[name][at])

    def rows(self, name: str, at: int, which: Tensor | slice) -> Tensor:
        """Rows ``which`` of batch ``at``, on the CPU. The batch is read through the first time; afterwards only what
        is asked for. Raises :class:`CheckpointError` as :meth:`batch`."""
        if self.folder is None:
            return self._memory[name][at][which]
        dtype, shape, offset, _ = entry = self._indices[name][at]
        count = torch.Size(shape).numel() * getattr(torch, dtype).itemsize
        if (name, at) not in self._sound or not count:
            found = self._read(name, entry)
            self._sound.add((name, at))
            return found[which]
        # mode "c" never writes: torch warns of arrays that cannot be written to
        mapped = np.memmap(self._file(name, ".bin"), np.uint8, "c", offset, (count,))
        found = torch.from_numpy(mapped).view(getattr(torch, dtype)).view(shape)[which]
        # not a view: the mapping ends here
        return found.clone() if isinstance(which, slice) else found

    def _read(self, name: str, entry: list) -> Tensor:
        dtype, shape, offset, checksum = entry
        out = torch.empty(shape, dtype=getattr(torch, dtype))
        data = out.view(-1).view(torch.uint8).numpy().data
        with self._file(name, ".bin").open("rb", buffering=0) as handle:
            handle.seek(offset)
            filled = 0
            while filled < data.nbytes:
                count = handle.readinto(data[filled:])
                if not count:
                    break
                filled += count
        if filled != data.nbytes or zlib.crc32(data) != checksum:
            self.drop(name)
            raise CheckpointError(
                f"the scratch file {self._file(name, '.bin')} is corrupt; it was removed, the same command continues"
            )
        return out

    def sound(self, name: str) -> bool:
        """Return True if the array is complete: every byte of it is there and passes its check."""
        if self.folder is None:
            return name in self._memory
        index = durable.unseal_json(self._file(name, ".index"))
        if index is None or not self._file(name, ".bin").is_file():
            return False
        try:
            for entry in index:
                self._read(name, entry)
        except (CheckpointError, OSError):
            return False
        self._indices[name] = index
        return True

    def drop(self, name: str) -> None:
        """Delete an array."""
        self._memory.pop(name, None)
        self._indices.pop(name, None)
        self._sound = {known for known in self._sound if known[0] != name}
        if self.folder is not None:
            for suffix in (".index", ".bin", ".tmp"):
                durable.remove(self._file(name, suffix))
