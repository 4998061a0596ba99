"""Options of the benchmarks."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import pytest


def _peer(text: str) -> str:
    module, separator, function = text.partition(":")
    if not (module and separator and function):
        raise argparse.ArgumentTypeError(f"--peer must be module:function, got {text!r}")
    return text


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"--budget must be a number of seconds, got {text!r}")
    return value


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gemq benchmarks")
    group.addoption("--rows-json", type=Path, help="write the MoE rows here after every case")
    group.addoption("--budget", type=_seconds, help="start no MoE case after this many seconds")
    group.addoption("--peer", type=_peer, action="append", default=[], metavar="MODULE:FUNCTION",
                    help="measure this kernel too; benchmarks/layers.py, Peer, has the call")  # fmt: skip
    group.addoption("--recorded-command", help="what the rows say was run (default: the command line)")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.recorded_command is None:
        words = [Path(sys.argv[0]).name.replace("__main__.py", "pytest"), *sys.argv[1:]]
        # only names of files: where a checkout lies is nobody's business
        config.option.recorded_command = shlex.join(Path(w).name if w.startswith("/") else w for w in words)
