"""Tables, bit maps and progress bars. Data goes to standard output, everything else to standard error."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from gemq.cli.escapes import printable
from gemq.format import mean_width

# dark to bright with the width, legible on light and dark grounds
_COLOURS = {0: "grey50", 1: "blue", 2: "cyan", 3: "green", 4: "yellow", 5: "yellow", 6: "red", 7: "red", 8: "magenta"}


# what --quiet and --no-color set for all consoles
_QUIET, _PLAIN = False, None


def configure(quiet: bool = False, plain: bool = False) -> None:
    """Set what ``--quiet`` and ``--no-color`` ask for; rich itself heeds NO_COLOR and whether there is a terminal."""
    global _QUIET, _PLAIN
    _QUIET, _PLAIN = quiet, plain or None
    for console in (output, errors, notes):
        console.cache_clear()


class _Console(Console):
    """Prints texts as they are: no markup, no emoji codes, and no character that a terminal obeys."""

    def __init__(self, **options: Any):
        super().__init__(no_color=_PLAIN, markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich's, with the texts among ``objects`` escaped."""
        super().print(*(printable(o) if isinstance(o, str) else o for o in objects), **options)


@cache
def output() -> Console:
    """The console of standard output. Only a terminal has a width to fit: in a file, paths stay in one piece."""
    console = _Console()
    if not console.is_terminal:
        console.width = 400
    return console


@cache
def errors() -> Console:
    """The console of standard error, for errors and warnings."""
    return _Console(stderr=True)


@cache
def notes() -> Console:
    """The console of standard error for all that is neither data nor a warning: silent with ``--quiet``."""
    return _Console(stderr=True, quiet=_QUIET)


class Stages:
    """Bars of named stages: call it with ``(stage, done, total)``; :meth:`print` puts a line above them. Without
    ``bars`` it is silent."""

    def __init__(self, bars: Progress | None):
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._bars is None:
            return
        if done == 0 or stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(printable(stage, keep=""), total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)

    def print(self, line: str) -> None:
        """Show a line for good."""
        if self._bars is not None:
            self._bars.console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


class RateColumn(ProgressColumn):
    """``left 0:01:32, 2.1 s each``: measured, so nothing until two steps are done, and nothing at the end."""

    def render(self, task: Task) -> Text:
        """The text of a task."""
        # a stage that continues begins with what is done: only what it did itself was measured
        if not task.speed or task.completed < 2 or task.finished or task.time_remaining is None:
            return Text("")
        rate = f"{task.speed:.1f} a second" if task.speed >= 1 else f"{1 / task.speed:.1f} s each"
        return Text(f"left {timedelta(seconds=round(task.time_remaining))}, {rate}", style="progress.remaining")


@contextmanager
def stages() -> Iterator[Stages]:
    """A progress display on standard error, and the time all took at the end. Of several processes, rank 0's."""
    from gemq import distributed

    if not distributed.world().first:
        yield Stages(None)
        return
    columns = (
        TextColumn("{task.description:<22}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        RateColumn(),
    )
    with Progress(*columns, console=notes()) as bars:
        started = time.monotonic()
        yield Stages(bars)
        bars.console.print(f"done in {time.monotonic() - started:.1f} s", style="dim")


def size(count: int) -> str:
    """Bytes for people: 12.3 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    raise AssertionError


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A table whose first column is left-aligned and may fold, and the others right-aligned."""
    # as Text, not markup: a path may hold square brackets
    result = Table(title=Text(printable(title, keep="")), title_justify="left")
    for index, name in enumerate(columns):
        if index == 0:
            result.add_column(name, overflow="fold")
        else:
            result.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        result.add_row(*(Text(printable(cell, keep="")) for cell in row))
    return result


def bit_map(
    expert_bits: dict[int, list[int]], shared_bits: dict[int, int], down_bits: dict[int, list[int]] | None = None
) -> Table:
    """One line per MoE layer, one coloured digit per expert, or two if down projections have widths of their own; the
    shared expert after a bar."""
    result = Table(title="bits per layer and expert", title_justify="left", show_header=True)
    result.add_column("layer", justify="right")
    result.add_column("gate, up" if down_bits else "experts")
    if down_bits:
        result.add_column("down")
    if shared_bits:
        result.add_column("shared")
    result.add_column("mean", justify="right")
    for layer, widths in expert_bits.items():
        rows = [widths, down_bits[layer]] if down_bits else [widths]
        lines = [Text.assemble(*((str(width), _COLOURS[width]) for width in row)) for row in rows]
        shared = [str(shared_bits.get(layer, "-"))] if shared_bits else []
        result.add_row(str(layer), *lines, *shared, f"{mean_width(rows[0], rows[-1]):.2f}")
    return result
