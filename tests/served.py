"""A server over loopback, in this process, for tests."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from torch import nn

from gemq.server import run
from gemq.server.app import create_app
from gemq.server.engine import Engine
from gemq.server.jobs import End, Event, Job, Token
from gemq.server.settings import Settings

NAME = "tiny"


@contextmanager
def serving(
    model: nn.Module, tokenizer: Any, *, engine: dict | None = None, **settings: Any
) -> Iterator[tuple[str, Engine]]:
    """The address of a server of ``model``, and its engine."""
    made = Engine(model, **{"rows": 3, "slots": 96, "queue": 4} | (engine or {}))
    listening = run.bind("127.0.0.1", 0)
    app = create_app(made, tokenizer, Settings(NAME, **{"grace": 5.0} | settings))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=8))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", made
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive() and not made._thread.is_alive()


class Heard:
    """A listener that keeps a job's events."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.ended = threading.Event()

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, End):
            self.ended.set()

    @property
    def tokens(self) -> list[int]:
        """The new tokens."""
        return [event.token for event in self.events if isinstance(event, Token)]

    @property
    def end(self) -> End:
        """The last event, once it is there."""
        assert self.ended.wait(60)
        assert isinstance(self.events[-1], End)
        return self.events[-1]


def submitted(engine: Engine, prompt: list[int], options: Any, **more: Any) -> tuple[Job, Heard]:
    """A job in an engine's queue, and what is heard of it."""
    heard = Heard()
    job = Job(prompt, options, heard, **more)
    engine.submit(job)
    return job, heard
