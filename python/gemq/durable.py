"""Files that survive a kill: written under a temporary name, synced, renamed, the folder synced.

A *sealed* file is ``b"gemqseal"``, the SHA-256 of what follows, and the payload: one that is torn or was changed is
seen as absent. Every write, sync and rename passes :func:`passing`, where a test may stop the process.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from gemq.errors import CheckpointError
from gemq.tensor_files import DTYPES

_MAGIC = b"gemqseal"
# the magic number and a SHA-256
_SEAL = len(_MAGIC) + 32
_watcher: Callable[[str], None] | None = None


def watch(watcher: Callable[[str], None] | None) -> None:
    """Call ``watcher(event)`` before every write, sync and rename of this module; None ends it."""
    global _watcher
    _watcher = watcher


def passing(event: str) -> None:
    """Announce that a write, sync or rename is about to happen."""
    if _watcher is not None:
        _watcher(event)


def sync(path: Path) -> None:
    """Bring a file or folder to the disk."""
    passing(f"sync {path.name}")
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def rename(source: Path, target: Path) -> None:
    """Rename within one file system, and sync the folder."""
    passing(f"rename {target.name}")
    os.replace(source, target)
    sync(target.parent)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` while ``path`` is written into an error that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"{path} could not be written: {reason}; what was finished is kept, the same command continues"
        ) from error


def replace(path: Path, *parts: bytes, partial: Path | None = None) -> None:
    """Replace ``path`` by the parts one after another, all or nothing. Raises ``OSError``.

    ``partial`` is the temporary name; the default is this process's own, so that several may write at once.
    """
    partial = partial or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("wb") as handle:
            for part in parts:
                passing(f"write {path.name}")
                handle.write(part)
        sync(partial)
        rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, *parts: bytes) -> None:
    """Write a file of a run directory as :func:`replace` does. The temporary name is always the same, so a run that
    continues overwrites what a killed one left. Raises :class:`CheckpointError`."""
    with explained(path):
        replace(path, *parts, partial=path.with_name(path.name + ".tmp"))


def seal(path: Path, payload: bytes) -> None:
    """Write a sealed file."""
    write_atomic(path, _MAGIC + hashlib.sha256(payload).digest(), payload)


def unseal(path: Path) -> bytes | None:
    """The payload of a sealed file; None if it is absent, torn or changed."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    return data[_SEAL:] if _whole(data) else None


def _whole(data: bytes | mmap.mmap) -> bool:
    with memoryview(data) as view, view[_SEAL:] as payload:
        return data[:_SEAL] == _MAGIC + hashlib.sha256(payload).digest()


def seal_json(path: Path, value: Any) -> None:
    """Write JSON; floats come back exactly."""
    seal(path, json.dumps(value).encode())


def unseal_json(path: Path) -> Any | None:
    """Read a value that :func:`seal_json` wrote; None if the file is absent or not whole."""
    payload = unseal(path)
    return None if payload is None else json.loads(payload)


def seal_tensors(path: Path, tensors: dict[str, Tensor], notes: Any) -> None:
    """Write tensors by name, and JSON notes."""
    seal(path, save({k: v.contiguous() for k, v in tensors.items()}, {"notes": json.dumps(notes)}))


def unseal_tensors(path: Path, trusted: bool = False) -> tuple[dict[str, Tensor], Any] | None:
    """Read the tensors and notes that :func:`seal_tensors` wrote; None if the file is absent or not whole. The tensors
    are on the CPU: they are the file's pages, private to this process, and loaded as they are used. ``trusted`` skips
    the check of the whole file."""
    try:
        with path.open("rb") as handle:
            data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
    except (FileNotFoundError, ValueError):
        # absent, or empty
        return None
    if not trusted and not _whole(data):
        return None
    size = int.from_bytes(data[_SEAL : _SEAL + 8], "little")
    header = json.loads(data[_SEAL + 8 : _SEAL + 8 + size])
    notes = json.loads(header.pop("__metadata__")["notes"])
    return {name: _mapped(data, entry, _SEAL + 8 + size) for name, entry in header.items()}, notes


def _mapped(data: mmap.mmap, entry: dict[str, Any], start: int) -> Tensor:
    dtype, count = DTYPES[entry["dtype"]], math.prod(entry["shape"])
    if not count:
        return torch.empty(entry["shape"], dtype=dtype)
    offset = start + entry["data_offsets"][0]
    return torch.frombuffer(data, dtype=dtype, count=count, offset=offset).view(entry["shape"])


def remove(path: Path) -> None:
    """Delete a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        passing(f"delete {path.name}")
        shutil.rmtree(path)
    elif path.exists():
        passing(f"delete {path.name}")
        path.unlink()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold ``folder/lock``; :class:`CheckpointError` names the process that has it.

    The lock is the kernel's and ends with the process that holds it, however that ends.
    """
    with held(folder / "lock", str(folder)):
        yield


@contextmanager
def held(file: Path, what: str, vanishing: bool = False) -> Iterator[None]:
    """Hold the lock file ``file`` of ``what``, as :func:`locked`; ``vanishing``: it is deleted at the end."""
    handle = _acquired(file, what)
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        if vanishing:
            # while it is held: whoever opened it before finds another file, or none, under the name
            file.unlink(missing_ok=True)
        os.close(handle)


def _acquired(file: Path, what: str) -> int:
    """A handle of the lock file, locked."""
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise CheckpointError(f"{what} cannot be locked: {file}: {error.strerror}") from error
        try:
            owner = os.pread(handle, 32, 0).decode(errors="replace").strip()
            if owner and not owner.isdecimal():
                raise CheckpointError(f"{what} cannot be locked: {file} is no lock of gemq; move it away")
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"another process ({owner or 'unknown'}) is working in {what}; wait for it or stop it"
                ) from None
            except OSError as error:
                raise CheckpointError(f"{what} cannot be locked: {file}: {error.strerror}") from error
            if file.exists() and os.path.samestat(os.fstat(handle), file.stat()):
                return handle
        except BaseException:
            os.close(handle)
            raise
        # the holder deleted it between opening and locking
        os.close(handle)
