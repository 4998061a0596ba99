"""Output of `gemq`, and a checkpoint that it made, for tests."""

from __future__ import annotations

import re

import pytest

from gemq.cli.run import run

COMMANDS = (
    "quantize", "plan", "allocate", "eval", "generate", "chat", "bench", "inspect", "verify", "demo", "export",
    "import-gptq", "auto-import",
)


@pytest.fixture(name="checkpoint", scope="session")
def a_checkpoint(model_folder, quick, tmp_path_factory):
    """Checkpoint that ``gemq quantize --bits 2`` makes of the tiny model."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny-2"
    assert run(["quantize", str(model_folder), "-o", str(path), "--bits", "2", *quick]) == 0
    return path


def plain(text):
    """Table output as one line of words."""
    return " ".join(re.sub(r"[│┃━─┏┓┗┛┡┩└┘├┤┬┴┼╇]", " ", text).split())


def fails(result, message, code=2):
    """The exit code is ``code``, standard output is empty, and standard error one line that says ``message``."""
    got, out, err = result
    assert (got, out) == (code, ""), err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert re.search(message, lines[0]), lines[0]
