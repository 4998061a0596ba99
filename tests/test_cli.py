"""The commands at work, how they look, and as a program."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from cli_results import COMMANDS, a_checkpoint, fails, plain  # noqa: F401
from rich.console import Console
from safetensors.torch import load_file

import gemq
from gemq.checkpoint import load_packed_config
from gemq.cli import display
from gemq.integrity import WEIGHTS_FILE
from gemq.pipeline import load_tokenizer

GEMQ = [sys.executable, "-m", "gemq"]


# what works


def test_quantize_one_budget(gemq_run, model_folder, quick, tmp_path):
    code, out, err = gemq_run("quantize", model_folder, "-o", tmp_path / "out", "--bits", "2", *quick)
    assert code == 0
    words = plain(out)
    assert "quantized" in words and "bits/expert" in words and "2.000" in words
    assert str(tmp_path / "out") in out
    for stage in ("measure", "allocate", "tune routers", "done in"):
        assert stage in err and stage not in out
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"config.json", WEIGHTS_FILE, "gemq_costs.json", "gemq_report.json", "gemq_manifest.json"}
    assert names >= {"tokenizer.json", "tokenizer_config.json"}
    assert os.listdir(tmp_path) == ["out"]
    config = load_packed_config(tmp_path / "out")
    assert (config.budget, config.method, config.widths.attention) == (2.0, "gemq", 4)
    dtypes = {str(t.dtype) for t in load_file(tmp_path / "out" / WEIGHTS_FILE).values()}
    assert dtypes == {"torch.uint8", "torch.float16", "torch.bfloat16"}
    report = json.loads((tmp_path / "out" / "gemq_report.json").read_text())
    assert report["bits_per_expert"] == 2.0 and len(report["router_losses"]) == 6


def test_quantize_several_budgets(gemq_run, model_folder, quick, tmp_path):
    out_folder = tmp_path / "out"
    code, out, _ = gemq_run("quantize", model_folder, "-o", out_folder, "--bits", "2.5,2", "--no-tune-routers", *quick)
    assert code == 0
    assert sorted(os.listdir(out_folder)) == ["2", "2.5"]
    assert "2.500" in out and "2.000" in out
    for name in ("2", "2.5"):
        config = load_packed_config(out_folder / name)
        # a third of a bit is the unit, an expert's gate and up have two
        assert config.budget == float(name) and config.widths.bits_per_expert == pytest.approx(float(name))
        gemq.verify(out_folder / name)


def test_the_papers_variants(gemq_run, model_folder, quick, tmp_path):
    options = {"--constraints": "c2", "--candidates": "1,2,4", "--attention-bits": 3, "--router-bits": 4}
    arguments = [str(v) for pair in options.items() for v in pair]
    assert gemq_run("quantize", model_folder, "-o", tmp_path / "out", *quick, *arguments)[0] == 0
    config = load_packed_config(tmp_path / "out")
    assert (config.widths.attention, config.widths.router) == (3, 4)
    assert all(4 in row and set(row) <= {1, 2, 4} for row in config.widths.experts.values())
    assert "attention 3, dense 4, routers 4" in plain(gemq_run("inspect", tmp_path / "out")[1])


@pytest.mark.parametrize("method", ["uniform", "pmq"])
def test_quantize_by_the_baselines(gemq_run, model_folder, quick, tmp_path, method):
    arguments = ["-o", tmp_path / "out", "--bits", "2.25", "--method", method, "--no-tune-routers"]
    assert gemq_run("quantize", model_folder, *arguments, *quick)[0] == 0
    config = load_packed_config(tmp_path / "out")
    assert config.method == method
    if method == "uniform":
        assert config.widths.experts == {0: [2] * 4, 1: [2] * 4}
    else:
        assert all(sum(bits) == 9 and {2, 3} <= set(bits) <= {1, 2, 3} for bits in config.widths.experts.values())
    assert gemq.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_quantize_needs_overwrite(gemq_run, model_folder, quick, tmp_path):
    arguments = ["quantize", model_folder, "-o", tmp_path / "out", "--bits", "2", "--method", "uniform", *quick]
    assert gemq_run(*arguments)[0] == 0
    fails(gemq_run(*arguments), "is not empty; choose another or pass --overwrite")
    assert gemq_run(*arguments, "--overwrite", "--bits", "3")[0] == 0
    assert load_packed_config(tmp_path / "out").budget == 3.0


def test_allocate(gemq_run, checkpoint):
    code, out, err = gemq_run("allocate", checkpoint, "--bits", "2.5,2")
    assert code == 0 and err == ""
    assert "budget 2.5" in out and "budget 2" in out and "bits per layer and expert" in out
    assert [len(re.findall(rf"\b[123]{{4}}\b.*{mean}", out)) for mean in (r"\d\.\d\d",)] == [4]


def test_allocate_json(gemq_run, checkpoint):
    code, out, err = gemq_run("allocate", checkpoint / "gemq_costs.json", "--bits", "2.5,2", "--json")
    assert code == 0 and err == ""
    records = json.loads(out)
    assert [r["budget"] for r in records] == [2.5, 2.0]
    saved = load_packed_config(checkpoint).widths.experts
    assert {int(k): v for k, v in records[1]["expert_bits"].items()} == saved
    assert records[0]["shared_bits"] is None


def test_allocate_a_curve(gemq_run, checkpoint):
    code, out, err = gemq_run("allocate", checkpoint, "--curve", "5", "--constraints", "c2c3", "--json")
    assert code == 0 and err == ""
    records = json.loads(out)
    # two of four experts at 2 and 3 bits, the others at 1
    assert [r["budget"] for r in records] == pytest.approx([1.75, 2.0625, 2.375, 2.6875, 3.0])
    assert all(a["objective"] >= b["objective"] for a, b in itertools.pairwise(records))
    code, out, _ = gemq_run("allocate", checkpoint, "--curve", "3")
    assert code == 0 and "2.000" in out and "bits per layer and expert" not in out
    fails(gemq_run("allocate", checkpoint, "--curve", "1"), "curve")


@pytest.mark.parametrize("kind", ["packed", "full"])
def test_eval(gemq_run, checkpoint, model_folder, text_file, kind):
    model = checkpoint if kind == "packed" else model_folder
    arguments = ["eval", model, "--data", text_file, "--length", "50", "--limit", "4"]
    code, out, err = gemq_run(*arguments)
    assert code == 0
    assert "perplexity" in out and "perplexity" not in err and "evaluate" in err
    code, out, _ = gemq_run(*arguments, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["tokens"] == 4 * 49 and 1 < found["perplexity"] < 1000
    model = gemq.from_pretrained(checkpoint) if kind == "packed" else str(model_folder)
    tokenizer = load_tokenizer(str(model_folder))
    again = gemq.evaluate(model, str(text_file), length=50, limit=4, tokenizer=tokenizer)
    assert found["perplexity"] == pytest.approx(again.perplexity, rel=1e-5)


def test_generate(gemq_run, checkpoint):
    code, out, err = gemq_run("generate", checkpoint, "it was [for] the", "--max-new-tokens", "5")
    assert code == 0
    assert out.startswith("it was [for] the") and len(out.split()) > 4
    assert re.search(r"5 tokens, .* tokens/s after the first; .* s with the prompt", err)
    options = ["--max-new-tokens", "5", "--temperature", "1.5", "--top-p", "0.9"]
    first, again, other = (gemq_run("generate", checkpoint, "it was", *options, "--seed", s)[1] for s in (1, 1, 2))
    assert first == again != other


def test_generate_takes_several_texts_as_one_batch(gemq_run, checkpoint):
    texts = ["it was the", "on", "the of [it] was"]
    code, out, err = gemq_run("generate", checkpoint, *texts, "--max-new-tokens", "5", "--ignore-eos")
    assert code == 0
    alone = [gemq_run("generate", checkpoint, t, "--max-new-tokens", "5", "--ignore-eos", "-q")[1] for t in texts]
    assert out == "".join(alone) and all(line.startswith(t) for line, t in zip(out.splitlines(), texts, strict=True))
    assert "generation: 15 tokens, " in err
    code, out, err = gemq_run("generate", checkpoint, *["on"] * 65)
    assert code == 2 and out == "" and "64" in err


def test_sampling_is_asked_for_as_in_transformers(gemq_run, checkpoint):
    def text(*options):
        return gemq_run("generate", checkpoint, "it was", "--max-new-tokens", "12", *options)[1]

    assert text("--do-sample") == text("--temperature", "1.0") != text()
    assert text("--no-do-sample", "--temperature", "1.0") == text()
    code, _, err = gemq_run("generate", checkpoint, "it was", "--do-sample", "--temperature", "0")
    assert code == 2 and "temperature must be above 0 with do_sample" in err


def test_inspect(gemq_run, checkpoint):
    code, out, err = gemq_run("inspect", checkpoint)
    assert code == 0 and err == ""
    config = load_packed_config(checkpoint)
    for layer, bits in config.widths.experts.items():
        assert f"{layer} {''.join(map(str, bits))} {sum(bits) / len(bits):.2f}" in plain(out)
    assert "2.000 bits per routed expert, attention 4" in out
    tensors = load_file(checkpoint / WEIGHTS_FILE).values()
    total = sum(t.numel() * t.element_size() for t in tensors)
    assert f"all tensors {display.size(total)} 100%" in plain(out)
    assert f"files {display.size((checkpoint / WEIGHTS_FILE).stat().st_size)}" in plain(out)


def test_verify(gemq_run, checkpoint):
    code, out, err = gemq_run("verify", checkpoint)
    assert (code, err) == (0, "")
    assert out.startswith(f"{checkpoint}: ") and out.endswith("as saved\n") and out.count("\n") == 1


def test_verify_finds_a_flipped_bit(gemq_run, checkpoint, tmp_path):
    import shutil

    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    raw = bytearray((copy / WEIGHTS_FILE).read_bytes())
    raw[-7] ^= 1
    (copy / WEIGHTS_FILE).write_bytes(raw)
    fails(gemq_run("verify", copy), r"model\.safetensors differs from its SHA-256")


def test_help_lists_all(gemq_run):
    code, out, err = gemq_run("--help")
    assert code == 0 and err == ""
    for command in COMMANDS:
        assert re.search(rf"\b{command}\b", out)
    for command in COMMANDS:
        code, out, _ = gemq_run(command, "--help")
        assert code == 0 and f"gemq {command}" in out


def test_version(gemq_run):
    assert gemq_run("--version") == (0, f"gemq {gemq.__version__}\n", "")


# how it looks


def test_square_brackets_are_not_markup(gemq_run, checkpoint, text_file, tmp_path):
    import shutil

    folder = shutil.copytree(checkpoint, tmp_path / "a[red]b[/]")
    data = shutil.copy(text_file, tmp_path / "t[bold].txt")
    code, out, _ = gemq_run("eval", folder, "--data", data, "--length", 50, "--limit", 1)
    assert code == 0
    joined = "".join(out.split()).replace("│", "")
    assert "a[red]b[/]" in joined and "t[bold].txt" in joined
    assert "a[red]b[/]: " in gemq_run("verify", folder)[1]
    assert gemq_run("inspect", folder)[0] == 0
    fails(gemq_run("inspect", tmp_path / "no[/]where[red]"), r"no\[/\]where\[red\]")


@pytest.fixture
def terminal(monkeypatch):
    """Consoles made anew, as on a colour terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    for console in (display.output, display.errors, display.notes):
        console.cache_clear()
    yield
    for console in (display.output, display.errors, display.notes):
        console.cache_clear()


COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|9[0-7]|38;5)[0-9;]*m")


def test_colour_on_a_terminal(gemq_run, terminal, checkpoint, tmp_path):
    assert COLOUR.search(gemq_run("inspect", checkpoint)[1])
    assert COLOUR.search(gemq_run("inspect", tmp_path)[2])


def test_no_color(gemq_run, terminal, monkeypatch, checkpoint, tmp_path):
    monkeypatch.setenv("NO_COLOR", "1")
    assert not COLOUR.search(gemq_run("inspect", checkpoint)[1])
    assert not COLOUR.search(gemq_run("inspect", tmp_path)[2])


def test_progress_shows_the_time_left(monkeypatch):
    screen, clock = io.StringIO(), itertools.count(0.0, 0.5)
    console = Console(file=screen, force_terminal=True, width=110, get_time=lambda: next(clock))
    monkeypatch.setattr(display, "notes", lambda: console)
    with display.stages() as report:
        for done in range(6):
            report("measure experts", done, 8)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    last = [line for line in re.split(r"[\r\n]", shown) if "measure experts" in line][-1]
    assert re.search(r"measure experts .* 5/8 0:00:\d\d left 0:00:\d\d", last), last


# as a program


def test_exit_codes_of_the_program(checkpoint, tmp_path):
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*GEMQ, "verify", str(checkpoint)], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "as saved" in done.stdout
    done = subprocess.run([*GEMQ, "--debug", "inspect", str(tmp_path)], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" in done.stderr and "error: " in done.stderr.splitlines()[-1]
    done = subprocess.run([*GEMQ, "eval", str(tmp_path / "x")], capture_output=True, text=True, env=environment)
    fails((done.returncode, done.stdout, done.stderr), "x")


def test_a_closed_pipe_is_quiet(checkpoint):
    process = subprocess.Popen([*GEMQ, "inspect", str(checkpoint)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0
