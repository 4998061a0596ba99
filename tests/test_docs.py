"""Run the documentation: every block that is not marked as an illustration works, page by page."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gemq.algorithms.gptq import GptqConfig
from gemq.cli.run import run
from gemq.recipes import RECIPES, Recipe

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
FENCE = re.compile(r"(?P<before>[^\n]*)\n```(?P<language>\w*)\n(?P<code>.*?)```", re.S)
ILLUSTRATION = re.compile(r"<!-- illustration: .+ -->")


def blocks(page: Path) -> list[tuple[str, str]]:
    """``(language, code)`` of the page's blocks that claim to run."""
    found = []
    for match in FENCE.finditer("\n" + page.read_text(encoding="utf-8")):
        if match["language"] in ("bash", "python") and not ILLUSTRATION.fullmatch(match["before"].strip()):
            found.append((match["language"], match["code"]))
    return found


RUNNABLE = [page for page in PAGES if blocks(page)]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder that looks like the clone's root to the commands, in which `out/` may be written."""
    (tmp_path / "python").symlink_to(ROOT / "python")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.mark.parametrize("page", RUNNABLE, ids=[str(p.relative_to(DOCS)) for p in RUNNABLE])
def test_the_blocks_of_a_page_run_in_order(page: Path, workplace: Path, capsys) -> None:
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, str(page.relative_to(ROOT)), "exec"), {"__name__": "documentation"})
            continue
        for line in code.strip().replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            assert words[0] == "gemq", f"{page.name} runs {words[0]}: mark the block as an illustration"
            assert run([*words[1:], "-q"]) == 0, (line, capsys.readouterr().err)
            assert capsys.readouterr().out, line


def test_pages_with_something_to_run_are_found() -> None:
    assert {p.name for p in RUNNABLE} >= {"tutorial.md", "choosing-a-budget.md", "command-line.md", "reports.md",
                                          "checkpoints.md", "format.md", "allocation.md"}
    counted = sum(text.count("```bash") + text.count("```python") for text in map(Path.read_text, PAGES))
    marked = sum(len(ILLUSTRATION.findall(text)) for text in map(Path.read_text, PAGES))
    assert counted == marked + sum(len(blocks(page)) for page in PAGES)


def test_settings_shown_are_settings(capsys) -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "command-line.md").read_text(), re.S)
    assert run(["settings", "quantize"]) == 0
    assert set(yaml.safe_load(shown)) <= set(capsys.readouterr().out.split())


def test_the_table_of_recipes_is_the_codes() -> None:
    row = r"\| `(\w+)` \| (\w+) \| (\w+) \| ([^|]+) \| ([^|]+) \| (\d+) \| ([^|]+) \| ([^|]+) \| (\w+) \|"
    rows = re.findall(row, (DOCS / "command-line.md").read_text())
    assert [name for name, *_ in rows] == [recipe.value for recipe in Recipe]
    defaults = {"perturbation": "gptq", "constraints": "none", "samples": 128, "estimate": "tuned",
                "tune_routers": True, "accounting": "exact", "granularity": "auto"}
    words = {"tuned": "the tuned model", "fp": "the original, once", "exact": "exactly",
             "paper": "as the paper has them", "auto": "a matrix", "expert": "an expert"}
    for name, perturbation, constraints, granularity, accounting, samples, estimate, routers, clip in rows:
        wanted = defaults | RECIPES[Recipe(name)]
        assert (perturbation, constraints, int(samples)) == (
            wanted["perturbation"], wanted["constraints"], wanted["samples"])
        assert (estimate, accounting, granularity) == tuple(
            words[wanted[key]] for key in ("estimate", "accounting", "granularity"))
        assert clip == GptqConfig.for_recipe("paper" if name == "paper" else "default").clip
        assert routers == ("tuned" if wanted["tune_routers"] else "as they are")


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings", reason="the docs extra is not installed: make docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "index.html").read_text()
    loaded = re.findall(r"""<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)""", home)
    assert not loaded, loaded
    commands = (tmp_path / "reference" / "commands.html").read_text()
    assert "gemq report" in commands and "--tensor-bits" in commands
    api = (tmp_path / "reference" / "gemq.html").read_text()
    assert "gemq.QuantizeConfig" in api and ":class:" not in api


def test_tests_that_the_documents_name_exist() -> None:
    sources = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("*.py")}
    every = "\n".join(sources.values())
    for page in PAGES:
        for name in re.findall(r"`(?:\w+/)?(?:\w+(?:\.py)?::)?(test_\w+)", page.read_text(encoding="utf-8")):
            assert name in sources or f"def {name}(" in every, f"{page.name} names {name}"


def test_the_drawings_are_what_the_layouts_say() -> None:
    done = subprocess.run([sys.executable, DOCS / "draw_layouts.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
