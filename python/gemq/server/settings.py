"""Options of a server beside those of its engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Options of a server: the model's ``name``, an ``api_key`` (None for none), seconds that a request may take, bytes
    of a body, and seconds that running requests are given when the server stops."""

    name: str
    api_key: str | None = None
    timeout: float = 600.0
    max_body: int = 1 << 20
    grace: float = 30.0
