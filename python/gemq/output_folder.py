"""Whether a folder may be written, said before any work."""

from __future__ import annotations

import os
from pathlib import Path

from gemq.errors import CheckpointError
from gemq.integrity import read_json


def check_output(path: str | os.PathLike, source: str | os.PathLike | None = None, overwrite: bool = False) -> Path:
    """The output folder, checked before any work: not the source, not in use, writable.

    ``overwrite`` replaces a gemq checkpoint, never a folder of other things. Raises :class:`CheckpointError` naming
    the folder and the way out.
    """
    target = Path(path)
    if source is not None and Path(source).exists() and Path(source).resolve().is_relative_to(target.resolve()):
        raise CheckpointError(f"the output {target} is the model itself or holds it; choose another folder")
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"the output {target} exists and is not a folder")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise CheckpointError(f"the output folder {target} is not empty; choose another or pass --overwrite")
        if not _is_packed(target):
            raise CheckpointError(f"the output folder {target} holds other things than a checkpoint; choose another")
    parent = next(p for p in target.absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"the output folder {target} cannot be written: {parent} is not a writable folder")
    return target


def _is_packed(folder: Path) -> bool:
    try:
        quantization = read_json(folder / "config.json").get("quantization_config")
    except CheckpointError:
        return False
    return isinstance(quantization, dict) and quantization.get("quant_method") == "gemq"
