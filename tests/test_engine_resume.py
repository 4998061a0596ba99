"""A run that was ended, changed, harmed or crowded: it continues to the same bytes, or says what is wrong."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from engine_kills import tree
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from test_engine_files import FAST

import gemq
from gemq.cli import display
from gemq.cli.run import run as command_line
from gemq.engine.journal import opened
from gemq.errors import CheckpointError
from gemq.integrity import WEIGHTS_FILE
from gemq.pipeline import QuantizeConfig

HERE = Path(__file__).parent


class Stopped(Exception):
    """Ends a run from its progress callback."""


@contextmanager
def stopping(config: QuantizeConfig, stage: str, done: int):
    """Run until ``done`` steps of ``stage`` are finished."""

    def progress(name: str, at: int, total: int) -> None:
        if name == stage and at == done:
            raise Stopped

    with pytest.raises(Stopped):
        gemq.quantize(config, progress=progress)
    yield Path(config.output + ".run")


@pytest.fixture
def config(tiny_folder, tmp_path, monkeypatch) -> QuantizeConfig:
    """Options of a run in an empty folder, where all outputs have the same name."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return QuantizeConfig(**tiny_folder, output="out", method=FAST)


@pytest.fixture(scope="module")
def expected(tiny_folder, tmp_path_factory) -> dict[str, str]:
    """Digests of the files that an uninterrupted run leaves."""
    folder = tmp_path_factory.mktemp("expected")
    before = os.getcwd()
    os.chdir(folder)
    try:
        gemq.quantize(QuantizeConfig(**tiny_folder, output="out", method=FAST))
    finally:
        os.chdir(before)
    assert os.listdir(folder) == ["out"]
    return tree(folder)


def finished(config: QuantizeConfig, expected: dict[str, str]) -> None:
    """The same call ends with the expected bytes and nothing else."""
    gemq.quantize(config)
    assert tree(Path()) == expected


