"""Manage the run directory: the settings of a run, its finished work, and the lock of the process that works in it.

::

    manifest.json            settings (fingerprint.py) with their SHA-256; manifest.previous.json is the one before
    lock                     held by the process that works here
    log.jsonl                a line per finished piece of work, for machines
    stages/<name>-<key>/     sealed files, one per layer; the key is a digest of all that the stage depends on
    scratch/<name>-<key>/    activations of the stage that is running; of several processes, a folder each
    layer-log                the file of --layer-log that this run writes

Of several processes rank 0 holds the lock and writes everything but activations; what a file said, or an error, it
passes on. The others read layers' files themselves, so the run directory must be where all of them see it.

A stage whose options, or whose predecessors' options, changed has another key, so what did not change is found and
what did is made anew. A sealed file that is torn counts as absent.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from gemq import distributed, durable
from gemq.choices import Changed
from gemq.engine.fingerprint import differences, digest
from gemq.errors import CheckpointError
from gemq.plain_json import dumps
from gemq.staging import discard, recover

MANIFEST, PREVIOUS = "manifest.json", "manifest.previous.json"
LAYER_LOG = "layer-log"
_OWN = {MANIFEST, PREVIOUS, LAYER_LOG, "lock", "log.jsonl", "stages", "scratch"}

T = TypeVar("T")


class Stage:
    """The files of one stage. All processes call its methods alike."""

    def __init__(self, folder: Path, scratch: Path | None, name: str, key: str):
        self.folder, self.scratch, self.name, self.key = folder, scratch, name, key

    def file(self, name: str) -> Path:
        """The path of a sealed file of the stage."""
        return self.folder / name

    def place(self, name: str) -> str:
        """The path of a piece of work, for messages."""
        return str(self.file(name))

    def json(self, name: str) -> Any | None:
        """Read the value that :meth:`keep_json` kept, or None."""
        return distributed.on_first(lambda: durable.unseal_json(self.file(name)))

    def keep_json(self, name: str, value: Any) -> None:
        """Keep a value; floats come back exactly."""
        distributed.on_first(lambda: durable.seal_json(self.file(name), value))

    def made(self, name: str, make: Callable[[], T]) -> T:
        """Return the JSON value that was kept; otherwise call ``make`` on rank 0 and keep its result."""

        def find() -> T:
            value = durable.unseal_json(self.file(name))
            if value is None:
                value = make()
                durable.seal_json(self.file(name), value)
            return value

        return distributed.on_first(find)

    def tensors(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """Tensors, small ones, and notes that :meth:`keep_tensors` kept, or None."""
        return distributed.on_first(lambda: durable.unseal_tensors(self.file(name)))

    def keep_tensors(self, name: str, tensors: dict[str, Tensor], notes: Any) -> None:
        """Keep tensors by name, and JSON notes."""
        distributed.on_first(lambda: durable.seal_tensors(self.file(name), tensors, notes))

    def remove(self, name: str) -> None:
        """Delete a file."""
        distributed.on_first(lambda: durable.remove(self.file(name)))

    def layer(self, name: str, trusted: bool = False) -> tuple[dict[str, Tensor], Any] | None:
        """Read what :meth:`keep_layer` kept, memory-mapped; None if it is absent or torn. Each process reads for
        itself; ``trusted``: it has already checked the whole file."""
        return durable.unseal_tensors(self.file(name), trusted)

    def keep_layer(self, name: str, make: Callable[[], tuple[dict[str, Tensor], Any]]) -> None:
        """Keep the tensors and notes that ``make`` returns; rank 0 calls it, for all."""
        distributed.on_first(lambda: durable.seal_tensors(self.file(name), *make()))


class MemoryStage(Stage):
    """A stage whose work is kept in memory and gone with the process."""

    def __init__(self, name: str, key: str):
        super().__init__(Path(), None, name, key)
        self._kept: dict[str, Any] = {}

    def place(self, name: str) -> str:
        return f"{name} of stage {self.name}"

    def json(self, name: str) -> Any | None:
        return self._kept.get(name)

    def keep_json(self, name: str, value: Any) -> None:
        self._kept[name] = value

    def made(self, name: str, make: Callable[[], T]) -> T:
        return distributed.on_first(make)

    def tensors(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        return self._kept.get(name)

    def keep_tensors(self, name: str, tensors: dict[str, Tensor], notes: Any) -> None:
        self._kept[name] = tensors, notes

    def remove(self, name: str) -> None:
        self._kept.pop(name, None)

    def layer(self, name: str, trusted: bool = False) -> tuple[dict[str, Tensor], Any] | None:
        return self._kept.get(name)

    def keep_layer(self, name: str, make: Callable[[], tuple[dict[str, Tensor], Any]]) -> None:
        # what each process holds of a layer is the whole of it
        self._kept[name] = make()


class Run(Protocol):
    """The place of a run's work, and its log."""

    def stage(self, name: str, *depends: Any) -> Stage:
        """The stage of this name and these dependencies."""

    def finished(self, stage: Stage) -> None:
        """Delete what only the running stage needed."""

    def log(self, **event: Any) -> None:
        """Append a line to the log."""

    def delete(self) -> None:
        """Delete the run's work after it has ended."""


