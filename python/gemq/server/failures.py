"""Errors in OpenAI's form."""

from __future__ import annotations

from fastapi.responses import JSONResponse


def failure(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    """An error of a status, with its message, and the code and parameter where there is one."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)
