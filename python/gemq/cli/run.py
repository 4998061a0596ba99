"""Run the typer application and turn exceptions into exit codes."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings

import typer

from gemq.cli.app import app
from gemq.cli.display import configure, errors
from gemq.cli.escapes import printable
from gemq.errors import FailedElsewhereError, GemqError
from gemq.launch import place_to_report

# characters of an error message that are shown
_LONGEST = 2000


def _fail(message: str) -> None:
    # a tensor or file name may hold codes that move a terminal's cursor, or a megabyte
    shown = printable(message, keep="")
    shown = shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST // 2]} ... {shown[-_LONGEST // 2 :]}"
    place = place_to_report()
    who = f"rank {place.rank}: " if place.size > 1 and not shown.startswith("rank ") else ""
    errors().print(f"error: {who}{shown}", style="bold red", markup=False, highlight=False, soft_wrap=True)


def _quiet_libraries() -> None:
    """Silence libraries: those that are not imported yet read the environment when they are."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # an unknown hub name is said once, by us, and not at every retry
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    if "transformers" in sys.modules:
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    # a model without shared experts may have one of no width
    warnings.filterwarnings("ignore", message="Initializing zero-element tensors")


class _Notices(logging.Handler):
    """Shows what the library warns of by its logger ``gemq``, of several processes rank 0's."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record in one line."""
        if place_to_report().rank == 0:
            text = printable(record.getMessage(), keep="")
            errors().print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def _show_notices() -> None:
    logger = logging.getLogger("gemq")
    if not any(isinstance(handler, _Notices) for handler in logger.handlers):
        logger.addHandler(_Notices(logging.WARNING))


def run(arguments: list[str], debug: bool = False) -> int:
    """The exit code of ``gemq *arguments``; with ``debug`` exceptions show their traceback."""
    if not debug:
        _quiet_libraries()
    _show_notices()
    arguments, flags = _take_flags(arguments)
    configure(quiet=bool(flags & {"-q", "--quiet"}), plain="--no-color" in flags)
    try:
        code = _call(arguments)
        sys.stdout.flush()
        return code
    except (typer.Abort, KeyboardInterrupt):
        _fail("interrupted")
        return 130
    except BrokenPipeError:
        # `gemq inspect ... | head`: leave quietly, also at the interpreter's own flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FailedElsewhereError:
        # rank 0 has said why
        return 2
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _report(error)


def _take_flags(arguments: list[str]) -> tuple[list[str], set[str]]:
    """Arguments without the flags that may stand anywhere before ``--``, and those flags."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = {"-q", "--quiet", "--no-color"}
    kept = [a for a in arguments[:end] if a not in flags]
    return [*kept, *arguments[end:]], flags & set(arguments[:end])


def _call(arguments: list[str]) -> int:
    try:
        code = app(args=arguments, prog_name="gemq", standalone_mode=False)
    except typer.Exit as stop:
        code = stop.exit_code
    except SystemExit as stop:
        # how typer and rich leave when the reader of standard output is gone
        if isinstance(stop.__context__, BrokenPipeError):
            raise stop.__context__ from None
        raise
    if code == 130:
        # typer turns Ctrl-C into this code
        raise KeyboardInterrupt
    return code or 0


def _out_of_memory(error: Exception) -> bool:
    """An allocation that failed, on the host or a GPU; torch has no class of its own for the host's."""
    torch = sys.modules.get("torch")
    kinds = (MemoryError,) if torch is None else (MemoryError, torch.OutOfMemoryError)
    if isinstance(error, kinds):
        # gemq's own says what would fit already
        return not isinstance(error, GemqError)
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _report(error: Exception) -> int:
    usage = getattr(error, "format_message", None)
    if usage is not None:
        # typer's own errors, of a bad option or argument; empty where it has shown the help instead
        text = " ".join(usage().split()).replace(": Value error, ", ": ")
        if text:
            _fail(text)
        return 2
    message = " ".join(str(error).split())
    if _out_of_memory(error):
        asked = re.search(r"tried to allocate ([\d.]+ \w+)", message, re.IGNORECASE)
        what = f"{asked[1]} more could not be had" if asked else "the machine has no more"
        _fail(f"out of memory: {what} (gemq plan shows what would fit)")
        return 2
    if isinstance(error, (GemqError, ValueError, OSError)):
        _fail(message or type(error).__name__)
        return 2
    _fail(f"internal error, {type(error).__name__}: {message[:300]} (--debug shows more)")
    return 1
