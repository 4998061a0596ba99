"""Conventions that users expect of a command line: overrides, previews, formats, help, quiet."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil

import pytest
import typer
from cli_conventions import a_made, commands, offered  # noqa: F401

import gemq
from gemq.checkpoint import load_packed_config
from gemq.checkpoint_summary import summarize
from gemq.cli.app import app
from gemq.cli.panels import PANELS
from gemq.cli.run import run
from gemq.loading import load_unquantized
from gemq.nn.experts import PROJECTIONS

# overrides by name


def test_overrides_win_and_survive_saving_and_loading(made, model_folder):
    config = load_packed_config(made)
    assert config.widths.experts[1][2] == 0 and 0 not in config.widths.experts[0]
    assert config.widths.linears == {"model.layers.0.self_attn.o_proj": 8, "model.layers.1.self_attn.o_proj": 8,
                                  "model.layers.0.self_attn.q_proj": 16}
    model = gemq.from_pretrained(made)
    assert model.model.layers[0].self_attn.o_proj.bits == 8 and model.model.layers[0].self_attn.k_proj.bits == 4
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear"
    gemq.verify(made)
    # a reader of version 1 alone must refuse it rather than misread it
    stored = json.loads((made / "config.json").read_text())["quantization_config"]
    assert stored["version"] == 2
    assert len(gemq.generate(str(made), "it was on", max_new_tokens=4).tokens) == 4


def test_checkpoints_without_overrides_stay_version_1(model_folder, quick, tmp_path):
    arguments = ["quantize", str(model_folder), "-o", str(tmp_path / "u"), "--method", "uniform", "--bits", "2", *quick]
    assert run([*arguments, "-q"]) == 0
    stored = json.loads((tmp_path / "u" / "config.json").read_text())["quantization_config"]
    assert stored["version"] == 1 and "linear_bits" not in stored


def test_linear_bits_of_an_unknown_module_are_refused(made, tmp_path):
    from dataclasses import replace

    folder = shutil.copytree(made, tmp_path / "copy")
    config = load_packed_config(folder)
    edited = json.loads((folder / "config.json").read_text())
    edited["quantization_config"] = replace(
        config, widths=replace(config.widths, linears={"model.layers.9.q": 8})
    ).to_dict()
    (folder / "config.json").write_text(json.dumps(edited))
    with pytest.raises(gemq.CheckpointError, match=r"a width for 'model\.layers\.9\.q', which is no linear"):
        gemq.from_pretrained(folder)


@pytest.mark.parametrize(("overrides", "message"), [
    (["o_porj=8"], r"'o_porj' matches nothing that is quantized; there are, for instance, model\.layers\.0\.self_attn"),
    (["gate=8"], "'gate' matches nothing"),
    (["o_proj=8", r"layers\.0=4"], r"'o_proj' gives model\.layers\.0\.self_attn\.o_proj 8 bits and 'layers"),
    (["o_proj=9"], "must get 0..8 bits, or 16, got 9"),
    (["o_proj=0"], r"gives model\.layers\.0\.self_attn\.o_proj 0 bits; only routed experts can have none"),
    ([r"experts\.0=16"], "16 bits; a routed expert has 0..8"),
    (["o_proj"], "--tensor-bits must be like 'o_proj=8', got 'o_proj'"),
    (["o_proj=many"], "--tensor-bits must be like"),
    (["(=8"], r"'\(' is no regular expression"),
    (["=8"], "the pattern must not be empty"),
])
def test_bad_overrides(gemq_run, model_folder, tmp_path, overrides, message):
    options = [word for text in overrides for word in ("--tensor-bits", text)]
    code, out, err = gemq_run("quantize", model_folder, "-o", tmp_path / "out", "--dry-run", *options)
    assert (code, out) == (2, "") and re.search(message, err), err


# previews


def test_a_preview_with_costs_is_the_checkpoint_to_the_byte(gemq_run, made, model_folder, tmp_path):
    options = ["--bits", "2.25", "--costs", made, "--tensor-bits", "o_proj=8", "--tensor-bits", "q_proj=16"]
    preview = ["quantize", model_folder, "-o", tmp_path / "out", "--dry-run", "--format", "jsonl", *options]
    code, out, _ = gemq_run(*preview)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and not list(tmp_path.iterdir())
    arguments = ["--calibration", made.parent / "none.txt"]
    assert gemq_run("quantize", model_folder, "-o", tmp_path / "out", *options, *arguments)[0] == 2
    folder = tmp_path / "real"
    code, *_ = gemq_run("quantize", model_folder, "-o", folder, *options, "--calibration", _text(made), "--samples",
                        "6", "--length", "24")
    assert code == 0
    assert sum(r["after"] for r in rows) == summarize(folder).tensor_bytes
    widths = {r["tensor"]: r["widths"] for r in rows if r["widths"]}
    config = load_packed_config(folder)
    for layer in range(2):
        experts = [widths[f"model.layers.{layer}.mlp.experts.{name}"] for name in PROJECTIONS]
        assert tuple(experts) == config.widths.of_experts(layer)
    assert config.widths.down != config.widths.experts
    # nothing was measured anew
    assert "measure" not in json.loads((folder / "gemq_run.json").read_text())["seconds"]
    assert (folder / "gemq_costs.json").read_text() == (made / "gemq_costs.json").read_text()


def _text(made):
    return json.loads((made / "gemq_report.json").read_text())["options"]["calibration"]


def test_a_preview_without_costs_says_so_and_writes_nothing(gemq_run, model_folder, tmp_path):
    code, out, err = gemq_run("quantize", model_folder, "-o", tmp_path / "out", "--dry-run", "--bits", "2.5,2",
                              "--calibration", "no-such-file.txt")
    assert code == 0 and not list(tmp_path.iterdir())
    assert "at 2.5 bits per expert" in out and "at 2 bits per expert" in out and out.count("nothing was written") == 2
    assert "their widths follow from costs" in " ".join(err.split())


def test_a_preview_of_uniform_widths_is_exact(gemq_run, model_folder, quick, tmp_path):
    options = ["--method", "uniform", "--bits", "3"]
    _, out, _ = gemq_run("quantize", model_folder, "-o", tmp_path / "out", "--dry-run", "--format", "json", *options)
    assert gemq_run("quantize", model_folder, "-o", tmp_path / "out", *options, *quick, "--no-tune-routers")[0] == 0
    assert sum(r["after"] for r in json.loads(out)) == summarize(tmp_path / "out").tensor_bytes


@pytest.mark.parametrize(("options", "message"), [
    (["--bits", "0.9"], r"the budget must be in"),
    (["--costs", "nowhere"], "no costs in nowhere"),
    (["--costs", "{made}", "--candidates", "1,2,4"], "costs have no width 4"),
    (["--costs", "{made}", "--method", "pmq"], "costs are for method gemq, got 'pmq'"),
])
def test_previews_refuse_what_quantizing_would(gemq_run, made, model_folder, tmp_path, options, message):
    options = [str(made) if o == "{made}" else o for o in options]
    code, out, err = gemq_run("quantize", model_folder, "-o", tmp_path / "out", "--dry-run", *options)
    assert (code, out) == (2, "") and re.search(message, err), err


def test_costs_of_another_model_are_refused(made):
    from tiny_models import tiny_model

    from gemq.algorithms.method import MethodConfig
    from gemq.algorithms.saved_costs import saved_statistics
    from gemq.models import describe
    from gemq.pipeline import load_costs

    with pytest.raises(ValueError, match=r"costs are of another model: experts a layer 4, the model has 6"):
        saved_statistics(load_costs(made), describe(tiny_model("mixtral", experts=6)), MethodConfig())
    found = saved_statistics(load_costs(made), describe(tiny_model("mixtral")), MethodConfig(candidates=(1, 3)))
    assert found.costs.candidates == (1, 3) and found.costs.routed.shape == (2, 4, 2)


# what a run says


def test_a_line_per_layer_and_its_log(gemq_run, made, model_folder, quick, tmp_path):
    log = tmp_path / "log.jsonl"
    options = ["--bits", "2.5,2", *quick, "--log", log]
    code, _, err = gemq_run("quantize", model_folder, "-o", tmp_path / "o", *options)
    assert code == 0
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines = [line for line in lines if line.get("event") == "layer"]
    assert [(r["budget"], r["layer"]) for r in lines] == [(2.5, 0), (2.5, 1), (2.0, 0), (2.0, 1)]
    for r in lines:
        assert f"budget {r['budget']:g}, layer {r['layer']}: {r['bits']:.2f} bits, at least {r['tokens']}" in err
    report = json.loads((tmp_path / "o" / "2" / "gemq_report.json").read_text())
    tokens = [r["tokens"] for name, r in report["matrices"].items() if "layers.0.mlp.experts" in name]
    assert lines[2]["tokens"] == min(tokens)
    kept = json.loads((tmp_path / "o" / "2" / "gemq_run.json").read_text())
    assert kept["peak_bytes"]["ram"] > 1e8 and set(kept["seconds"]) >= {"measure", "quantize"}
    assert re.search(r"peak memory: .* RAM", err)
    model = load_unquantized(str(model_folder))
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    lines = [json.loads(line) for line in (made.parent / "log.jsonl").read_text().splitlines()]
    assert [r["error"] > 0 for r in lines if r.get("event") == "layer"] == [True, True]


def test_experts_that_saw_few_tokens_are_named(gemq_run, model_folder, text_file, tmp_path):
    few = ["--calibration", text_file, "--samples", "1", "--length", "16", "--bits", "2", "--no-tune-routers"]
    code, out, err = gemq_run("quantize", model_folder, "-o", tmp_path / "out", *few, "-q")
    assert code == 0 and "warning" not in out
    # 16 tokens cannot fill the 64 columns of any of the 8 experts, and -q does not hide that
    line = next(line for line in err.splitlines() if line.startswith("warning: "))
    assert "8 experts saw fewer calibration tokens than they have inputs: model.layers." in line
    assert "done in" not in err and "peak memory" not in err


def test_colour_follows_the_flag_the_variable_and_the_terminal(gemq_run, made, monkeypatch):
    coloured = re.compile(r"\x1b\[(\d+;)*[39][0-8]")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert "\x1b" not in gemq_run("inspect", made)[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert coloured.search(gemq_run("inspect", made)[1])
    assert not coloured.search(gemq_run("inspect", made, "--no-color")[1])
    monkeypatch.setenv("NO_COLOR", "1")
    assert not coloured.search(gemq_run("inspect", made)[1])


# formats


def test_formats_of_a_table(gemq_run, made):
    _, table, _ = gemq_run("allocate", made, "--bits", "2.5,2")
    _, md, _ = gemq_run("allocate", made, "--bits", "2.5,2", "--format", "md")
    _, text, _ = gemq_run("allocate", made, "--bits", "2.5,2", "--format", "json")
    _, lines, _ = gemq_run("allocate", made, "--bits", "2.5,2", "--format", "jsonl")
    _, sheet, _ = gemq_run("allocate", made, "--bits", "2.5,2", "--format", "csv")
    records = json.loads(text)
    same = [{k: v for k, v in r.items() if k != "seconds"} for r in records]
    assert [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines.splitlines()] == same
    rows = list(csv.DictReader(io.StringIO(sheet)))
    assert [float(r["bits_per_expert"]) for r in rows] == [r["bits_per_expert"] for r in records]
    head, rule, first, *_ = md.splitlines()
    assert head.startswith("| budget | bits/expert |") and rule == "|---|---:|---:|---:|---:|---:|"
    assert first.startswith("| 2.5 | 2.500 |") and len(md.splitlines()) == 4
    assert "bits per layer and expert" in table
    assert gemq_run("allocate", made, "--format", "xml")[0] == 2


def test_inspect_and_verify_for_programs(gemq_run, made):
    found = json.loads(gemq_run("inspect", made, "--format", "json")[1])
    summary = summarize(made)
    assert found["bits_per_expert"] == summary.expert_bits and found["tensor_bytes"] == summary.tensor_bytes
    assert found["linear_bits"]["model.layers.0.self_attn.o_proj"] == 8
    rows = list(csv.DictReader(io.StringIO(gemq_run("inspect", made, "--format", "csv")[1])))
    assert sum(int(r["bytes"]) for r in rows[:-2]) == int(rows[-2]["bytes"]) == summary.tensor_bytes
    assert json.loads(gemq_run("verify", made, "--format", "jsonl")[1])["files"] > 4
    assert "o_proj: 8 bits" in gemq_run("inspect", made)[1]


def test_bench_reports_percentiles(gemq_run, tmp_path):
    from tiny_models import tiny_model

    tiny_model("mixtral").config.save_pretrained(tmp_path)
    options = ["--model-config", tmp_path / "config.json", "--bits", "2", "--random-weights", "--tokens", "8",
               "--prompt-length", "8", "--profile-steps", "0", "--prompt-repeats", "4"]
    code, out, _ = gemq_run("bench", *options, "--format", "json")
    found = json.loads(out)["runs"]["gemq"]
    assert code == 0 and set(found["first_token"]) == set(found["step_seconds"]) == {"p50", "p20", "p80", "p95", "p99"}
    for times in (found["first_token"], found["step_seconds"]):
        assert 0 < times["p20"] <= times["p50"] <= times["p80"] <= times["p95"] <= times["p99"]
    assert found["first_token_seconds"] == found["first_token"]["p50"]
    md = gemq_run("bench", *options, "--format", "md")[1]
    assert "tokens/s (p20 to p80)" in md and re.search(r"\| [\d.]+ \([\d.]+ to [\d.]+\) \|", md)
    row = next(csv.DictReader(io.StringIO(gemq_run("bench", *options, "--format", "csv")[1])))
    assert float(row["first_token_ms.p95"]) > 0 and "rate" not in row


def test_options_are_kebab_case_and_every_command_has_an_example():
    for name, command in commands().items():
        assert re.search(rf"gemq {name}\b", command.help or ""), f"{name} has no example"
        for parameter in offered(command):
            assert not any("_" in option for option in parameter.opts), parameter.opts
            assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help"


def test_completion_is_offered_and_answers(gemq_run, monkeypatch, capsys):
    assert "--install-completion" in gemq_run("--help")[1]
    for name, value in {"_GEMQ_COMPLETE": "complete_bash", "COMP_WORDS": "gemq qu", "COMP_CWORD": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        run([])
    assert (stopped.value.code, capsys.readouterr().out.split()) == (0, ["quantize"])


def test_code_of_strangers_is_not_run_unless_asked():
    for command in commands().values():
        for parameter in command.params:
            if "trust_remote_code" in parameter.name:
                assert parameter.default is False
    assert gemq.QuantizeConfig("m", "o").trust_remote_code is False


# help in panels


def test_help_shows_a_dozen_options_and_all_of_them_if_asked(gemq_run):
    command = typer.main.get_command(app).commands["quantize"]
    named = {p.name for p in command.params if p.name not in ("model", "help")}
    assert {name for names in PANELS.values() for name in names} <= named
    code, short, _ = gemq_run("quantize", "--help")
    assert code == 0 and len(short.splitlines()) < 60 and "--help-all shows" in short
    shown = set(re.findall(r"--[a-z][a-z-]+", short))
    assert {"--output", "--bits", "--recipe", "--calibration", "--samples", "--length", "--seed", "--device",
            "--overwrite", "--resume", "--dry-run", "--config"} <= shown and "--damping" not in shown
    for flags in (["quantize", "--help-all"], ["quantize", "--bits", "2", "--help-all"]):
        code, whole, _ = gemq_run(*flags)
        assert code == 0 and all(panel in whole for panel in PANELS)
        for parameter in offered(command):
            assert any(option in whole for option in parameter.opts) or parameter.name == "model", parameter.name
    # the next one is short again, and hidden options are options
    assert gemq_run("quantize", "--help")[1] == short
    assert gemq_run("quantize", "m", "-o", "o", "--damping", "x")[0] == 2
