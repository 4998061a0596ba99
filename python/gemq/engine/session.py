"""Open a run: from a model's folder and options to an engine in its run directory."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from gemq import distributed
from gemq.algorithms.importance import ExpertStatistics
from gemq.algorithms.method import MethodConfig
from gemq.engine import fingerprint
from gemq.engine.assemble import Assembly
from gemq.engine.disk_source import DiskSource
from gemq.engine.journal import MemoryRun, Run, opened
from gemq.engine.progression import BudgetResult, Progression, StageProgress, spent
from gemq.engine.walk import OnLayer
from gemq.errors import CheckpointError
from gemq.integrity import verify


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that do not change its result.

    ``path`` is the run directory; ``keep`` is one of :class:`gemq.choices.Keep`, and ``"model"`` uses no run directory.
    ``log`` is a second place for the JSON lines; ``keep_run`` leaves the directory behind.
    """

    path: Path
    keep: str = "layer"
    changed: str = "refuse"
    keep_run: bool = False
    log: Path | None = None


@dataclass(frozen=True)
class Session:
    """Inputs that decide the result: a source, its text, the method. ``options`` and ``command`` are the caller's:
    options are compared when a run continues, and the command is stored to continue it. ``first`` is used instead of
    measuring the full-precision model."""

    source: DiskSource
    windows: Tensor
    router_windows: Tensor
    method: MethodConfig
    options: dict[str, Any] = field(default_factory=dict)
    command: dict[str, Any] = field(default_factory=dict)
    first: ExpertStatistics | None = None

    def identity(self, progress: StageProgress | None = None) -> dict[str, Any]:
        """Fingerprints of model, code and arithmetic, computed by rank 0."""
        return distributed.on_first(lambda: self._identity(progress))

    def _identity(self, progress: StageProgress | None) -> dict[str, Any]:
        report = (lambda done, total: progress("read the model", done, total)) if progress else None
        source = self.source
        return {
            "model": source.watch.read(report, source.numbers()),
            "code": fingerprint.of_code(),
            "computing": {"dtype": str(source.dtype).removeprefix("torch."), "device": source.device.type},
        }

    @contextmanager
    def working(
        self, options: RunOptions, progress: StageProgress | None = None, on_layer: OnLayer | None = None
    ) -> Iterator[Work]:
        """Lock the run directory and yield the run. The directory is deleted if the block ends without an error.

        Raises :class:`gemq.errors.CheckpointError` for another process there, or a run of other settings.
        """
        began = time.perf_counter()
        identity = self.identity(progress)
        with self._opened(options, identity) as run:
            run.log(stage="read the model", event="end", **spent(began))
            progression = Progression(
                self.source, run, identity, self.windows, self.router_windows, self.method, progress, self.first,
                on_layer,
            )
            yield Work(progression, run, identity)
            if not options.keep_run:
                run.delete()

    @contextmanager
    def _opened(self, options: RunOptions, identity: dict[str, Any]) -> Iterator[Run]:
        if options.keep == "model":
            yield MemoryRun(options.log)
            return
        data = {"calibration": fingerprint.of_windows(self.windows),
                "router": fingerprint.of_windows(self.router_windows)}
        if self.first is not None:
            data["costs"] = fingerprint.of_costs(self.first.costs)
        settings = {**identity, "data": data, "options": self.options}
        with opened(
            options.path, settings, self.command, changed=options.changed, on_disk=options.keep == "layer",
            log=options.log,
        ) as directory:
            yield directory


@dataclass(frozen=True)
class Work:
    """A progression, and where it keeps its work."""

    progression: Progression
    run: Run
    identity: dict[str, Any]

    def results(self) -> Iterator[BudgetResult]:
        """Every budget's result."""
        return self.progression.results()

    def assembly(self, result: BudgetResult) -> tuple[Assembly, str]:
        """Return the writer of a result's checkpoint, and the fingerprint that names the run."""

        def progress(done: int, total: int) -> None:
            self.progression.progress("save", done, total)

        assembly = result.assembly(self.progression.method.name, progress)
        return assembly, fingerprint.digest(self.identity, result.key, result.budget, str(assembly.dtype))

    def confirming(self, write: Callable[[Path], None]) -> Callable[[Path], None]:
        """Wrap ``write`` so that it reads the model's files once more afterwards. Raises :class:`CheckpointError` if
        one changed."""

        def writing(folder: Path) -> None:
            write(folder)
            cast(DiskSource, self.progression.source).watch.read(
                lambda done, total: self.progression.progress("read the model again", done, total)
            )

        return writing

    @contextmanager
    def saving(self, budget: float) -> Iterator[None]:
        """Log that the checkpoint of a budget is written during the block."""
        began = time.perf_counter()
        self.run.log(stage="save", event="start", budget=budget)
        yield
        self.run.log(stage="save", event="end", budget=budget, **spent(began))


def written_by(target: Path, report: str) -> str | None:
    """Name of the run that wrote a finished, whole checkpoint, read from its report; None for anything else."""
    try:
        name = json.loads((target / report).read_text(encoding="utf-8")).get("run")
        if name is not None:
            verify(target)
    except (OSError, ValueError, AttributeError, CheckpointError):
        return None
    return name
