"""Write a checkpoint tensor by tensor, so that it may be larger than memory."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from gemq.integrity import INDEX_FILE, WEIGHTS_FILE
from gemq.tensor_files import check_finite

_METADATA = {"format": "pt"}


class ShardWriter:
    """Collects tensors and writes a shard whenever ``shard_bytes`` are together; :meth:`finish` names them.

    One shard is named ``model.safetensors``; several get transformers' names and an index. Used on a folder that
    nobody reads yet: the files get their names at the end.
    """

    def __init__(self, folder: Path, shard_bytes: int):
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
        self.folder, self.shard_bytes = folder, shard_bytes
        self.total = 0
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._parts: list[list[str]] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; a shard is written before it if it would grow too large."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self.shard_bytes:
            self._flush()
        if name in self._waiting or any(name in part for part in self._parts):
            raise ValueError(f"the tensor {name} comes twice")
        self._waiting[name] = check_finite(name, tensor.detach().cpu()).contiguous()
        self._waiting_bytes += size
        self.total += size

    def _flush(self) -> None:
        save_file(self._waiting, self._temporary(len(self._parts)), metadata=_METADATA)
        self._parts.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0

    def _temporary(self, part: int) -> Path:
        return self.folder / f".part-{part}.safetensors"

    def finish(self) -> list[Path]:
        """Write what is left, give the shards their names, and return them."""
        if self._waiting or not self._parts:
            self._flush()
        count = len(self._parts)
        names = [WEIGHTS_FILE] if count == 1 else [
            f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
        ]  # fmt: skip
        for part, name in enumerate(names):
            self._temporary(part).rename(self.folder / name)
        if count > 1:
            index = {
                "metadata": {"total_size": self.total},
                "weight_map": {key: name for name, part in zip(names, self._parts, strict=True) for key in part},
            }
            (self.folder / INDEX_FILE).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        return [self.folder / name for name in names]


# more bytes than any disk has
_DIGITS = 18


def parse_size(text: str) -> int:
    """``"5GB"``, ``"30KB"`` or a number of bytes, in powers of 1000; ``ValueError`` for another text."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}
    number = text.strip().upper().rstrip("BGKM")
    unit = text.strip().upper()[len(number) :]
    if not number.isdecimal() or len(number) > _DIGITS or unit not in units or int(number) < 1:
        raise ValueError(f"a shard's size must be like 5GB, 500MB or 30KB, got {text!r:.60}")
    return int(number) * units[unit]
