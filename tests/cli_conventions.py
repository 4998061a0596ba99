"""A checkpoint with widths by name, and the commands' parameters, for tests."""

from __future__ import annotations

import pytest
import typer

from gemq.cli.app import app
from gemq.cli.run import run


@pytest.fixture(name="made", scope="module")
def a_made(model_folder, quick, tmp_path_factory):
    """A quantized tiny model with a linear and an expert of their own widths, and the log of its layers."""
    folder = tmp_path_factory.mktemp("made")
    overrides = ["--tensor-bits", "o_proj=8", "--tensor-bits", r"layers\.1\..*experts\.2$=0",
                 "--tensor-bits", "layers.0.self_attn.q_proj=16"]
    arguments = ["quantize", str(model_folder), "-o", str(folder / "tiny"), "--bits", "2", *quick, *overrides]
    assert run([*arguments, "--log", str(folder / "log.jsonl"), "-q"]) == 0
    return folder / "tiny"


# help and completion


def commands():
    return typer.main.get_command(app).commands


def offered(command):
    """The parameters that help shows: not the names of the release before."""
    return [p for p in command.params if not getattr(p, "hidden", False)]
