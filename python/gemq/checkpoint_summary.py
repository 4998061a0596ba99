"""Summary of a packed checkpoint, read from its config and file headers alone."""

from __future__ import annotations

import os
from dataclasses import dataclass

from gemq.checkpoint import load_packed_config
from gemq.folders import checkpoint_folder
from gemq.integrity import read_header, weight_files
from gemq.packed_config import PackedConfig


@dataclass(frozen=True)
class Summary:
    """Bytes by kind of tensor, file bytes, and the mean width of routed experts."""

    config: PackedConfig
    bytes_by_kind: dict[str, int]
    file_bytes: int
    expert_bits: float

    @property
    def tensor_bytes(self) -> int:
        """Sum over all tensors."""
        return sum(self.bytes_by_kind.values())


def _kind(name: str) -> str:
    suffix = name.rsplit("_", 1)[-1]
    if suffix not in ("codes", "meta"):
        return "unquantized"
    owner = "experts" if ".experts." in name else "shared experts" if "shared_expert" in name else (
        "attention" if "_attn." in name else "dense MLP" if ".layers." in name else "head and embedding"
    )
    return f"{owner} {suffix}"


def summarize(path: str | os.PathLike) -> Summary:
    """Summarize a checkpoint, a folder or hub name, without loading weights. Raises :class:`CheckpointError`."""
    folder = checkpoint_folder(path)
    config = load_packed_config(folder)
    files = weight_files(folder)
    kinds: dict[str, int] = {}
    for file in files:
        for name, entry in read_header(file).items():
            kinds[_kind(name)] = kinds.get(_kind(name), 0) + entry.bytes
    return Summary(
        config, dict(sorted(kinds.items())), sum(f.stat().st_size for f in files), config.widths.bits_per_expert
    )
