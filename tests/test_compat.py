"""``make compat`` runs what is declared."""

from __future__ import annotations

import re
import tomllib

import pytest
from compat import DECLARED, OTHERS, ROOT, SUITES, VARIED


@pytest.mark.parametrize("package", VARIED)
def test_the_set_is_the_declared_one(package):
    version = getattr(DECLARED, package)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (bound,) = (m[1] for line in project["dependencies"] if (m := re.match(rf"{package}>=([0-9.]+)", line)))
    assert version.split(".")[:2] == bound.split(".")
    assert f"\n{package}=={version}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_suites_name_files_that_exist():
    assert DECLARED.suite == "all" and {v.suite for v in OTHERS} <= set(SUITES)
    assert all((ROOT / "tests" / name).is_file() for names in SUITES.values() for name in names)
