"""``pytest`` runs the tests, ``pytest --benchmark-only`` the benchmarks; a path given explicitly is always taken."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.args_source != pytest.Config.ArgsSource.TESTPATHS or collection_path.suffix != ".py":
        return None
    skipped = "tests" if config.getoption("benchmark_only", False) else "benchmarks"
    return True if (ROOT / skipped) in collection_path.parents else None
