"""Read tensors of safetensors files straight into their destination: none exists twice, no page of a file is mapped.

A hub checkpoint has a matrix per expert and projection; the model has stacks of them, gate and up joined. What
transformers' conversion mapping does by stacking and joining is done here by reading each matrix into its place.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from gemq.errors import CheckpointError
from gemq.integrity import TensorEntry


def read_into(file: Path, entry: TensorEntry, out: Tensor) -> None:
    """Fill contiguous ``out`` with a tensor of a file. Raises :class:`CheckpointError` where the file ends."""
    data = out.view(-1).view(torch.uint8).numpy().data
    with file.open("rb", buffering=0) as handle:
        handle.seek(entry.start)
        while len(data):
            count = handle.readinto(data)
            if not count:
                raise CheckpointError(f"{file} ends before its last tensor")
            data = data[count:]


def same_tensor(first: tuple[Path, TensorEntry], second: tuple[Path, TensorEntry]) -> bool:
    """Compare two tensors of files, each ``(file, entry)``, bit by bit and a piece at a time."""
    (file, entry), (other, twin) = first, second
    if (entry.dtype, entry.shape) != (twin.dtype, twin.shape):
        return False
    with file.open("rb") as one, other.open("rb") as two:
        one.seek(entry.start)
        two.seek(twin.start)
        left = entry.bytes
        while left:
            size = min(left, 1 << 22)
            if one.read(size) != two.read(size):
                return False
            left -= size
    return True


def stacked(converter: WeightConverter) -> bool:
    """Return True if a conversion only stacks experts' matrices and joins their kinds along the rows."""
    kinds = [(type(op), op.dim) for op in converter.operations if isinstance(op, (MergeModulelist, Concatenate))]
    return (
        len(kinds) == len(converter.operations) and len(converter.target_patterns) == 1
        and kinds in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])
    )


def places(converter: WeightConverter, sources: dict[str, str | None]) -> list[list[str]]:
    """The checkpoint's names of a stack by kind (gate before up) and expert; ``sources`` gives each name's pattern."""
    kinds: dict[str | None, list[str]] = {pattern: [] for pattern in converter.source_patterns}
    for name, pattern in sources.items():
        kinds[pattern].append(name)
    return [sorted(names, key=_numbers) for names in kinds.values()]


def _numbers(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]
