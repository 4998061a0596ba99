"""Checks that a request passes before a route sees it: an API key, and a bound on the bytes of its body."""

from __future__ import annotations

import hmac
from typing import Any

from gemq.server.failures import failure


class BodyLimit:
    """ASGI middleware that answers 413 to a body of more than ``limit`` bytes, whatever its header says."""

    def __init__(self, app: Any, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Read the body up to the limit, then hand it on."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size, more = size + len(parts[-1]), message.get("more_body", False)
            if size > self.limit:
                refusal = failure(413, f"the body must have at most {self.limit} bytes")
                return await refusal(scope, receive, send)
        body: list[Any] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

        async def replay() -> Any:
            return body.pop() if body else await receive()

        return await self.app(scope, replay, send)


class KeyCheck:
    """ASGI middleware that answers 401 to a request without ``Authorization: Bearer key``; ``/health`` is open."""

    def __init__(self, app: Any, key: str | None):
        self.app, self.key = app, key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Compare the key in a time that does not depend on it."""
        if scope["type"] == "http" and self.key and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self.key.encode()):
                refusal = failure(401, "the API key is missing or wrong", "invalid_api_key")
                return await refusal(scope, receive, send)
        return await self.app(scope, receive, send)
