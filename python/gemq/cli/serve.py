"""``gemq serve``: its options."""

from __future__ import annotations

from typing import Annotated

import typer

from gemq.choices import Dtype
from gemq.cli.generation import Device, DtypeOption, Model
from gemq.errors import GemqError


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any that is free.", min=0, max=65535)] = 8000,
    name: Annotated[str | None, typer.Option(help="Name that requests give (default: the folder's).")] = None,
    api_key: Annotated[str | None, typer.Option(help="Requests must bring it.", envvar="GEMQ_API_KEY")] = None,
    rows: Annotated[int, typer.Option(help="Requests that are decoded at a time.", min=1, max=16)] = 8,
    context: Annotated[int, typer.Option(help="Tokens of a request, prompt and answer.", min=2)] = 4096,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more get 429.", min=1)] = 64,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take.", min=0.1)] = 600.0,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.", min=1024)] = 1 << 20,
    prefix_cache: Annotated[int, typer.Option(help="MiB for the beginnings of earlier prompts.", min=0)] = 256,
    grace: Annotated[float, typer.Option(help="Seconds for running requests when told to stop.", min=0.0)] = 30.0,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Serve a packed (or full-precision) model with an OpenAI-compatible API: chat and text completions.

    [dim]gemq serve mixtral-2.5 --port 8000[/dim]
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise GemqError(f"gemq serve needs {error.name}: pip install 'gemq[serve]'") from None
    from gemq.server import run
    from gemq.server.settings import Settings

    settings = Settings(name or run.served_name(model), api_key, timeout, max_body, grace)
    run.serve(model, host=host, port=port, rows=rows, context=context, queue=queue, prefix_bytes=prefix_cache << 20,
              settings=settings, dtype=dtype.value, device=device)
