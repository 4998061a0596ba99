"""One continuation that a client waits for, and what it hears of it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from gemq.generation.options import GenerationOptions

_numbers = itertools.count()


class Token(NamedTuple):
    """A new token. ``logprob`` is its log probability under the model, ``top`` are the best ``(token, logprob)``; None
    and empty where they were not asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class End(NamedTuple):
    """The end of a continuation: "stop" at an end token, "length", "cancelled", "timeout" or "error"."""

    reason: str
    message: str | None = None


Event = Token | End


@dataclass(eq=False)
class Job:
    """A prompt to be continued. ``listen`` is called with every event, on the engine's thread.

    ``logprobs`` is the number of best tokens to give beside each new one's log probability, None for neither.
    ``deadline`` is a time of :func:`time.monotonic`. ``cached`` counts the prompt's tokens that were read before.
    """

    prompt: list[int]
    options: GenerationOptions
    listen: Callable[[Event], None]
    logprobs: int | None = None
    deadline: float = float("inf")
    number: int = field(default_factory=lambda: next(_numbers))
    made: float = field(default_factory=time.monotonic)
    cancelled: bool = False
    cached: int = 0
    new: int = 0

    def cancel(self) -> None:
        """Ask the engine to let the job go, from any thread."""
        self.cancelled = True