class MemoryRun:
    """A run that keeps its work in memory: it cannot be continued."""

    def __init__(self, log: Path | None = None):
        self._logs = [log] if log else []

    def stage(self, name: str, *depends: Any) -> MemoryStage:
        return MemoryStage(name, digest(name, *depends))

    def finished(self, stage: Stage) -> None:
        """Do nothing: a stage's scratch arrays go with their walk."""

    def log(self, **event: Any) -> None:
        append(self._logs, event)

    def delete(self) -> None:
        """Do nothing: nothing was written."""


def append(logs: list[Path], event: dict[str, Any]) -> None:
    """Append an event as a JSON line to each log, from rank 0."""
    if not distributed.world().first:
        return
    line = dumps({"time": round(time.time(), 3), **event}) + "\n"
    for path in logs:
        with durable.explained(path), path.open("a", encoding="utf-8") as handle:
            handle.write(line)


class RunDirectory:
    """A run directory that this process, or rank 0 of its job, has locked; made by :func:`opened`."""

    def __init__(self, path: Path, on_disk: bool, log: Path | None):
        self.path, self.on_disk = path, on_disk
        self._logs = [path / "log.jsonl", *([log] if log else [])]

    def stage(self, name: str, *depends: Any) -> Stage:
        """The stage of this name and these dependencies; other stages' scratch files are deleted."""
        key = digest(name, *depends)
        label = f"{name}-{key[:16]}"
        place = distributed.world()
        # another number of processes deals the batches out otherwise
        own = [label if place.size == 1 else f"{label}-{rank}-of-{place.size}" for rank in range(place.size)]
        distributed.on_first(lambda: self._enter(label, own))
        scratch = self.path / "scratch" / own[place.rank]
        return Stage(self.path / "stages" / label, scratch if self.on_disk else None, name, key)

    def _enter(self, label: str, own: list[str]) -> None:
        folder, scratch = self.path / "stages" / label, self.path / "scratch"
        with durable.explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            scratch.mkdir(exist_ok=True)
            for other in scratch.iterdir():
                if other.name not in own:
                    durable.remove(other)

    def finished(self, stage: Stage) -> None:
        """Delete the scratch files, which the stage no longer needs."""
        distributed.gather(None)
        distributed.on_first(lambda: self._clear(stage.folder.name))

    def _clear(self, label: str) -> None:
        for folder in sorted((self.path / "scratch").glob(f"{label}*")):
            durable.remove(folder)

    def log(self, **event: Any) -> None:
        """Append a line to the log."""
        append(self._logs, event)

    def delete(self) -> None:
        """Delete the run directory after the run has ended."""
        distributed.gather(None)
        distributed.on_first(lambda: discard(self.path))


