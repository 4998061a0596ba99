"""Run the typer application and turn exceptions into exit codes."""

from __future__ import annotations

import os
import sys
import traceback
import warnings

import click

from gemq.cli.app import app
from gemq.cli.display import errors
from gemq.errors import GemqError


def _fail(message: str) -> None:
    # markup off: a tensor or file name may hold square brackets
    errors().print(f"error: {message}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def _quiet_libraries() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def run(arguments: list[str], debug: bool = False) -> int:
    """The exit code of ``gemq *arguments``; with ``debug`` exceptions show their traceback."""
    if not debug:
        _quiet_libraries()
    try:
        app(args=arguments, prog_name="gemq", standalone_mode=False)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except (click.Abort, KeyboardInterrupt):
        _fail("interrupted")
        return 130
    except BrokenPipeError:
        # `gemq inspect ... | head`: leave quietly, also at the interpreter's own flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except click.ClickException as error:
        _fail(error.format_message())
        return 2
    except (GemqError, ValueError, OSError) as error:
        if debug:
            traceback.print_exc()
        _fail(" ".join(str(error).split()))
        return 2
    except Exception as error:
        if debug:
            traceback.print_exc()
        _fail(f"internal error, {type(error).__name__}: {' '.join(str(error).split())[:300]} (--debug shows more)")
        return 1
