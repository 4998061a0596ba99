"""Output to a terminal, a spreadsheet or a page of Markdown is text that nothing executes; also settings files."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil

import pytest
from packed_models import written_by_the_command
from rich.progress import Progress

from gemq.algorithms.tensor_bits import TensorBits
from gemq.cli import display
from gemq.cli.formats import Column, Format, csv_cell, emit, markdown, markdown_cell
from gemq.distributed import launched
from gemq.errors import DistributedError
from gemq.evaluations import score_of
from gemq.integrity import MANIFEST_FILE

# colours, the cursor, a window's title, a bell, the other set of controls, reversed writing, a line end, a surrogate
EVIL = "\x1b[31mred\x1b[2J\x1b]0;title\x07\x9b2J\u202ereversed\r\nline\ud800[bold]x[/bold]:apple:"
OBEYED = ("\x1b", "\x07", "\x9b", "\u202e", "\r", "\ud800")


@pytest.fixture(scope="module")
def made(model_folder, quick, tmp_path_factory):
    """A packed checkpoint of the tiny model."""
    return written_by_the_command(model_folder, quick, tmp_path_factory.mktemp("made") / "tiny")


def harmless(text: str) -> str:
    assert not any(character in text for character in OBEYED), ascii(text)
    return text


@pytest.mark.parametrize("form", list(Format))
def test_tables_of_every_form_hold_no_codes(capsys, form):
    emit(EVIL, (Column("a", "a"), Column("b", "b")), [{"a": EVIL, "b": [EVIL], "c" + EVIL: {EVIL: EVIL}}], form)
    found = capsys.readouterr().out
    assert "red" in harmless(found)
    if form is Format.table:
        assert "[bold]x[/bold]:apple:" in found.replace("\n", "").replace(" ", "").replace("│", "")


@pytest.mark.parametrize("console", [display.output, display.errors, display.notes])
def test_lines_hold_no_codes_and_no_markup(capsys, console):
    display.configure()
    console().print(f"a {EVIL}", soft_wrap=True, highlight=False)
    captured = capsys.readouterr()
    assert "[bold]x[/bold]:apple:" in harmless(captured.out + captured.err)


def test_bars_hold_no_codes_and_no_markup():
    file = io.StringIO()
    with Progress(console=display.notes()) as bars:
        display.Stages(bars)(EVIL, 0, 2)
        (task,) = bars.tasks
        file.write(task.description)
    assert "[bold]" in harmless(file.getvalue())


def test_names_of_folders_are_shown_as_text(made, gemq_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(made, tmp_path / "x\x1b[31m[red]\u202e\ny")
    forms = (["verify", "--format", form] for form in ("md", "csv"))
    for command in (["verify"], ["inspect"], *forms, ["report"], ["eval"]):
        code, out, err = gemq_run(command[0], folder, *command[1:])
        harmless(out + err)
        assert code in (0, 2)
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    manifest["files"]["a\x1b]0;x\x07.json"] = {"sha256": "0" * 64, "bytes": 1}
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    code, out, err = gemq_run("verify", folder)
    assert code == 2 and r"a\x1b]0;x\x07.json is missing" in harmless(err)


@pytest.mark.parametrize("value, shown", [
    ("=1+1", "'=1+1"), ("+cmd|x", "'+cmd|x"), ("-2+3", "'-2+3"), ("@SUM(A1)", "'@SUM(A1)"), ("\tx", "'\tx"),
    ("\rx", r"\rx"), ("-1.5", "-1.5"), ("+3e-4", "+3e-4"), ("-", "'-"), ("--1", "'--1"), ("-1\n=2", "'-1\n=2"),
    ("name", "name"), ("a=b", "a=b"), (-1.5, -1.5), (None, None), (3, 3), ("", ""), ("-.5", "-.5"), ("1e5", "1e5"),
])
def test_cells_that_start_a_formula(value, shown):
    assert csv_cell(value) == shown


def test_csv_is_read_back_by_its_columns(capsys):
    emit("", (), [{"=name": "=1", "b": -2}, {"b": "-2", "c": '"'}], Format.csv)
    rows = list(csv.reader(io.StringIO(capsys.readouterr().out)))
    assert rows == [["'=name", "b", "c"], ["'=1", "-2", ""], ["", "-2", '"']]


def test_cells_of_markdown():
    assert markdown_cell(r"a|b\|c") == r"a\|b\\\|c"
    assert markdown_cell("<script>&[x](y)`z`") == r"&lt;script>&amp;\[x\](y)\`z\`"
    table = markdown(["a", "b"], [["x|y\nz", "1"]]).splitlines()
    assert table == ["| a | b |", "|---|---:|", r"| x\|y z | 1 |"]


# settings files

# nine lists, each of nine times the one before
LAUGHS = "a: &a [l]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text, message", [
    ("a: &a [x, x]\nb: *a\n", "aliases like \\*a are not read"),
    (LAUGHS, "aliases"),
    ("<<: {samples: 3}\n", "is not YAML"), ("samples: 8\nsamples: 9\n", "comes twice"),
    ("? [a, b]\n: 3\n", "is no key"), ("? {a: b}\n: 3\n", "is no key"), ("samples: 2024-02-30\n", "is not YAML"),
    ("samples: 2024-02-03\n", "must be a text, a number"), ("samples: {a: {b: 1}}\n", "must be a text, a number"),
    ("samples: [1, [2]]\n", "must be a text, a number"), ("samples: !!binary aGk=\n", "must be a text, a number"),
    (f"samples: 1{'0' * 5000}\n", "is not YAML"), (f"samples: 0x1{'0' * 5000}\n", "must be a text, a number"),
    (f"samples: 1{'0' * 30}\n", "must be a text, a number"), ("samples: !!python/object:os.system x\n", "is not YAML"),
    ("[" * 3000, "nested too deeply|is not YAML"), ("{a: " * 3000, "nested too deeply|is not YAML"),
    ("- samples\n", "must hold keys and values"), ("3\n", "must hold keys and values"), ("\x00", "is not YAML"),
    ("x: " + "y" * (1 << 20), "more than 1048576 bytes"), (f"{'k' * 900}: 1\n", "unknown key"),
    ("? null\n: 3\n", "unknown key None"), ("1: 3\n", "unknown key 1"), ("true: 3\n", "unknown key True"),
    ("tune-routers: 1\n", "must be true or false"), ("tune-routers: 'yes'\n", "must be true or false"),
    ("samples: true\n", "must be a text, a number"), ("samples: x\n", "samples"), ("clip: zz\n", "clip"),
    ("calibration: \"a\\0b\"\n", "must be a text, a number"), ("config: x.yaml\n", "unknown key 'config'"),
    ("tensor-bits: {o_proj: [1]}\n", "must be a text, a number"), ("seed: .nan\n", "seed"),
    ("length: .inf\n", "length"),
], ids=lambda value: value[:20])  # fmt: skip
def test_settings_files_that_are_none(tmp_path, gemq_run, model_folder, text, message):
    file = tmp_path / "s.yaml"
    file.write_text(text)
    code, _, err = gemq_run("quantize", model_folder, "-o", tmp_path / "o", "--config", file)
    assert code == 2 and re.search(message, err) and len(err) < 3000 and "internal error" not in err, err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("content", [b"\xff\xfes\x00", b"\x80"])
def test_settings_files_in_another_encoding(tmp_path, gemq_run, model_folder, content):
    (tmp_path / "s.yaml").write_bytes(content)
    code, _, err = gemq_run("quantize", model_folder, "-o", tmp_path / "o", "--config", tmp_path / "s.yaml")
    assert code == 2 and "is not YAML" in err


def test_many_keys_take_no_time(tmp_path, gemq_run, model_folder):
    (tmp_path / "s.yaml").write_text("".join(f"k{i}: 1\n" for i in range(60_000)))
    assert gemq_run("quantize", model_folder, "-o", tmp_path / "o", "--config", tmp_path / "s.yaml")[0] == 2


# patterns


@pytest.mark.parametrize("pattern, message", [
    (r"^(?:(.|..)+)+(?<!\w)$", "takes more than 5 s"), (r"^(([a-z._0-9])+.)+[A-Z]([a-z])+$", "matches nothing"),
    (r"(?:a{1000}){1000}", "repeats more than 10000 times"),
    (r"(?:(?:(?:x{500}){500}){500}){500}", "repeats more than"),
    (r"x{1,99999999999999999999}", "repeats more than"), ("x" * 1001, "at most 1000 characters"),
    ("(" * 400 + ")" * 400, "no regular expression|matches nothing"), ("[[", "no regular expression"),
])
def test_patterns_that_take_for_ever(model_folder, gemq_run, tmp_path, quick, pattern, message):
    command = ["quantize", model_folder, "-o", tmp_path / "o", *quick, "--tensor-bits", f"{pattern}=4", "--dry-run"]
    code, _, err = gemq_run(*command)
    assert code == 2 and re.search(message, err)


def test_a_pattern_is_given_up(monkeypatch):
    from gemq.algorithms import tensor_bits

    monkeypatch.setattr(tensor_bits, "_PATIENCE", 0.2)
    search = tensor_bits._Search(TensorBits(r"^(?:(.|..)+)+(?<!\w)$", 4))
    with pytest.raises(ValueError, match=r"takes more than 0\.2 s to search the model's paths"):
        search.finds("model.layers.0.self_attn.o_proj")


@pytest.mark.parametrize("command", [
    ["--tensor-bits", "x=²"], ["--tensor-bits", "x=" + "1" * 5000], ["--router-lr", "nan"], ["--router-lr", "-1"],
    ["--router-lr", "inf"], ["--router-epochs", "1" + "0" * 30], ["--router-batch", "1" + "0" * 30],
], ids=lambda command: f"{command[0]} {command[1][:6]}")
def test_numbers_that_are_none(gemq_run, model_folder, tmp_path, quick, command):
    """Before work, with a name."""
    code, _, err = gemq_run("quantize", model_folder, "-o", tmp_path / "o", *quick, *command, "--dry-run")
    assert code == 2 and ("must be in" in err or "must be like 'o_proj=8'" in err) and "internal" not in err


# what a launcher and files say


@pytest.mark.parametrize("variables", [
    {"WORLD_SIZE": "two"}, {"WORLD_SIZE": "0"}, {"WORLD_SIZE": "-1"}, {"WORLD_SIZE": "2", "RANK": "x"},
    {"WORLD_SIZE": "2", "RANK": "2"}, {"WORLD_SIZE": "1.5"}, {"WORLD_SIZE": "9" * 40},
    {"WORLD_SIZE": "2", "RANK": "-1"},
])
def test_a_launcher_that_says_nonsense(monkeypatch, gemq_run, model_folder, tmp_path, quick, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DistributedError, match=r"environment variable (WORLD_SIZE|RANK) must be"):
        launched()
    code, _, err = gemq_run("quantize", model_folder, "-o", tmp_path / "o", *quick)
    assert code == 2 and "environment variable" in err and len(err.splitlines()) == 1


def test_variables_of_another_launcher_are_none_of_ours(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert launched().size == 1 and launched().rank == 0


HUGE = int("9" * 400)
SCORE = {"data": "x", "length": 8, "tokens": 9, "perplexity": 2.0}


@pytest.mark.parametrize("name, content, field", [
    ("gemq_report.json", {"parameters": "many"}, "parameters"),
    ("gemq_report.json", {"parameters": HUGE}, "parameters"),
    ("gemq_report.json", {"options": [1]}, "options"), ("gemq_report.json", {"matrices": [1]}, "matrices"),
    ("gemq_report.json", {"matrices": {"a.experts.0": {}}}, "matrices"),
    ("gemq_report.json", {"matrices": {"a.layers.0.experts.0": {"error": 1, "tokens": HUGE}}}, "matrices"),
    ("gemq_report.json", {"matrices": {"a.layers.0.experts.0": {"tokens": 1}}}, "matrices: nothing named 'error'"),
    ("gemq_report.json", {"router_shift": 3}, "router_shift"), ("gemq_report.json", {"objective": []}, "objective"),
    ("gemq_report.json", {"router_shift": {"layers": {"0": None}}}, "router_shift"),
    ("gemq_run.json", {"seconds": {"a": HUGE}}, "seconds"), ("gemq_run.json", {"seconds": 3}, "seconds"),
    ("gemq_evaluations.json", {"version": 1, "evaluations": [SCORE | {"perplexity": HUGE}]}, "perplexity"),
    ("gemq_evaluations.json", {"version": 1, "evaluations": [SCORE | {"length": HUGE}]}, "length"),
    ("gemq_evaluations.json", {"version": 1, "evaluations": [3]}, "a record must be an object"),
    ("gemq_costs.json", {"format": "gemq-costs", "version": "2"}, "version"),
    ("gemq_costs.json", {"format": "gemq-costs", "version": 2, "candidates": 3, "layers": [0], "routed": [[[1]]],
                         "shared": None, "shared_multiple": HUGE, "matrices": None}, "candidates|shared_multiple"),
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_files_beside_a_checkpoint_are_named_with_their_field(made, tmp_path, gemq_run, name, content, field):
    folder = shutil.copytree(made, tmp_path / "bad")
    (folder / name).write_text(json.dumps(content))
    code, _, err = gemq_run("report", folder, "-o", tmp_path / "r.html")
    assert code == 2 and name in err and re.search(field, err) and "internal" not in err, err


@pytest.mark.parametrize("change", [{"tokens": True}, {"seconds": True}, {"tokens": 0}, {"perplexity": float("nan")}])
def test_scores_that_are_none(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        score_of(SCORE | change)


@pytest.mark.parametrize("content", [
    {"1" * 5000: [1, 2]}, {"0": [HUGE]}, {"0": [1e400]}, {"expert_bits": {"0": [1]}, "budget": [2]}, [], {}, 3, None,
    {"0": {"0": 1, "00": 2}}, [{"expert_bits": 3}], {"quantization_config": {"expert_bits": []}}, {"0": "123"},
], ids=lambda value: str(value)[:30])
def test_allocations_that_are_none(model_folder, gemq_run, tmp_path, quick, content):
    file = tmp_path / "widths.json"
    file.write_text(json.dumps(content))
    code, _, err = gemq_run("quantize", model_folder, "-o", tmp_path / "o", *quick, "--allocation", file, "--dry-run")
    assert code == 2 and "widths.json" in err and "internal" not in err, err