def test_killed_runs_continue_to_the_same_bytes() -> None:
    """Two budgets, tuned and rounded routers; the long version is `make kills`."""
    command = [sys.executable, str(HERE / "engine_kills.py"), "--events", "2", "--random", "1", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["trials"] == 3 and found["events"] > 300 and not found["failures"]


@pytest.mark.parametrize("stage, done", [("measure", 2), ("measure", 4), ("quantize", 1), ("quantize", 2)])
@pytest.mark.parametrize("keep", ["layer", "activations"])
def test_a_stopped_run_repeats_no_finished_layer(config, expected, stage, done, keep) -> None:
    config = replace(config, keep=keep)
    with stopping(config, stage, done) as work:
        before = {p: p.stat().st_mtime_ns for p in (work / "stages").rglob("*") if p.is_file()}
    assert before if (stage, done) != ("measure", 2) else not before
    gemq.quantize(replace(config, keep_run=True))
    assert {p: p.stat().st_mtime_ns for p in before} == before
    shutil.rmtree(work)
    assert tree(Path()) == expected


@pytest.mark.parametrize("harm", ["scratch", "layer", "costs"])
def test_what_was_harmed_is_made_again(config, expected, harm) -> None:
    with stopping(config, "quantize", 1) as work:
        pattern = {"scratch": "scratch/*/*.bin", "layer": "stages/*/layer-0", "costs": "stages/*/costs-1"}[harm]
        (file,) = work.glob(pattern)
        os.truncate(file, file.stat().st_size - 7)
    finished(config, expected)


def test_changed_options_are_refused_or_redone(config) -> None:
    with stopping(config, "quantize", 2):
        pass
    other = replace(config, method=replace(FAST, attention_bits=3))
    message = r"options.method.attention_bits was 4, is 3\. Give the same, or --changed redo"
    with pytest.raises(CheckpointError, match=message):
        gemq.quantize(other)
    stages = []
    redone = replace(other, changed="redo", log="log.jsonl")
    gemq.quantize(redone, progress=lambda name, done, total: stages.append(name))
    events = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    layers = {(e["stage"], e["layer"]) for e in events if "layer" in e}
    # the coefficients are those of before
    assert layers == {("quantize", 0), ("quantize", 1)}
    shutil.move("out", "redone")
    gemq.quantize(other)
    assert (Path("out") / WEIGHTS_FILE).read_bytes() == (Path("redone") / WEIGHTS_FILE).read_bytes()


def test_the_model_is_known_by_content(config, expected, tmp_path) -> None:
    with stopping(config, "measure", 4):
        pass
    moved = tmp_path / "elsewhere"
    shutil.copytree(config.model, moved)
    tensors = load_file(moved / WEIGHTS_FILE)
    name = next(iter(tensors))
    changed = tensors | {name: tensors[name] + 1}
    save_file(changed, moved / WEIGHTS_FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"model.{re.escape(WEIGHTS_FILE)} was .*, is "):
        gemq.quantize(replace(config, model=str(moved)))
    shutil.copy(Path(config.model) / WEIGHTS_FILE, moved / WEIGHTS_FILE)
    gemq.quantize(replace(config, model=str(moved)))
    assert tree(Path())["out/" + WEIGHTS_FILE] == expected["out/" + WEIGHTS_FILE]


def test_changed_text_is_refused(config, tmp_path) -> None:
    with stopping(config, "measure", 4):
        pass
    other = tmp_path / "other.txt"
    other.write_text(Path(config.calibration).read_text().replace("the", "of"))
    with pytest.raises(CheckpointError, match=r"data.calibration was .* is "):
        gemq.quantize(replace(config, calibration=str(other)))


def test_another_code_is_refused(config, monkeypatch) -> None:
    with stopping(config, "measure", 4):
        pass
    monkeypatch.setattr("gemq.engine.fingerprint.of_code", lambda: {"gemq": "9.9"})
    with pytest.raises(CheckpointError, match=r'code.gemq was .*, is "9.9"'):
        gemq.quantize(config)
    gemq.quantize(replace(config, changed="restart"))


def test_a_full_disk_loses_nothing(config, expected) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (3000, 20_000, 60_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(CheckpointError, match="could not be written: File too large"):
                gemq.quantize(config)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not Path("out").exists()
    finished(config, expected)


def test_a_second_process_is_turned_away(config, expected) -> None:
    with opened(Path("out.run"), {}, changed="restart"), pytest.raises(CheckpointError, match="another process"):
        gemq.quantize(config)
    finished(replace(config, changed="restart"), expected)


def test_a_finished_output_is_found_again(config, expected) -> None:
    """Killed after the rename, before the run directory was deleted."""
    gemq.quantize(replace(config, keep_run=True))
    stamp = (Path("out") / WEIGHTS_FILE).stat().st_mtime_ns
    finished(config, expected)
    assert (Path("out") / WEIGHTS_FILE).stat().st_mtime_ns == stamp


def test_another_output_is_not_taken_for_it(config) -> None:
    gemq.quantize(replace(config, keep_run=True))
    with (Path("out") / WEIGHTS_FILE).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(CheckpointError, match="is not empty"):
        gemq.quantize(config)


# the command line


def call(capsys, *arguments: str) -> tuple[int, str]:
    code = command_line(["quantize", *arguments])
    return code, capsys.readouterr().err


def test_resume_restores_the_options(config, expected, capsys) -> None:
    with stopping(config, "quantize", 1):
        pass
    assert call(capsys, "--resume", "nowhere")[1].startswith("error: nowhere is not a run directory")
    code, message = call(capsys, "--resume", "out.run", "--bits", "3", "--samples", "6", "--clip", "none")
    assert code == 2 and "--bits ([2.0] there, [3.0] here), --clip (mse there, none here)" in message
    code, message = call(capsys, "--resume", "out.run", "--restart")
    assert code == 2 and "nothing to do" in message
    code, message = call(capsys, "--resume", "out.run", "--samples", "6")
    assert code == 0, message
    assert tree(Path()) == expected


def test_the_log_has_a_line_per_layer_and_stage(config) -> None:
    gemq.quantize(replace(config, log="log.jsonl"))
    events = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    for stage in ("measure", "quantize"):
        own = [e for e in events if e["stage"] == stage]
        assert own[0]["event"] == "start" and own[-1]["event"] == "end"
        assert own[-1]["seconds"] > 0 and own[-1]["peak_bytes"] > 2**20
        assert {e["layer"] for e in own if "layer" in e} == {0, 1}
    assert {"read the model", "allocate", "router-shift", "save"} <= {e["stage"] for e in events}
    assert all(e["seconds"] >= 0 and e["peak_bytes"] > 2**20 for e in events if e.get("event") == "end")


def test_long_steps_show_how_far_they_are(config) -> None:
    seen: dict[str, set[int]] = {}
    gemq.quantize(
        replace(config, method=replace(FAST, tune=True, router_bits=8)),
        progress=lambda stage, done, total: seen.setdefault(stage, set()).add(done / total),
    )
    named = ("read the model", "measure", "quantize", "tune routers", "quantize routers", "compare routers", "save")
    for stage in named:
        # begun, somewhere between, done
        assert 1.0 in seen[stage] and any(0 < part < 1 for part in seen[stage]), stage


def test_progress_is_silent_until_it_is_measured() -> None:
    clock = iter(range(0, 10_000, 3))
    bars = Progress(get_time=lambda: next(clock), console=Console(file=io.StringIO()))
    number, shown = bars.add_task("measure", total=10), []
    (task,) = bars.tasks
    for done in (0, 1, 2, 6, 10):
        bars.update(number, completed=done)
        shown.append(display.RateColumn().render(task).plain)
    assert shown[0] == shown[1] == shown[-1] == ""
    assert all(re.fullmatch(r"left 0:0[0-9]:[0-9]{2}, [0-9.]+ (s each|a second)", text) for text in shown[2:4])
