"""Judge where a command may write, before any work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from gemq.errors import CheckpointError
from gemq.folders import is_known
from gemq.integrity import MANIFEST_FILE, read_json

# bytes of a log's first line that are looked at
_FIRST_LINE = 1 << 16


def check_output(path: str | os.PathLike, source: str | os.PathLike | None = None, overwrite: bool = False) -> Path:
    """The output folder, checked before any work: not the source, not in use, writable.

    ``overwrite`` replaces a gemq checkpoint, never a folder of other things. Raises :class:`CheckpointError` naming
    the folder and the way out.
    """
    if not os.fspath(path):
        raise CheckpointError("the output must be the path of a folder, got ''")
    target = Path(path)
    if source is not None and Path(source).exists():
        _check_apart(target, Path(source))
    # of a/.. where there is no a, too
    real = target.resolve()
    if real.exists() and not real.is_dir():
        raise CheckpointError(f"the output {target} exists and is not a folder")
    if real.is_dir():
        _check_replaceable(target, real, overwrite)
    parent = next((p for p in real.parents if p.exists()), real)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"the output folder {target} cannot be written: {parent} is not a writable folder")
    return target


def _check_apart(target: Path, source: Path) -> None:
    real, model = target.resolve(), source.resolve()
    if model.is_relative_to(real):
        raise CheckpointError(f"the output {target} is the model itself or holds it; choose another folder")
    if model.is_dir() and real.is_relative_to(model):
        raise CheckpointError(f"the output {target} lies in the model's folder {source}; choose another folder")


def _check_replaceable(target: Path, real: Path, overwrite: bool) -> None:
    if any(real.iterdir()):
        if not overwrite:
            raise CheckpointError(f"the output folder {target} is not empty; choose another or pass --overwrite")
        if not _is_packed(real):
            raise CheckpointError(f"the output folder {target} holds other things than a checkpoint; choose another")
        recorded = _recorded(real)
        content = (p.relative_to(real).as_posix() for p in real.rglob("*") if p.is_symlink() or not p.is_dir())
        foreign = sorted(name for name in content if not is_known(name) and name not in recorded)
        if foreign:
            raise CheckpointError(
                f"the output folder {target} holds other things than a checkpoint: {', '.join(foreign[:3])}; move them "
                "away or choose another folder"
            )
    if Path.cwd().is_relative_to(real):
        raise CheckpointError(
            f"the output {target} is the folder that this command runs in, or holds it, and would be replaced by the "
            "finished one; choose a folder in it, for instance ./out"
        )
    if real.is_mount():
        raise CheckpointError(
            f"the output {target} is where a file system is mounted, which a finished folder cannot replace; choose a "
            "folder in it"
        )


def _is_packed(folder: Path) -> bool:
    try:
        quantization = read_json(folder / "config.json").get("quantization_config")
    except CheckpointError:
        return False
    return isinstance(quantization, dict) and quantization.get("quant_method") == "gemq"


def _recorded(folder: Path) -> set[str]:
    """Names of the files that a checkpoint's manifest records."""
    try:
        files = read_json(folder / MANIFEST_FILE).get("files")
    except CheckpointError:
        return set()
    return set(files) if isinstance(files, dict) else set()


def check_run_directory(
    run: Path, output: Path, targets: Sequence[Path], source: str | os.PathLike | None = None
) -> None:
    """Refuse a run directory that is, holds, or lies in the output or the model.

    ``targets`` are the checkpoints' folders, ``output`` itself or folders in it. Raises :class:`CheckpointError`.
    """
    real = run.resolve()
    if Path.cwd().is_relative_to(real):
        raise CheckpointError(f"the run directory {run} is the folder that this command runs in, or holds it; choose "
                              "another: it is deleted at the end")
    if output.resolve().is_relative_to(real):
        raise CheckpointError(f"the run directory {run} is the output {output} or holds it; choose another")
    inside = next((t for t in targets if real.is_relative_to(t.resolve())), None)
    if inside is not None:
        raise CheckpointError(f"the run directory {run} lies in the output {inside}; choose another")
    if source is not None and Path(source).is_dir():
        model = Path(source).resolve()
        if real.is_relative_to(model) or model.is_relative_to(real):
            raise CheckpointError(f"the run directory {run} is the model {source}, lies in it or holds it; "
                                  "choose another")


def check_log(name: str, path: Path, apart: Sequence[Path], is_own: Callable[[str], bool], what: str) -> None:
    """Refuse a file that lines cannot be added to, before work.

    ``name`` is the option. ``path`` must be absent in a folder that exists, or an empty file, or one whose first line
    ``is_own`` knows: ``what`` says what such a file is. It must not lie in the folders ``apart``, which are replaced
    or deleted. Raises :class:`CheckpointError`.
    """
    if not path.name or path.is_dir():
        raise CheckpointError(f"{name} must be a file, got the folder {str(path)!r}")
    parent = path.absolute().parent
    if not parent.is_dir():
        raise CheckpointError(f"{name} {path} cannot be written: there is no folder {parent}")
    for folder in apart:
        if path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{name} {path} lies in {folder}, which the run replaces or deletes; choose another")
    if not os.path.lexists(path):
        if not os.access(parent, os.W_OK):
            raise CheckpointError(f"{name} {path} cannot be written: {parent} is not a writable folder")
        return
    if not path.is_file():
        raise CheckpointError(f"{name} {path} is not a regular file")
    try:
        with path.open("r+b") as handle:
            first = handle.readline(_FIRST_LINE)
    except OSError as error:
        raise CheckpointError(f"{name} {path} cannot be written: {error.strerror}") from None
    if first and not (first.endswith(b"\n") and is_own(first.decode("utf-8", "replace"))):
        raise CheckpointError(f"{name} {path} exists and is not {what}; choose another or remove it")


def is_event(line: str) -> bool:
    """Tell a line of a run's log: an object with the time and a stage."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"time", "stage"} <= found.keys()
