"""``make compat`` runs what is declared, and what is declared goes beside the servers."""

from __future__ import annotations

import re
import tomllib

import pytest
from compat import DECLARED, NEWEST, OLDEST, OTHERS, ROOT, SUITES, VARIED


def bound(package: str) -> tuple[int, ...]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (found,) = (m[1] for line in project["dependencies"] if (m := re.match(rf"{package}>=([0-9.]+)", line)))
    return tuple(map(int, found.split(".")))


@pytest.mark.parametrize("package", VARIED)
def test_the_oldest_set_is_the_declared_one(package):
    version = tuple(map(int, getattr(OLDEST, package).split(".")))
    assert version[: len(bound(package))] == bound(package)


@pytest.mark.parametrize("package", VARIED)
def test_the_newest_set_is_the_pinned_one(package):
    version = getattr(NEWEST, package)
    assert f"\n{package}=={version}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert all(tuple(map(int, getattr(v, package).split("."))) >= bound(package) for v in DECLARED)


def test_suites_name_files_that_exist():
    assert NEWEST.suite == OLDEST.suite == "all" and {v.suite for v in (*DECLARED, *OTHERS)} <= set(SUITES)
    assert all((ROOT / "tests" / name).is_file() for names in SUITES.values() for name in names)
