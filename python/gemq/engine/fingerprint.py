"""What a run was made of, by content: the model's files, the tokens, the options, the code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from gemq import __version__
from gemq.algorithms.costs import Costs

# folders and modules of the package that decide what a run writes
_DECIDING = (
    "algorithms", "engine", "models", "nn", "ops", "reference", "checkpoint.py", "durable.py", "format.py", "hf.py",
    "integrity.py", "packed_config.py", "_core.py",
)
Progress = Callable[[int, int], None]


def digest(*values: Any) -> str:
    """SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def of_model(folder: Path, files: list[Path], progress: Progress | None = None) -> dict[str, str]:
    """SHA-256 of every weight file and of ``config.json``, by name."""
    found, named = {}, [folder / "config.json", *files]
    for at, file in enumerate(named):
        with file.open("rb") as handle:
            found[file.name] = hashlib.file_digest(handle, "sha256").hexdigest()
        if progress:
            progress(at + 1, len(named))
    return found


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
    """Versions, and a digest of the sources and the extension that decide the result."""
    root = Path(__file__).parent.parent
    sums = hashlib.sha256()
    for name in _DECIDING:
        path = root / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            sums.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    extension = importlib.util.find_spec("gemq._C")
    sums.update(Path(extension.origin).read_bytes())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    return {"gemq": __version__, "sources": sums.hexdigest(), **versions}


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """What changed between two JSON values, a line each: ``options.budgets was [2.5], is [2.0]``."""
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
