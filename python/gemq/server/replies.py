"""One reply: its jobs, their events as they come, and OpenAI's objects made of them."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from gemq.server.answers import Answer
from gemq.server.engine import Engine
from gemq.server.failures import failure
from gemq.server.jobs import End, Event, Token
from gemq.server.metrics import Metrics
from gemq.server.requests import Body, ChatBody
from gemq.server.settings import Settings

# seconds between two looks if the client is still there
_LOOK = 0.25
_STATUS = {"timeout": 504, "error": 500, "cancelled": 499}


class Reply:
    """The reply to a body whose prompt has been encoded."""

    def __init__(
        self, engine: Engine, tokenizer: Any, metrics: Metrics, settings: Settings, body: Body, prompt: list[int],
        stops: tuple[str, ...],
    ):
        self.engine, self.metrics, self.settings, self.body, self.prompt = engine, metrics, settings, body, prompt
        self.chat = isinstance(body, ChatBody)
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self.loop, self.begun, self.first = asyncio.get_running_loop(), time.monotonic(), True
        self.jobs = body.jobs(prompt, engine.slots - len(prompt), self._listener)
        for job in self.jobs:
            job.deadline = self.begun + settings.timeout
        self.answers = [Answer(tokenizer, prompt, stops, self.chat) for _ in self.jobs]
        kind = "chatcmpl" if self.chat else "cmpl"
        self.head = {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": settings.name}

    def _listener(self, index: int) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            if not self.loop.is_closed():
                self.loop.call_soon_threadsafe(self.events.put_nowait, (index, event))

        return listen

    def submit(self) -> None:
        """Queue the jobs, all or none."""
        for count, job in enumerate(self.jobs):
            try:
                self.engine.submit(job)
            except Exception:
                for earlier in self.jobs[:count]:
                    earlier.cancel()
                raise

    async def whole(self, request: Request) -> Response:
        """The reply as one object, once all choices have ended; nobody's if the client leaves."""
        texts, ends = ["" for _ in self.jobs], ["" for _ in self.jobs]
        looking = asyncio.ensure_future(self._watch(request))
        try:
            async for index, text, reason in self._texts():
                texts[index] += text
                ends[index] = reason or ends[index]
        except _Failed as error:
            return self._failure(error.end)
        finally:
            looking.cancel()
            self._cancel()
        choices = [
            self._choice(index, text, reason, self.answers[index].logprobs())
            for index, (text, reason) in enumerate(zip(texts, ends, strict=True))
        ]
        kind = "chat.completion" if self.chat else "text_completion"
        return JSONResponse(self.head | {"object": kind, "choices": choices, "usage": self._usage()})

    async def stream(self) -> AsyncIterator[str]:
        """The reply as server-sent events. An error that comes late is an event of its own."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        head = self.head | {"object": kind}
        try:
            if self.chat:
                for index in range(len(self.jobs)):
                    yield _event(head | {"choices": [_delta(index, {"role": "assistant", "content": ""}, None)]})
            async for index, text, reason in self._texts():
                logprobs = self.answers[index].logprobs()
                if text or reason or logprobs:
                    yield _event(head | {"choices": [self._part(index, text, reason, logprobs)]})
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield _event(head | {"choices": [], "usage": self._usage()})
        except _Failed as error:
            yield _event(json.loads(bytes(self._failure(error.end).body)))
        finally:
            self._cancel()
        yield "data: [DONE]\n\n"

    async def _texts(self) -> AsyncIterator[tuple[int, str, str | None]]:
        """``(choice, new text, reason of its end or None)`` as events come."""
        open_jobs = set(range(len(self.jobs)))
        while open_jobs:
            index, event = await self.events.get()
            if index not in open_jobs:
                continue
            answer = self.answers[index]
            if isinstance(event, Token):
                self._count_first()
                text = answer.add(event)
                reason = "stop" if answer.stopped else None
            elif event.reason in _STATUS:
                raise _Failed(event)
            else:
                text, reason = answer.end(), "stop" if answer.stopped else event.reason
            if reason:
                open_jobs.discard(index)
                self.jobs[index].cancel()
            yield index, text, reason
        self.metrics.requests.labels("ok").inc()
        self.metrics.whole.observe(time.monotonic() - self.begun)

    def _count_first(self) -> None:
        if self.first:
            self.first = False
            self.metrics.first.observe(time.monotonic() - self.begun)
            self.metrics.prompt.inc(len(self.prompt))
            self.metrics.cached.inc(self.jobs[0].cached)
        self.metrics.new.inc()

    def _failure(self, end: End) -> JSONResponse:
        self.metrics.requests.labels(end.reason).inc()
        return failure(_STATUS[end.reason], end.message or f"the request was {end.reason}", end.reason)

    def _cancel(self) -> None:
        for job in self.jobs:
            job.cancel()

    async def _watch(self, request: Request) -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(_LOOK)
        self._cancel()

    def _choice(self, index: int, text: str, reason: str, logprobs: dict | None) -> dict:
        choice: dict[str, Any] = {"index": index, "finish_reason": reason, "logprobs": logprobs}
        return choice | ({"message": {"role": "assistant", "content": text}} if self.chat else {"text": text})

    def _part(self, index: int, text: str, reason: str | None, logprobs: dict | None) -> dict:
        if not self.chat:
            return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}
        return _delta(index, {"content": text} if text else {}, reason) | {"logprobs": logprobs}

    def _usage(self) -> dict:
        new = sum(job.new for job in self.jobs)
        return {
            "prompt_tokens": len(self.prompt), "completion_tokens": new, "total_tokens": len(self.prompt) + new,
            "prompt_tokens_details": {"cached_tokens": self.jobs[0].cached},
        }


class _Failed(Exception):
    """A choice ended without an answer."""

    def __init__(self, end: End):
        super().__init__(end.reason)
        self.end = end


def _event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _delta(index: int, delta: dict, reason: str | None) -> dict:
    return {"index": index, "delta": delta, "finish_reason": reason}
