"""The server's routes, in OpenAI's form, over an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from gemq.errors import CheckpointError
from gemq.server.engine import Closing, Engine, QueueFull
from gemq.server.failures import failure
from gemq.server.limits import BodyLimit, KeyCheck
from gemq.server.metrics import Metrics
from gemq.server.replies import Reply
from gemq.server.requests import Body, ChatBody, CompletionBody
from gemq.server.settings import Settings


def create_app(engine: Engine, tokenizer: Any, settings: Settings) -> FastAPI:
    """The application; its end closes the engine."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.close, settings.grace)

    app = FastAPI(title="gemq", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(BodyLimit, limit=settings.max_body)
    app.add_middleware(KeyCheck, key=settings.api_key)
    metrics, made = Metrics(engine), int(time.time())
    _handle_errors(app)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "running": len(engine.running), "waiting": len(engine.waiting)}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [_model(settings.name, made, engine.slots)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        return _model(name, made, engine.slots) if name == settings.name else _unknown(name, settings.name)

    async def answer(body: Body, prompt: list[int], stops: tuple[str, ...], request: Request) -> Response:
        reply = Reply(engine, tokenizer, metrics, settings, body, prompt, (*body.stop, *stops))
        try:
            reply.submit()
        except QueueFull as error:
            metrics.requests.labels("refused").inc()
            return failure(429, str(error), "queue_full")
        except Closing as error:
            return failure(503, str(error), "stopping")
        if body.stream:
            return StreamingResponse(reply.stream(), media_type="text/event-stream")
        return await reply.whole(request)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        if body.model != settings.name:
            return _unknown(body.model, settings.name)
        return await answer(body, body.tokens(tokenizer), (), request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        if body.model != settings.name:
            return _unknown(body.model, settings.name)
        conversation = body.conversation(tokenizer)
        return await answer(body, conversation.tokens(), conversation.stop, request)

    return app


def _model(name: str, made: int, slots: int) -> dict:
    return {"id": name, "object": "model", "created": made, "owned_by": "gemq", "max_model_len": slots}


def _unknown(name: str, known: str) -> JSONResponse:
    return failure(404, f"there is no model {name!r}; this server has {known!r}", "model_not_found", "model")


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        # of the forms that a value may have, the one that it came nearest to
        first = max(error.errors(), key=lambda found: len(found["loc"]))
        where = ".".join(str(part) for part in first["loc"][1:]) or None
        what = first["msg"].removeprefix("Value error, ")
        return failure(400, f"{where}: {what}" if where else what, None, where)

    @app.exception_handler(ValueError)
    async def wrong(_: Request, error: ValueError) -> Response:
        long = "this server holds" in str(error) or "positions" in str(error)
        return failure(400, str(error), "context_length_exceeded" if long else None)

    @app.exception_handler(CheckpointError)
    async def refused(_: Request, error: CheckpointError) -> Response:
        return failure(400, str(error), param="messages")

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return failure(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
