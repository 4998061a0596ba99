"""Another ``gemq._C`` for a run of pytest: a build of its own, or one that runs elsewhere."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


class Substitute:
    """A pytest plugin that puts what ``load`` returns in the place of the extension.

    pytest itself must come first: it warns of plugins whose modules gemq has imported already. The conftest comes
    after: it imports the package.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load, self.core = load, None

    @pytest.hookimpl(tryfirst=True)
    def pytest_load_initial_conftests(self) -> None:
        import torch  # noqa: F401  (first, as in gemq._core)

        self.core = sys.modules["gemq._C"] = self.load()
        from gemq._core import core

        core.cache_clear()
        if core() is not self.core:
            raise SystemExit(f"the tests would run {core().__file__}")


def extension(path: Path) -> Any:
    """The compiled module of a file."""
    spec = importlib.util.spec_from_file_location("gemq._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
