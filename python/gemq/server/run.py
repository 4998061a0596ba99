"""Start a server: the address first, then the model, then requests."""

from __future__ import annotations

import logging
import signal
import socket
from pathlib import Path
from typing import Any

from gemq.errors import GemqError
from gemq.loading import load_any, load_tokenizer
from gemq.server.app import create_app
from gemq.server.engine import Engine
from gemq.server.settings import Settings

_log = logging.getLogger("gemq")


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address. Raises :class:`GemqError` if the port is in use or the address is not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
    except OSError as error:
        found.close()
        why = error.strerror or error
        raise GemqError(f"cannot serve at {host}:{port}: {why}; give another --host or --port") from None
    return found


def serve(
    model: str, *, host: str, port: int, rows: int, context: int, queue: int, prefix_bytes: int, settings: Settings,
    dtype: str, device: str | None,
) -> None:
    """Serve a model until the process is told to stop (Ctrl-C, SIGTERM); running requests are then finished."""
    import uvicorn

    listening = bind(host, port)
    tokenizer = load_tokenizer(model)
    loaded: Any = load_any(model, dtype, device)
    positions = loaded.config.get_text_config().max_position_embeddings
    engine = Engine(loaded, rows, min(context, positions), queue, prefix_bytes)
    step = f"{engine.rows.kind} step" + (f" ({engine.rows.reason})" if engine.rows.reason else "")
    # from here on nobody is turned away
    listening.listen(128)
    address = f"http://{host}:{listening.getsockname()[1]}/v1"
    print(f"serving {settings.name!r} at {address}: {rows} requests at a time of up to {engine.slots} tokens, {step}",
          flush=True)
    config = uvicorn.Config(
        create_app(engine, tokenizer, settings), log_level="warning", timeout_graceful_shutdown=int(settings.grace) + 5,
    )
    for name in (signal.SIGINT, signal.SIGTERM):
        # uvicorn stops gracefully and then raises the signal anew, for whoever had it before
        signal.signal(name, lambda *_: None)
    uvicorn.Server(config).run([listening])


def served_name(model: str) -> str:
    """The name that requests give: the folder's, or the hub name."""
    return Path(model).resolve().name if Path(model).is_dir() else model
