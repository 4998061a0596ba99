"""gemq in one call each: the names, defaults and results of the command line."""

from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import typer

import gemq
from gemq.cli.app import app
from gemq.cli.run import run
from gemq.integrity import WEIGHTS_FILE
from gemq.recipes import DEFAULTS, RECIPES, Recipe, quantize_config

# what the command line has for itself: how it shows things, and where it takes settings from
SHOWN = {
    "form", "dry_run", "upload_repo", "private", "resume", "config_file", "help", "help_all",
}


def parameters():
    """The options of ``gemq quantize`` by name."""
    command = typer.main.get_command(app).commands["quantize"]
    return {p.name: p for p in command.params if p.name not in SHOWN and not getattr(p, "hidden", False)}


def test_names_and_defaults_are_those_of_the_command_line():
    python = {name: p for name, p in inspect.signature(quantize_config).parameters.items() if name != "former"}
    command = parameters()
    assert set(python) == set(command)
    for name, parameter in command.items():
        wanted, own = parameter.default, python[name].default
        if name in DEFAULTS:
            # None leaves it to the recipe, on either side
            assert own is None and DEFAULTS[name] == getattr(wanted, "value", wanted), name
        elif name == "candidates":
            assert own == tuple(int(c) for c in wanted.split(","))
        elif name not in ("model", "output"):
            assert own == getattr(wanted, "value", wanted) or (own is None and wanted in (None, [])), name


@pytest.mark.parametrize("recipe", Recipe)
def test_recipes_are_those_of_the_command_line(recipe, gemq_run, monkeypatch):
    seen = []
    monkeypatch.setattr("gemq.cli.quantizing.run", lambda config, *rest: seen.append(config))
    for more in ([], ["--constraints", "c2", "--samples", "7", "--no-tune-routers"]):
        assert gemq_run("quantize", "m", "-o", "o", "--bits", "3,2", "--recipe", recipe, *more)[0] == 0
        options = {"constraints": "c2", "samples": 7, "tune_routers": False} if more else {}
        assert seen.pop() == quantize_config("m", "o", bits=[3, 2], recipe=recipe, **options)
        assert not more or RECIPES[recipe] is not None


@pytest.fixture(scope="module")
def options(text_file):
    return {"calibration": str(text_file), "samples": 6, "length": 24, "constraints": "none"}


def test_one_line_gives_the_bytes_of_the_command(model_folder, text_file, options, tmp_path):
    found = gemq.quantize(model_folder, tmp_path / "python", bits=2.0, tensor_bits={"o_proj": 8}, **options)
    assert isinstance(found, gemq.QuantizeOutcome) and found.path == tmp_path / "python" and found.budget == 2.0
    arguments = ["quantize", str(model_folder), "-o", str(tmp_path / "shell"), "--bits", "2", "--constraints", "none",
                 "--calibration", str(text_file), "--samples", "6", "--length", "24", "--tensor-bits", "o_proj=8", "-q"]
    assert run(arguments) == 0
    one, two = ((tmp_path / name / WEIGHTS_FILE).read_bytes() for name in ("python", "shell"))
    assert one == two


def test_several_budgets_and_all_the_rest(model_folder, options, tmp_path):
    stages, layers = [], []
    found = gemq.quantize(
        str(model_folder), str(tmp_path / "out"), bits="2.5,2", progress=lambda name, done, total: stages.append(name),
        on_layer=layers.append, **options,
    )
    assert [o.budget for o in found] == [2.5, 2.0] and "measure" in stages and len(layers) == 4
    whole = gemq.preview(model_folder, tmp_path / "next", bits=2.0, costs=tmp_path / "out" / "2.5", **options)
    assert whole.exact and whole.budget == 2.0
    assert [p.budget for p in gemq.preview(model_folder, tmp_path / "next", bits=[3, 2], **options)] == [3, 2]
    one = gemq.allocate(tmp_path / "out" / "2.5", 2.0, constraints="none")
    assert one.bits_per_expert <= 2.0
    assert [a.budget for a in gemq.allocate(tmp_path / "out" / "2.5", "2.5,2")] == [2.5, 2]
    model = gemq.from_pretrained(found[1].path)
    assert np.isfinite(gemq.evaluate(found[1].path, options["calibration"], length=16, limit=2).perplexity)
    assert model.config.vocab_size == 96


def test_a_config_says_everything(model_folder, options, tmp_path):
    config = gemq.quantize_config(model_folder, tmp_path / "out", bits=2.0, method="uniform", tune_routers=False,
                                  **options)
    (found,) = gemq.quantize(config)
    assert Path(found.path) == tmp_path / "out"
    for call in (gemq.quantize, gemq.preview):
        with pytest.raises(TypeError, match="a QuantizeConfig says everything"):
            call(config, bits=3)
        with pytest.raises(TypeError, match="output must be given"):
            call(str(model_folder), bits=3)


@pytest.mark.parametrize("given, error, message", [
    ({"bits": "many"}, ValueError, "bits must be numbers"), ({"bits": [2, 2]}, ValueError, "names a budget twice"),
    ({"bits": None, "recipe": "quick"}, ValueError, "recipe must be one of default, best, paper, fast, got 'quick'"),
    ({"candidates": "1,9"}, ValueError, r"candidates must be in 0\.\.8"),
    ({"candidates": []}, ValueError, "candidates"),
    ({"shared_bits": "some"}, ValueError, "shared_bits must be auto or a width"),
    ({"tensor_bits": ["o_proj"]}, ValueError, "tensor_bits must be like 'o_proj=8', got 'o_proj'"),
    ({"redo": True, "restart": True}, ValueError, "redo and restart exclude each other"),
    ({"keep": "everything"}, ValueError, "keep must be one of layer, activations, model, got 'everything'"),
    ({"changed": "go on"}, ValueError, "changed must be one of refuse, redo, restart, got 'go on'"),
    ({"method": "best"}, ValueError, "method must be one of"), ({"sampels": 3}, TypeError, "sampels"),
])  # fmt: skip
def test_bad_options(model_folder, tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        gemq.quantize(model_folder, tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())
