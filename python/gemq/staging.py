"""Create folders that appear only when complete: they are written in a folder of gemq's own beside the output, and
renamed.

Beside ``NAME`` there are, while it is worked on::

    .NAME.gemq-lock                held by the kernel for the process that works; says which
    .NAME.gemq-partial-XXXXXXXX/   gemq.json says whose it is; new/ is being written, old/ is what new/ replaces

What a killed process left of these is put right by the next one that works on ``NAME``. A folder without that
``gemq.json`` is somebody else's and stays.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gemq import durable
from gemq.errors import CheckpointError
from gemq.output_folder import check_output

_MARK = "gemq.json"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# outputs that this process holds, and the thread that does
_held: dict[Path, int] = {}


def _beside(final: Path, ending: str) -> str:
    """The name of a helper of ``final``, cut where a file system's 255 bytes would not do."""
    return f".{final.name.encode()[:200].decode(errors='ignore')}.gemq-{ending}"


@contextmanager
def claimed(*targets: Path) -> Iterator[None]:
    """Lock the outputs ``targets`` against other processes, and clean up what killed ones left beside them.

    Folders above them are made, and removed again where they stay empty. What this thread holds already it may hold
    again. Raises :class:`CheckpointError` naming the process that has one.
    """
    with ExitStack() as stack:
        for target in targets:
            stack.enter_context(_claim(target.resolve(), target))
        yield


@contextmanager
def _claim(final: Path, shown: Path) -> Iterator[None]:
    here = threading.get_ident()
    if final in _held:
        if _held[final] != here:
            raise CheckpointError(f"another thread of this process is writing {shown}; wait for it")
        yield
        return
    made = [folder for folder in final.parents if not folder.exists()]
    _held[final] = here
    try:
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"the output {shown} cannot be written: {error.strerror}") from error
        with durable.held(final.parent / _beside(final, "lock"), str(shown), vanishing=True):
            recover(final)
            yield
    finally:
        del _held[final]
        for folder in made:
            try:
                folder.rmdir()
            except OSError:
                # in use by now
                break


@contextmanager
def _writing(shown: Path) -> Iterator[None]:
    """Add the output's name to the error of a full disk, which safetensors may also raise."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise CheckpointError(f"the output {shown} could not be written: {error.strerror}") from error
    except SafetensorError as error:
        raise CheckpointError(f"the output {shown} could not be written: {error}") from error


def recover(final: Path) -> None:
    """Delete what killed processes left beside ``final``, after restoring what they had moved aside."""
    for left in sorted(final.parent.glob(f"{glob.escape(_beside(final, 'partial-'))}*")):
        if left.is_symlink() or not left.is_dir():
            continue
        if _is_ours(left, final):
            if (left / "old").exists() and not os.path.lexists(final):
                durable.rename(left / "old", final)
            durable.remove(left)


def _is_ours(folder: Path, final: Path) -> bool:
    if not {p.name for p in folder.iterdir()} - {_MARK}:
        # killed while it was made
        return True
    try:
        return json.loads((folder / _MARK).read_text(encoding="utf-8")) == {"gemq": final.name}
    except (OSError, ValueError, RecursionError):
        return False


@contextmanager
def staged(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder to write into, put at ``target`` when the block ends, or removed if anything fails.

    The content must be on the disk by then (:func:`gemq.durable.sync`). ``target`` is judged once more at the end; what
    it held comes back if the new folder cannot take its place. A disk that is full raises :class:`CheckpointError`.
    """
    final = target.resolve()
    with claimed(target), _writing(target):
        stage = _stage(final)
        try:
            (stage / "new").mkdir()
            yield stage / "new"
            check_output(target, overwrite=overwrite)
            _put_in_place(stage, final)
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _stage(final: Path) -> Path:
    """A marked helper folder beside ``final``."""
    stage = Path(tempfile.mkdtemp(prefix=_beside(final, "partial-"), dir=final.parent))
    (stage / _MARK).write_text(json.dumps({"gemq": final.name}), encoding="utf-8")
    return stage


def discard(folder: Path) -> None:
    """Delete a folder. It disappears at once as a whole, even if this process is killed; :func:`recover` deletes the
    rest."""
    try:
        stage = _stage(folder.resolve())
        durable.rename(folder.resolve(), stage / "gone")
    except OSError:
        # a mounted folder, or one whose parent may not be written
        stage = folder
    durable.remove(stage)


def _put_in_place(stage: Path, final: Path) -> None:
    if not final.exists():
        durable.rename(stage / "new", final)
        return
    durable.rename(final, stage / "old")
    try:
        durable.rename(stage / "new", final)
    except BaseException:
        durable.rename(stage / "old", final)
        raise


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Create a folder as :func:`staged` for a ``target`` that must not exist or be empty; all files are synced at the
    end."""
    with staged(target) as folder:
        yield folder
        for path in [p for p in folder.rglob("*") if p.is_file()] + [folder]:
            durable.sync(path)
