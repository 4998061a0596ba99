"""Names of options in the release before: they still work, and a line on standard error says the new one."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from gemq.choices import Changed, Keep
from gemq.cli import display
from gemq.cli.formats import Format


def tell(old: str, new: str) -> None:
    """Warn that ``old`` is the former name of ``new``."""
    display.errors().print(
        f"warning: {old} is now {new}; the old name goes with the next release", style="yellow", markup=False,
        highlight=False, soft_wrap=True,
    )


def kept(keep: Keep, stream: bool | None, scratch: str | None) -> Keep:
    """``--keep`` as ``--stream/--no-stream`` and ``--scratch`` said it, where one of them was given."""
    if stream is None and scratch is None:
        return keep
    if scratch not in (None, "disk", "memory"):
        raise typer.BadParameter(f"--scratch must be one of disk, memory, got {scratch!r}")
    chosen = Keep.model if stream is False else Keep.activations if scratch == "memory" else Keep.layer
    tell("--no-stream" if stream is False else "--stream" if scratch is None else f"--scratch {scratch}",
         f"--keep {chosen}")
    return chosen


def planned(keep: Keep, engine: str | None) -> Keep:
    """``--keep`` as ``gemq plan --engine`` said it, where that was given."""
    if engine is None:
        return keep
    if engine not in ("memory", "stream"):
        raise typer.BadParameter(f"--engine must be one of memory, stream, got {engine!r}")
    chosen = Keep.model if engine == "memory" else Keep.layer
    tell(f"--engine {engine}", f"--keep {chosen}")
    return chosen


def changing(changed: Changed, redo: bool, restart: bool) -> Changed:
    """``--changed`` as ``--redo`` or ``--restart`` said it, where one of them was given."""
    if redo and restart:
        raise typer.BadParameter("--redo and --restart exclude each other")
    if not redo and not restart:
        return changed
    chosen = Changed.redo if redo else Changed.restart
    tell(f"--{chosen}", f"--changed {chosen}")
    return chosen


def _format(context: typer.Context, value: Format | None) -> Format | None:
    if value is not None and not context.resilient_parsing:
        tell(f"-o {value}", f"--format {value}")
    return value


# -o in the place of --format
FormerForm = Annotated[Format | None, typer.Option("-o", hidden=True, callback=_format)]


def written(output: Any, former: Any, command: str) -> Any:
    """``--output`` as a second argument said it, where that was given."""
    if former is None:
        if output is None:
            raise typer.BadParameter("--output must be given: the folder to write")
        return output
    if output is not None:
        raise typer.BadParameter(f"the output is given twice: {former} and --output {output}")
    tell(f"gemq {command} MODEL {former}", f"gemq {command} MODEL --output {former}")
    return former
