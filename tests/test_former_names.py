"""Names of options in the release before: they work, with a line that says the new one, and no help shows them."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import typer

import gemq
from gemq import choices
from gemq.algorithms import allocation, method, perturbation
from gemq.cli.app import app
from gemq.generation import MODES
from gemq.recipes import quantize_config
from gemq.reference.grid import CLIPS

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("options, warned, field", [
    (["--no-stream"], "--no-stream is now --keep model", ("keep", "model")),
    (["--stream"], "--stream is now --keep layer", ("keep", "layer")),
    (["--scratch", "memory"], "--scratch memory is now --keep activations", ("keep", "activations")),
    (["--scratch", "disk"], "--scratch disk is now --keep layer", ("keep", "layer")),
    (["--no-stream", "--scratch", "memory"], "--no-stream is now --keep model", ("keep", "model")),
    (["--redo"], "--redo is now --changed redo", ("changed", "redo")),
    (["--restart"], "--restart is now --changed restart", ("changed", "restart")),
])  # fmt: skip
def test_options_of_quantize(gemq_run, monkeypatch, options, warned, field):
    seen = []
    monkeypatch.setattr("gemq.cli.quantizing.run", lambda config, *rest: seen.append(config))
    code, out, err = gemq_run("quantize", "m", "-o", "o", *options)
    assert (code, out, err) == (0, "", f"warning: {warned}; the old name goes with the next release\n")
    assert gemq_run("quantize", "m", "-o", "o", f"--{field[0]}", field[1]) == (0, "", "")
    assert seen[0] == seen[1] == quantize_config("m", "o", **{field[0]: field[1]})


def test_settings_files(gemq_run, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("gemq.cli.quantizing.run", lambda config, *rest: seen.append(config))
    file = tmp_path / "s.yaml"
    file.write_text("stream: false\nrestart: true\n")
    code, _, err = gemq_run("quantize", "m", "-o", "o", "--config", file)
    assert code == 0 and len(err.splitlines()) == 2
    assert seen == [quantize_config("m", "o", keep="model", changed="restart")]


@pytest.mark.parametrize("options, message", [
    (["--scratch", "tape"], "--scratch must be one of disk, memory, got 'tape'"),
    (["--redo", "--restart"], "--redo and --restart exclude each other"),
])  # fmt: skip
def test_what_was_refused_is(gemq_run, options, message):
    code, _, err = gemq_run("quantize", "m", "-o", "o", *options)
    assert code == 2 and message in err


@pytest.mark.parametrize("keywords, message, fields", [
    ({"stream": False}, "stream is now keep='model'", {"keep": "model"}),
    ({"scratch": "memory"}, "scratch is now keep='activations'", {"keep": "activations"}),
    ({"redo": True}, "redo is now changed='redo'", {"changed": "redo"}),
    ({"restart": True}, "restart is now changed='restart'", {"changed": "restart"}),
])  # fmt: skip
def test_keywords(keywords, message, fields):
    with pytest.warns(DeprecationWarning, match=re.escape(message)) as caught:
        found = quantize_config("m", "o", **keywords)
    assert found == quantize_config("m", "o", **fields) and len(caught) == 1
    with pytest.raises(TypeError, match="unexpected keyword argument 'steam'"):
        quantize_config("m", "o", **keywords, steam=False)


def test_formats(gemq_run, model_folder, text_file):
    eval_ = ["eval", model_folder, "--data", text_file, "--length", "32", "--limit", "2"]
    code, out, err = gemq_run(*eval_, "-o", "json", "-q")
    assert code == 0 and err == "warning: -o json is now --format json; the old name goes with the next release\n"
    assert json.loads(out)[0]["tokens"] == json.loads(gemq_run(*eval_, "--format", "json", "-q")[1])[0]["tokens"]
    assert gemq_run("inspect", "nowhere", "-o", "xml")[0] == 2


def test_bench_and_plan(gemq_run, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("gemq.bench.run_bench", lambda config, note: "result")
    monkeypatch.setattr("gemq.bench.write_json", lambda result, path: seen.append(path))
    monkeypatch.setattr("gemq.cli.bench._emit", lambda result, form: seen.append(form.value))
    monkeypatch.setattr("gemq.cli.bench._show", lambda result: seen.append("table"))
    base = ["bench", "--model-config", "mixtral-8x7b", "--random-weights", "--bits", "2"]
    assert "-o md is now --format md" in gemq_run(*base, "-o", "md")[2]
    assert "--json is now --output" in gemq_run(*base, "--json", tmp_path / "a")[2]
    assert gemq_run(*base, "-o", tmp_path / "b", "--format", "csv") == (0, "", "")
    assert seen == ["md", tmp_path / "a", "table", tmp_path / "b", "csv"]
    code, out, err = gemq_run("plan", "mixtral-8x7b", "--engine", "memory", "--device", "h100")
    assert code == 0 and "--engine memory is now --keep model" in err
    assert out == gemq_run("plan", "mixtral-8x7b", "--keep", "model", "--device", "h100")[1] and "keep model" in out


def test_outputs_as_arguments(gemq_run, tmp_path):
    code, _, err = gemq_run("export", tmp_path / "none", "out")
    assert code == 2 and err.startswith("warning: gemq export MODEL out is now gemq export MODEL --output out")
    code, _, err = gemq_run("import-gptq", tmp_path / "none")
    assert code == 2 and "--output must be given" in err
    code, _, err = gemq_run("export", tmp_path / "none", "a", "-o", "b")
    assert code == 2 and "the output is given twice: a and --output b" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_output_and_format_are_called_so_everywhere(name):
    for parameter in COMMANDS[name].params:
        if getattr(parameter, "hidden", False):
            continue
        if "-o" in parameter.opts or parameter.name == "output":
            assert parameter.opts == ["--output", "-o"]
        if "--format" in parameter.opts or parameter.name == "form":
            assert parameter.opts == ["--format"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_no_former_name(gemq_run, name):
    former = {o for p in COMMANDS[name].params if getattr(p, "hidden", False) for o in (*p.opts, *p.secondary_opts)}
    shown = gemq_run(name, "--help-all" if name == "quantize" else "--help")[1]
    settings = gemq_run("settings", name, "--example")[1]
    for option in former - {"-o", "--json"}:
        assert not re.search(rf"{re.escape(option)}\b(?!-)", shown) or option.startswith("former"), option
        assert f"# {option[2:]}:" not in settings


def test_layers_and_stages_share_a_log(gemq_run, model_folder, quick, tmp_path):
    log = tmp_path / "log.jsonl"
    plain = ["quantize", model_folder, "--bits", "2", "--method", "uniform", "--no-tune-routers", *quick]
    assert gemq_run(*plain, "-o", tmp_path / "a", "--log", log)[0] == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    layers = [line for line in lines if line.get("event") == "layer"]
    assert [line["layer"] for line in layers] == [0, 1] and layers[0]["error"] > 0 and layers[0]["budget"] == 2
    assert {line["stage"] for line in lines} >= {"read the model", "quantize", "save"}
    # the whole model in memory goes on with the file
    assert gemq_run(*plain, "-o", tmp_path / "b", "--log", log, "--keep", "model")[0] == 0
    more = [json.loads(line) for line in log.read_text().splitlines()][len(lines) :]
    assert [line["layer"] for line in more if line.get("event") == "layer"] == [0, 1]
    told = []
    calibration, samples, length = quick[1], int(quick[3]), int(quick[5])
    gemq.quantize(
        model_folder, tmp_path / "c", bits=2, method="uniform", tune_routers=False, calibration=calibration,
        samples=samples, length=length, keep="activations", log=log, on_layer=told.append,
    )
    assert [layer.layer for layer in told] == [0, 1]
    assert log.read_text().count('"event": "layer"') == 6


def test_a_layer_log_still_works(gemq_run, model_folder, quick, tmp_path):
    log = tmp_path / "layers.csv"
    code, _, err = gemq_run("quantize", model_folder, "-o", tmp_path / "a", "--bits", "2", "--method", "uniform",
                            "--no-tune-routers", *quick, "-q", "--layer-log", log)
    assert code == 0 and "warning: --layer-log is now --log" in err
    assert len(log.read_text().splitlines()) == 3


def test_choices_are_those_that_the_method_knows():
    pairs = (
        (choices.Method, method.METHODS), (choices.RouterMethod, method.ROUTER_METHODS),
        (choices.Estimate, method.ESTIMATES), (choices.Constraints, allocation.PER_LAYER),
        (choices.Accounting, allocation.ACCOUNTINGS), (choices.Granularity, allocation.GRANULARITIES),
        (choices.Solver, allocation.SOLVERS), (choices.Perturbation, perturbation.PERTURBATIONS),
        (choices.Clip, CLIPS), (choices.Compile, MODES),
    )  # fmt: skip
    for kind, allowed in pairs:
        assert set(kind) == set(allowed), kind
    named = [item for _, item in inspect.getmembers(choices, inspect.isclass) if item.__module__ == choices.__name__]
    own = {choices.Recipe, choices.Dtype, choices.Keep, choices.Changed}
    assert {kind for kind, _ in pairs} | own == set(named)
    assert Path(choices.__file__).read_text().count("import") == 3
