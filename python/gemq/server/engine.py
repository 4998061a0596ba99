"""Continuous batching: one thread reads prompts in chunks and decodes all running jobs by a token in turns."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemq.errors import GemqError, first_line
from gemq.generation import known
from gemq.generation.decoding import check_room
from gemq.generation.options import ending
from gemq.generation.sampling import Sampler
from gemq.generation.step import capped
from gemq.server.jobs import End, Job, Token
from gemq.server.prefixes import Prefixes
from gemq.server.rows import Rows, empty_cache, feed

_log = logging.getLogger("gemq")
# tokens of a prompt between two decoding steps of the others
CHUNK = 256


class QueueFull(GemqError):
    """As many jobs wait as may."""


class Closing(GemqError):
    """The server takes no more jobs."""


class _Reading:
    """A job whose prompt is being read: the first ``done`` tokens are in ``cache``."""

    def __init__(self, job: Job, done: int, cache: Any):
        self.job, self.done, self.cache = job, done, cache


class _Running:
    """A job in a row: its newest token is at ``position``."""

    def __init__(self, job: Job, sampler: Sampler, eos: tuple[int, ...]):
        self.job, self.sampler, self.eos = job, sampler, eos
        self.token, self.position = -1, len(job.prompt) - 1


class Engine:
    """Continuations of a model, ``rows`` at a time, each of up to ``slots`` tokens, prompt included.

    ``queue`` jobs may wait, ``prefix_bytes`` are for the beginnings of earlier prompts. Raises what :class:`Rows` does.
    """

    def __init__(self, model: Any, rows: int = 8, slots: int = 4096, queue: int = 64, prefix_bytes: int = 256 << 20):
        self.model = model
        with torch.inference_mode():
            self.rows = Rows(model, rows, slots)
        self.slots, self.queue = slots, queue
        self.prefixes = Prefixes(prefix_bytes, CHUNK)
        self.waiting: deque[Job] = deque()
        self.reading: _Reading | None = None
        self.running: list[_Running] = []
        self._cap, self._closing, self._stopped = known.softcap(model), False, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="gemq-engine", daemon=True)
        self._thread.start()

    def check(self, job: Job) -> None:
        """Raise ``ValueError`` for a job that does not fit."""
        if not job.prompt:
            raise ValueError("the prompt must not be empty")
        new = job.options.max_new_tokens
        if len(job.prompt) + new > self.slots:
            raise ValueError(f"the prompt has {len(job.prompt)} tokens, and {new} new ones were asked for; this server "
                             f"holds {self.slots} of both")
        check_room(self.model.config, len(job.prompt), new, min(job.prompt), max(job.prompt))
        ending(job.options, self.model)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises ``ValueError`` as :meth:`check`, :class:`QueueFull` or :class:`Closing`."""
        self.check(job)
        with self._changed:
            if self._closing:
                raise Closing("the server is stopping")
            if (waiting := sum(not other.cancelled for other in self.waiting)) >= self.queue:
                raise QueueFull(f"{waiting} requests wait already; try again later")
            self.waiting.append(job)
            self._changed.notify()

    def close(self, grace: float = 30.0) -> None:
        """Take no more jobs, let those that run and wait end within ``grace`` seconds, and end the others."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and self._thread.is_alive() and self.busy:
            time.sleep(0.02)
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()

    @property
    def busy(self) -> bool:
        """True while a job waits, is read or runs."""
        return bool(self.waiting or self.reading or self.running)

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._stopped or self.busy):
                    self._changed.wait()
                if self._stopped:
                    break
            self._let_go()
            self._guarded(self._read, self._read_jobs)
            self._guarded(self._step, self._running_jobs)
        for job in self._jobs():
            self._drop(job, End("error", "the server stopped"))

    def _read_jobs(self) -> list[Job]:
        return [self.reading.job] if self.reading else []

    def _running_jobs(self) -> list[Job]:
        return [row.job for row in self.running]

    def _jobs(self) -> list[Job]:
        return [*self.waiting, *self._read_jobs(), *self._running_jobs()]

    def _guarded(self, work: Callable[[], None], concerned: Callable[[], list[Job]]) -> None:
        """Do some work; an error ends the jobs concerned then, and the others go on."""
        try:
            work()
        except Exception as error:
            memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            message = "out of memory: try a shorter prompt" if memory else first_line(error)
            _log.error("a request failed: %s: %s", type(error).__name__, first_line(error))
            for job in concerned():
                self._drop(job, End("error", message))

    def _let_go(self) -> None:
        """End jobs that nobody waits for any more."""
        now = time.monotonic()
        for job in self._jobs():
            if job.cancelled:
                self._drop(job, End("cancelled"))
            elif now > job.deadline:
                self._drop(job, End("timeout", "the request took longer than this server allows"))

    def _drop(self, job: Job, end: End) -> None:
        """End a job wherever it is."""
        with self._changed:
            if job in self.waiting:
                self.waiting.remove(job)
        if self.reading is not None and self.reading.job is job:
            self.reading = None
        at = next((i for i, row in enumerate(self.running) if row.job is job), None)
        if at is not None:
            last = self.running.pop()
            if at < len(self.running):
                # the newest token may be in the row already
                self.rows.move(len(self.running), at, last.position + 1)
                self.running[at] = last
        job.listen(end)

    def _read(self) -> None:
        """Read a chunk of a prompt; behind its last one the job takes a row and its first token."""
        if self.reading is None:
            with self._changed:
                if not self.waiting or len(self.running) == self.rows.rows:
                    return
                job = self.waiting.popleft()
            self.reading = _Reading(job, *self.prefixes.longest(job.prompt))
            job.cached = self.reading.done
        reading, prompt = self.reading, self.reading.job.prompt
        if reading.cache is None:
            reading.cache = empty_cache(self.model)
        end = min(reading.done + CHUNK, len(prompt))
        hidden = feed(self.model, prompt[reading.done : end], reading.done, reading.cache)
        reading.done = end
        if self.prefixes.worth(prompt, end):
            self.prefixes.keep(prompt[:end], reading.cache)
        if end < len(prompt):
            return
        self.rows.fill(len(self.running), reading.cache)
        logits = capped(self.model.get_output_embeddings()(hidden), self._cap).float()
        self.running.append(self._started(reading.job))
        self._advance(self.running[-1], logits)
        # last, so that an error on the way ends this job alone
        self.reading = None

    def _started(self, job: Job) -> _Running:
        ids = torch.tensor([job.prompt], device=self.rows.device)
        vocabulary = self.model.config.get_text_config().vocab_size
        sampler = Sampler(job.options, ids, torch.ones_like(ids), vocabulary)
        return _Running(job, sampler, ending(job.options, self.model)[0])

    def _step(self) -> None:
        """Decode all running jobs by one token."""
        running = list(self.running)
        if not running:
            return
        logits = self.rows.step([row.token for row in running], [row.position for row in running])
        for at, row in enumerate(running):
            self._advance(row, logits[at : at + 1])

    def _advance(self, row: _Running, logits: Tensor) -> None:
        """Choose a job's next token from its logits ``[1, V]``, tell it, and end the job where it ends."""
        job = row.job
        tokens, best = row.sampler(logits)
        if not math.isfinite(float(best)):
            self._drop(job, End("error", "the model's scores are NaN or infinite"))
            return
        row.token, row.position, job.new = int(tokens), row.position + 1, job.new + 1
        if row.token in row.eos:
            self._drop(job, End("stop"))
            return
        job.listen(_told(row.token, logits, job.logprobs))
        if job.new >= job.options.max_new_tokens:
            self._drop(job, End("length"))


def _told(token: int, logits: Tensor, logprobs: int | None) -> Token:
    if logprobs is None:
        return Token(token)
    scores = logits[0].log_softmax(-1)
    values, ids = scores.topk(logprobs) if logprobs else (scores[:0], scores[:0])
    top = tuple(zip(ids.long().tolist(), values.tolist(), strict=True))
    return Token(token, float(scores[token]), top)