def read_manifest(path: Path) -> dict[str, Any] | None:
    """``settings`` and ``command`` of a run directory: of ``manifest.json``, or of the one before if that is torn;
    else None."""
    for name in (MANIFEST, PREVIOUS):
        try:
            data = json.loads((path / name).read_text(encoding="utf-8"))
            if data.pop("sha256") == digest(data) and data.keys() == {"settings", "command"}:
                return data
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return None


def _write_manifest(path: Path, now: dict[str, Any], before: dict[str, Any] | None) -> None:
    for name, value in ((PREVIOUS, before), (MANIFEST, now)):
        if value is not None:
            text = json.dumps({**value, "sha256": digest(value)}, indent=1) + "\n"
            durable.write_atomic(path / name, text.encode())


@contextmanager
def opened(
    path: Path, settings: dict[str, Any], command: dict[str, Any] | None = None, *, changed: str = "refuse",
    on_disk: bool = True, log: Path | None = None,
) -> Iterator[RunDirectory]:
    """Lock a run directory that is new or was begun with the same settings; ``command`` is stored for a later call that
    continues the run.

    Other settings are refused with the differences (``changed="refuse"``), accepted, so that the stages they touch are
    done again (``"redo"``), or everything begun is thrown away (``"restart"``). ``on_disk``: activations are kept in
    files. Raises :class:`CheckpointError`.
    """
    if changed not in set(Changed):
        raise ValueError(f"changed must be one of {', '.join(Changed)}, got {changed!r}")
    now = json.loads(json.dumps({"settings": settings, "command": command or {}}, default=str))
    with ExitStack() as stack:

        def begin() -> None:
            check_directory(path, changed)
            with durable.explained(path):
                path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(durable.locked(path))
            recover(path.resolve())
            _begin(path, now, changed)

        distributed.on_first(begin)
        yield RunDirectory(path, on_disk, log)


def check_directory(path: Path, changed: str = "refuse") -> None:
    """Refuse what cannot be a run directory, or is not one that a run made; ``changed`` as for :func:`opened`.

    Raises :class:`CheckpointError`.
    """
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"the run directory {path} exists and is not a folder")
    above = next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise CheckpointError(f"the run directory {path} cannot be written: {above} is not a writable folder")
    if path.is_dir():
        foreign = sorted({p.name.removesuffix(".tmp") for p in path.iterdir()} - _OWN)
        if foreign:
            raise CheckpointError(f"the run directory {path} holds other things than a run: {', '.join(foreign[:3])}")
        if read_manifest(path) is None:
            _check_unknown(path, changed)


def _begin(path: Path, now: dict[str, Any], changed: str) -> None:
    before = read_manifest(path)
    if changed == "restart":
        for name in ("stages", "scratch", "log.jsonl", LAYER_LOG):
            durable.remove(path / name)
    elif before is not None:
        lines = differences(before["settings"], now["settings"])
        if lines and changed == "refuse":
            raise CheckpointError(
                f"{path} was begun with other settings: {'; '.join(lines)}. Give the same, or --changed redo to do "
                f"only what this touches again, or --changed restart to begin anew"
            )
    if before is None or before["settings"] != now["settings"]:
        _write_manifest(path, now, before)


def _check_unknown(path: Path, changed: str) -> None:
    """Refuse a folder without a manifest that can be read."""
    if any((path / name).exists() for name in (MANIFEST, PREVIOUS)):
        if changed != "restart":
            raise CheckpointError(f"the manifest of {path} is unreadable; --changed restart begins anew")
        return
    # a run has nothing else before its manifest
    foreign = sorted({p.name for p in path.iterdir()} - {"lock", f"{MANIFEST}.tmp"})
    if foreign:
        raise CheckpointError(
            f"the run directory {path} holds {', '.join(foreign[:3])} but no manifest: no run made it; choose another"
        )
