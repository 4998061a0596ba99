"""The application of commands. A command imports what it needs when it runs: help and errors of usage take no time."""

from __future__ import annotations

from typing import Annotated

import typer

import gemq
from gemq.cli.allocate import allocate
from gemq.cli.auto_import import auto_import
from gemq.cli.bench import bench
from gemq.cli.checkpoints import inspect, verify
from gemq.cli.demo import demo
from gemq.cli.evaluate import evaluate
from gemq.cli.generation import chat, generate
from gemq.cli.interchange import export, import_gptq
from gemq.cli.panels import PanelledCommand
from gemq.cli.plan import plan
from gemq.cli.quantize import quantize
from gemq.cli.report import report
from gemq.cli.serve import serve
from gemq.cli.settings import settings
from gemq.cli.tune import tune
from gemq.cli.upload import upload

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich",
    help="Quantize the experts of Mixture-of-Experts language models globally, and run them packed.",
)


def _version(value: bool) -> None:
    if value:
        print(f"gemq {gemq.__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (anywhere on the line).")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Only data, warnings and errors (anywhere on the line).")]
    = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours, as with NO_COLOR (anywhere).")] = False,
) -> None:
    """Quantize the experts of Mixture-of-Experts language models globally, and run them packed."""


app.command(cls=PanelledCommand)(quantize)
app.command()(allocate)
app.command("eval")(evaluate)
for command in (plan, generate, chat, serve, bench, inspect, verify, report, upload, settings, tune, export):
    app.command()(command)
app.command("import-gptq")(import_gptq)
app.command("auto-import")(auto_import)
app.command()(demo)
