"""Tests that the README's commands and code run as they stand."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the clone's root to the commands, in which `out/` may be written."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "python").symlink_to(ROOT / "python")
    return folder


def run(program: list[str], folder: Path) -> str:
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_commands_and_code_run_in_order(workplace: Path) -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("gemq ")]
    names = [c.split()[1] for c in commands]
    assert names == ["plan", "quantize", "eval", "generate", "serve"]
    serve = commands.pop()
    # one process for all commands: what is tested is the commands, not five imports of torch
    program = (
        "import shlex, sys\nfrom gemq.cli.run import run\n"
        "for line in sys.argv[1:]:\n"
        "    code = run(shlex.split(line)[1:])\n"
        "    assert code == 0, (line, code)\n"
    )
    shown = run([sys.executable, "-c", program, *commands], workplace)
    assert "perplexity" in shown and "longest context" in shown
    quick_start, client = blocks("python")
    assert len(run([sys.executable, "-c", quick_start], workplace).split()) > 8
    assert len(_asked(serve, client, workplace).split()) > 8


def _asked(serve: str, client: str, workplace: Path) -> str:
    """The client's output, from a server at a port of its own."""
    command = [sys.executable, "-m", *shlex.split(serve), "--port", "0"]
    with subprocess.Popen(command, cwd=workplace, stdout=subprocess.PIPE, text=True) as server:
        try:
            port = re.search(r"http://127.0.0.1:(\d+)/v1", server.stdout.readline())[1]
            assert "127.0.0.1:8000" in client
            return run([sys.executable, "-c", client.replace("8000", port)], workplace)
        finally:
            server.kill()


def test_it_is_one_screen() -> None:
    assert len(README.splitlines()) <= 100


def test_tables_are_those_of_the_result_files() -> None:
    scope: dict = {"__file__": str(ROOT / "docs" / "update_tables.py"), "__name__": "update_tables"}
    exec(compile((ROOT / "docs" / "update_tables.py").read_text(), "update_tables.py", "exec"), scope)
    for document in scope["DOCUMENTS"]:
        text = document.read_text(encoding="utf-8")
        assert scope["updated"](text) == text, f"{document.name}: run `python docs/update_tables.py`"


def test_the_links_of_the_documents_lead_somewhere() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (document.parent / link).exists(), f"{document.name}: {link}"


def test_make_targets_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("bash")), flags=re.M):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
