"""Fingerprints of a run by content: the model's files, the tokens, the options, the code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from gemq import __version__
from gemq.algorithms.costs import Costs
from gemq.engine.numbers import Numbers
from gemq.errors import CheckpointError

# folders and modules of the package that decide what a run writes
_DECIDING = (
    "algorithms", "engine", "models", "nn", "ops", "reference", "checkpoint.py", "durable.py", "format.py", "hf.py",
    "integrity.py", "packed_config.py", "packed_model.py", "widths.py", "_core.py",
)
Progress = Callable[[int, int], None]


def digest(*values: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


class SourceWatch:
    """State of a model's files when a run began, to detect files that change during the run.

    ``sums`` are SHA-256 sums by file name, None until :meth:`read`.
    """

    def __init__(self, files: list[Path]):
        self.files = list(files)
        self._seen = {file: _state(file) for file in self.files}
        self.sums: dict[str, str] | None = None

    def check(self) -> None:
        """Compare size, time and inode, cheaply. Raises :class:`CheckpointError` naming the file that changed."""
        for file, before in self._seen.items():
            if _state(file) != before:
                self._refuse(file)

    def read(self, progress: Progress | None = None, numbers: Numbers | None = None) -> dict[str, str]:
        """SHA-256 of every file by name, kept; ``progress(done, total)`` counts files, ``numbers`` looks at the
        weights on the way.

        Raises :class:`CheckpointError` for a file that is not what an earlier call read, or that changed since.
        """
        found = {}
        for at, file in enumerate(self.files):
            try:
                with file.open("rb") as handle:
                    look = numbers if numbers is not None and file in numbers else None
                    found[file.name] = _sum(handle) if look is None else look.read(file, handle)
            except OSError as error:
                raise CheckpointError(f"{file} of the model could not be read: {error.strerror}") from error
            if self.sums is not None and self.sums[file.name] != found[file.name]:
                self._refuse(file)
            if progress:
                progress(at + 1, len(self.files))
        self.check()
        self.sums = found
        return found

    def _refuse(self, file: Path) -> None:
        raise CheckpointError(
            f"{file} of the model changed while it was being quantized; nothing was saved of it: give the run a model "
            f"that stays as it is, and begin again with --changed restart"
        )


def _sum(handle: io.BufferedReader) -> str:
    return hashlib.file_digest(handle, "sha256").hexdigest()


def _state(file: Path) -> tuple[int, int, int, int] | None:
    """Size, time of the last change, and inode of a file; None if it is gone."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino


def of_windows(windows: Tensor) -> str:
    """Shape and SHA-256 of token windows."""
    shape = "x".join(map(str, windows.shape))
    return f"{shape} {hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()}"


def of_costs(costs: Costs) -> str:
    """SHA-256 of coefficients that a run starts from."""
    sums = hashlib.sha256(repr((costs.candidates, costs.layers, costs.shared_multiple)).encode())
    for array in (costs.routed, costs.shared, costs.matrices):
        sums.update(b"" if array is None else array.tobytes())
    return f"costs {sums.hexdigest()}"


@cache
def of_code() -> dict[str, str]:
    """Versions, and a digest of the sources and of the extension that decide the result."""
    root = Path(__file__).parent.parent
    sums = hashlib.sha256()
    for name in _DECIDING:
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            sums.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    extension: Any = importlib.util.find_spec("gemq._C")
    sums.update(Path(extension.origin).read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"gemq": __version__, "sources": sums.hexdigest(), **versions}


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """List the changes between two JSON values, a line each: ``options.budgets was [2.5], is [2.0]``."""
    if isinstance(before, dict) and isinstance(now, dict):
        lines = []
        for key in sorted({*before, *now}):
            inner = f"{name}.{key}" if name else key
            lines += differences(before.get(key), now.get(key), inner)
        return lines
    return [] if before == now else [f"{name} was {_short(before)}, is {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}...{text[-12:]}"
