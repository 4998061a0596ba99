"""The place among the processes of a job that ``torchrun`` gave this one, read from the environment without torch."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import NoReturn

from gemq.errors import DistributedError


@dataclass(frozen=True)
class World:
    """This process's ``rank`` among ``size``."""

    rank: int
    size: int

    @property
    def first(self) -> bool:
        """True for the process that saves and prints: rank 0."""
        return self.rank == 0


def launched() -> World:
    """The place that ``torchrun`` gave this process, before and after the job has begun.

    Raises :class:`gemq.errors.DistributedError` for environment variables that are no such place.
    """
    size = environment_number("WORLD_SIZE", 1, 1)
    if size == 1:
        # other programs' RANK
        return World(0, 1)
    rank = environment_number("RANK", 0, 0)
    if rank >= size:
        raise DistributedError(f"the environment variable RANK must be below WORLD_SIZE, {size}, got {rank}")
    return World(rank, size)


def place_to_report() -> World:
    """Return the place as :func:`launched` for an error report; a place that cannot be read counts as that of a single
    process."""
    try:
        return launched()
    except DistributedError:
        return World(0, 1)


def environment_number(name: str, default: int, least: int) -> int:
    """A whole number that the launcher set."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or len(text) > 9 or int(text) < least:
        raise DistributedError(
            f"the environment variable {name} must be a whole number of at least {least}, got {text!r:.60}; torchrun "
            "sets it, elsewhere it should not be set"
        )
    return int(text)


def processes_here() -> int:
    """Number of the job's processes on this machine."""
    return environment_number("LOCAL_WORLD_SIZE", 1, 1) if launched().size > 1 else 1


def leave(status: int) -> NoReturn:
    """End this process with an exit status. A process of a job that failed ends at once: threads of connections that it
    lost may abort an orderly end."""
    if status and place_to_report().size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
