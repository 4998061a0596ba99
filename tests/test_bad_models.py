"""Bad model folders: the commands that run a model name the fault and the folder in one line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from gemq.cli import run as cli


@pytest.fixture
def bad(tmp_path, model_folder):
    """Make a copy of the tiny model, with an edited ``config.json`` or without its tokenizer."""
    def make(words=True, **edits):
        folder = shutil.copytree(model_folder, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text()) | edits
        (folder / "config.json").write_text(json.dumps(config))
        for file in () if words else folder.glob("tokenizer*"):
            file.unlink()
        return folder

    return make


def says(gemq_run, message, *arguments):
    code, out, err = gemq_run(*arguments)
    assert code == 2 and out == "" and len(err.strip().splitlines()) == 1
    assert err.startswith("error: ") and message in err, err


COMMANDS = [("generate", "it was"), ("chat",)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
@pytest.mark.parametrize("words", [True, False], ids=["tokenizer", "none"])
def test_another_method(gemq_run, bad, command, words):
    name, *rest = command
    folder = bad(words, quantization_config={"quant_method": "awq", "bits": 4})
    says(gemq_run, "'awq'", name, folder, *rest)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
def test_no_tokenizer(gemq_run, bad, command):
    name, *rest = command
    folder = bad(words=False)
    says(gemq_run, f"no tokenizer in '{folder}': no tokenizer file that transformers reads", name, folder, *rest)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda c: c[0])
@pytest.mark.parametrize("words", [True, False], ids=["tokenizer", "none"])
def test_an_unknown_type(gemq_run, bad, command, words):
    name, *rest = command
    says(gemq_run, "`blorp`", name, bad(words, model_type="blorp"), *rest)


def test_a_known_type_of_no_supported_family(gemq_run, bad):
    says(gemq_run, "llama", "generate", bad(model_type="llama"), "it was")


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "a/b/c"])
def test_no_folder(gemq_run, path):
    says(gemq_run, f"no model in '{path}': there is no such folder", "generate", path, "it was")


HOST = "[enforce fail at x] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."


@pytest.mark.parametrize("error, size", [
    (MemoryError(), "the machine has no more"), (RuntimeError(HOST), "4096 bytes"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total"), "20.00 GiB"),
])  # fmt: skip
def test_memory_that_runs_out_anyhow(gemq_run, monkeypatch, model_folder, error, size):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("gemq.cli.answers.gemq.generate", fail)
    says(gemq_run, size, "generate", model_folder, "it was")
    says(gemq_run, "(gemq plan shows what would fit)", "generate", model_folder, "it was")
    # other faults stay what they are
    assert not cli._out_of_memory(RuntimeError("a tensor's shape")) and not cli._out_of_memory(ValueError())
