"""``make compat`` runs the two ends of what is declared."""

from __future__ import annotations

import re
import tomllib

import pytest
from compat import ENDS, OTHERS, ROOT, SUITES, VARIED


@pytest.mark.parametrize("package", VARIED)
def test_the_ends_are_those_declared(package):
    oldest, newest = (getattr(versions, package) for versions in ENDS)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (bound,) = (m[1] for line in project["dependencies"] if (m := re.match(rf"{package}>=([0-9.]+)", line)))
    assert oldest.split(".")[:2] == bound.split(".")
    assert f"\n{package}=={newest}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_suites_name_files_that_exist():
    assert {versions.suite for versions in ENDS} == {"all"} and {v.suite for v in OTHERS} <= set(SUITES)
    assert all((ROOT / "tests" / name).is_file() for names in SUITES.values() for name in names)
