"""The files around the code: one version, hooks that hold, a changelog of the agreed form, templates that parse."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import gemq

ROOT = Path(__file__).resolve().parents[1]
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]


def tracked():
    """The text files that git knows."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and not path.is_symlink() and b"\0" not in (data := path.read_bytes()):
            yield name, data


def test_the_version_is_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"] and "version" not in project["project"]
    source = project["tool"]["scikit-build"]["metadata"]["version"]["input"]
    assert f'__version__ = "{gemq.__version__}"' in (ROOT / source).read_text()
    assert re.fullmatch(r"\d+\.\d+\.\d+", gemq.__version__)


def test_hooks_use_what_make_installs():
    assert [repo["repo"] for repo in HOOKS] == ["local"]
    for hook in HOOKS[0]["hooks"]:
        assert hook["language"] in ("system", "pygrep"), hook["id"]
        if hook["language"] == "system":
            assert hook["entry"].split()[0].removeprefix(".venv/bin/") in ("ruff", "clang-format", "mypy")


@pytest.mark.parametrize("hook", [h["id"] for h in HOOKS[0]["hooks"] if h["language"] == "pygrep"])
def test_patterns_hold(hook):
    (found,) = (h for h in HOOKS[0]["hooks"] if h["id"] == hook)
    # as pre-commit searches: the whole file, or line by line
    flags = re.MULTILINE if "--multiline" in found.get("args", ()) else 0
    pattern, skipped = re.compile(found["entry"].encode(), flags), re.compile(found.get("exclude", "^$"))
    wrong = []
    for name, data in tracked():
        parts = [data] if flags else data.splitlines()
        if not skipped.search(name) and data and any(pattern.search(part) for part in parts):
            wrong.append(name)
    assert not wrong


def test_the_changelog_has_the_agreed_headings():
    text = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## (.*)$", text, re.M)
    assert releases[0].startswith(gemq.__version__)
    for release in text.split("\n## ")[1:]:
        headings = re.findall(r"^### (.*)$", release, re.M)
        assert headings and headings == [h for h in ("Added", "Changed", "Fixed") if h in headings]


def test_templates_parse_and_ask():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = [yaml.safe_load(path.read_text()) for path in folder.glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 3
    for form in forms:
        assert {"name", "description", "body"} <= set(form)
        assert any(item.get("validations", {}).get("required") for item in form["body"])
        ids = [item["id"] for item in form["body"]]
        assert len(set(ids)) == len(ids)
    assert "CHANGELOG.md" in (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text()
