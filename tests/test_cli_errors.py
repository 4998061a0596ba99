"""Refusals of the commands: one line on standard error and the right exit code."""

from __future__ import annotations

import os

import pytest
import torch
from cli_results import COMMANDS, a_checkpoint, fails  # noqa: F401


def test_missing_arguments(gemq_run):
    fails(gemq_run("quantize"), "give a MODEL and --output, or --resume")
    fails(gemq_run("nonsense"), "No such command 'nonsense'")
    code, out, err = gemq_run()
    assert (code, err) == (2, "")
    assert all(command in out for command in COMMANDS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--bits": "2.5,0.9"}, r"budget must be in 1\.\.3 bits per expert .*, got 0\.9"),
        ({"--bits": "two"}, "--bits must be numbers separated by commas, got 'two'"),
        ({"--bits": "2,2"}, "--bits names a budget twice"),
        ({"--bits": ""}, "--bits must be numbers"),
        ({"--bits": "nan"}, "budgets must be bits per expert in 0..8"),
        ({"--bits": "-1"}, "budgets must be bits per expert in 0..8"),
        ({"--bits": "9"}, "budgets must be bits per expert in 0..8"),
        ({"--bits": "0.9"}, r"budget must be in 1\.\.3 bits per expert"),
        ({"--candidates": "1,x"}, "--candidates must be whole numbers"),
        ({"--candidates": "1,9"}, r"--candidates must be in 0\.\.8"),
        ({"--attention-bits": "12"}, "attention_bits must be 1..8, or 16"),
        ({"--router-bits": "12"}, "router_bits must be 1..8, or 16"),
        ({"--shared-bits": "few"}, "--shared-bits must be auto or a width"),
        ({"--group-size": "48"}, "group_size must be one of"),
        ({"--method": "magic"}, "magic.*gemq.*pmq.*uniform"),
        ({"--estimate": "guess"}, "'--estimate': 'guess' is not one of 'fp', 'quantized', 'tuned'"),
        ({"--constraints": "all"}, "'--constraints': 'all' is not one of 'none', 'c2', 'c3', 'c2c3'"),
        ({"--samples": "0"}, "samples"),
        ({"--length": "many"}, "length"),
        ({"--dtype": "float8"}, "'--dtype': 'float8' is not one of 'auto', 'float32', 'bfloat16', 'float16'"),
        ({"--device": "abacus"}, "device must be like cpu, cuda or cuda:1, got 'abacus'"),
        ({"--calibration": "empty.txt"}, r"the text source '\S*empty\.txt' is empty"),
        ({"--calibration": "short.txt"}, "has 3 tokens, but 24 are needed"),
        ({"--calibration": "nowhere.txt"}, "no text file"),
        ({"--router-text": "nowhere.txt"}, "no text file"),
        ({"--output": "used"}, "is not empty; choose another or pass --overwrite"),
        ({"--output": "short.txt"}, "exists and is not a folder"),
        ({"--nonsense": "1"}, "No such option.*--nonsense"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_quantize_refuses(gemq_run, model_folder, quick, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("the of and")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("")
    before = sorted(os.listdir(tmp_path))
    options = {"--output": "out", "--bits": "2"} | dict(zip(quick[::2], quick[1::2], strict=True)) | changes
    # all of them before any work: nothing on standard error but the error
    fails(gemq_run("quantize", model_folder, *[f"{k}={v}" for k, v in options.items()]), message)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_no_cuda_device(gemq_run, model_folder, checkpoint, quick, text_file, tmp_path):
    message = "device 'cuda' was asked for, but no CUDA device is available"
    fails(gemq_run("quantize", model_folder, "-o", tmp_path / "o", "--device", "cuda", *quick), message)
    fails(gemq_run("eval", checkpoint, "--data", text_file, "--length", 20, "--device", "cuda"), message)
    fails(gemq_run("generate", checkpoint, "it was", "--device", "cuda"), message)


def test_no_such_model(gemq_run, quick, tmp_path, text_file):
    fails(gemq_run("quantize", tmp_path / "nowhere", "-o", tmp_path / "o", *quick), "no model in '.*nowhere'")
    fails(gemq_run("eval", tmp_path / "nowhere", "--data", text_file), "nowhere")
    fails(gemq_run("generate", tmp_path / "nowhere", "it was"), "nowhere")
    fails(gemq_run("inspect", tmp_path / "nowhere"), "there is no folder .*nowhere")
    fails(gemq_run("verify", tmp_path / "nowhere"), "there is no folder .*nowhere")
    fails(gemq_run("allocate", tmp_path / "nowhere"), "nowhere")


def test_unsupported_and_quantized_models(gemq_run, checkpoint, quick, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=32).save_pretrained(tmp_path / "llama")
    message = "model type 'llama' is not supported yet; supported: afmoe, aria_text"
    fails(gemq_run("quantize", tmp_path / "llama", "-o", tmp_path / "o", *quick), message)
    fails(gemq_run("quantize", checkpoint, "-o", tmp_path / "o", *quick), "is quantized already")


def test_output_is_the_model(gemq_run, model_folder, quick):
    fails(gemq_run("quantize", model_folder, "-o", model_folder, "--overwrite", *quick), "is the model itself")


def test_infeasible_budgets_name_the_range(gemq_run, checkpoint):
    for bits in ("0.9", "3.5"):
        message = rf"budget must be in 1\.\.3 bits per expert.*{bits}"
        fails(gemq_run("allocate", checkpoint, "--bits", bits), message)
    for bits in ("nan", "inf"):
        fails(gemq_run("allocate", checkpoint, "--bits", bits), "budget")


def test_eval_and_generate_refuse(gemq_run, checkpoint, text_file, tmp_path):
    (tmp_path / "short.txt").write_text("the of and")
    fails(gemq_run("eval", checkpoint, "--data", tmp_path / "short.txt"), "has 3 tokens, but 2048 are needed")
    fails(gemq_run("generate", checkpoint, ""), "prompt must not be empty")
    fails(gemq_run("generate", checkpoint, "it", "--top-p", "0"), r"top_p must be in \(0, 1\], got 0")
    fails(gemq_run("inspect", tmp_path), r"is not a complete checkpoint: it has no config\.json")
    fails(gemq_run("eval", tmp_path, "--data", text_file), "no config.json|no tokenizer")


def test_damaged_costs(gemq_run, tmp_path):
    for text in ("", "{}", "[]", "{"):
        (tmp_path / "gemq_costs.json").write_text(text)
        fails(gemq_run("allocate", tmp_path), "gemq_costs.json|costs")


def test_debug_shows_the_traceback(gemq_run, tmp_path):
    code, out, err = gemq_run("inspect", tmp_path / "nowhere", debug=True)
    assert (code, out) == (2, "")
    assert "Traceback (most recent call last)" in err
    assert err.splitlines()[-1].startswith("error: there is no folder")


def test_internal_errors_are_one_line_too(gemq_run, monkeypatch, tmp_path):
    def fail(path):
        raise RuntimeError("a [bold]bug[/bold]\nof many lines")

    monkeypatch.setattr("gemq.checkpoint_summary.summarize", fail)
    message = r"internal error, RuntimeError: a \[bold\]bug\[/bold\] of many lines \(--debug shows more\)"
    fails(gemq_run("inspect", tmp_path), message, code=1)


@pytest.mark.parametrize("when", ["before", "in a stage"])
def test_ctrl_c(gemq_run, monkeypatch, tmp_path, when):
    def interrupted(config, report, on_layer):
        if when == "in a stage":
            report("measure", 1, 4)
        raise KeyboardInterrupt

    monkeypatch.setattr("gemq.pipeline.quantize", interrupted)
    code, out, err = gemq_run("quantize", "model", "-o", tmp_path / "out")
    assert (code, out) == (130, "")
    assert err.rstrip().splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in err
