"""Output folders of a run: checked before work, locked against others, and never written over somebody else's files."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from engine_kills import tree
from safetensors.torch import load_file, save_file
from test_engine_files import FAST

import gemq
from gemq.engine.fingerprint import SourceWatch
from gemq.engine.journal import opened
from gemq.errors import CheckpointError
from gemq.integrity import WEIGHTS_FILE
from gemq.pipeline import QuantizeConfig, run_directory
from gemq.staging import claimed, discard, recover


class Stopped(Exception):
    """Ends a run from a callback."""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty present folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def options(model_folder, quick):
    """Options that ``gemq quantize`` needs besides output folders."""
    return [model_folder, "--bits", "2", "--method", "uniform", "--no-tune-routers", *quick]


@pytest.fixture
def no_work(monkeypatch):
    """Any reading of the model fails."""

    def refuse(*arguments, **keywords):
        raise AssertionError("work began")

    monkeypatch.setattr("gemq.pipeline.check_model", refuse)
    monkeypatch.setattr("gemq.pipeline.load_tokenizer", refuse)


def contents(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*")}


@pytest.mark.parametrize("places, message", [
    (["-o", ""], "--output must be the path of a folder"), (["-o", "."], "folder that this command runs in"),
    (["-o", "sub/.."], "folder that this command runs in"), (["-o", ".."], "is not empty"), (["-o", "/"], "output"),
    (["-o", "/proc/x/y"], "cannot be written"), (["-o", "file/x"], "cannot be written"),
    (["-o", "file"], "not a folder"),
    (["-o", "{model}/out"], "is the model .* or lies|lies in the model's folder|the run directory .* lies in"),
    (["-o", "{model}"], "is the model"), (["-o", "o", "--run-dir", "o"], "is the output o or holds it"),
    (["-o", "o", "--run-dir", "o/run"], "lies in the output o"), (["-o", "r/o", "--run-dir", "r"], "or holds it"),
    (["-o", "o", "--run-dir", "."], "runs in, or holds it"), (["-o", "o", "--run-dir", ""], "runs in, or holds it"),
    (["-o", "o", "--run-dir", "{model}"], "is the model"), (["-o", "o", "--run-dir", "{model}/run"], "is the model"),
    (["-o", "o", "--run-dir", "file"], "exists and is not a folder"),
    (["-o", "o", "--run-dir", "file/x"], "is not a writable folder"),
    (["-o", "o", "--run-dir", "dir"], "than a run: thesis.txt"), (["-o", "o", "--log", "no/log.jsonl"], "no folder"),
    (["-o", "o", "--log", ""], "--log must be a file"), (["-o", "o", "--log", "."], "--log must be a file"),
    (["-o", "o", "--log", "foreign.txt"], "is not a log of gemq quantize; choose another"),
    (["-o", "o", "--log", "link"], "is not a log of gemq"), (["-o", "o", "--log", "/dev/null"], "not a regular file"),
    (["-o", "o", "--log", "pipe"], "is not a regular file"), (["-o", "o", "--log", "o.run/x"], "no folder|replaces"),
    (["-o", "o", "--layer-log", "no/l.csv"], "no folder"),
    (["-o", "o", "--layer-log", "foreign.csv"], "not a layer log"),
    (["-o", "o", "--layer-log", "dir.csv"], "must be a file"), (["-o", "o", "--layer-log", "x.txt"], "must end with"),
    (["-o", "o", "--layer-log", "other.csv"], "exists and is not of this run"),
    (["-o", "o", "--layer-log", "other.jsonl"], "exists and is not of this run"),
    (["-o", "o", "--layer-log", "x.jsonl", "--log", "x.jsonl"], "are both x.jsonl"),
    (["-o", "o", "--run-dir", "stages.run"], "but no manifest"), (["-o", "o", "--run-dir", "dir.csv/../o"], "output o"),
], ids=str)  # fmt: skip
def test_bad_places_are_refused_before_work(here, gemq_run, options, model_folder, no_work, places, message):
    (here / "file").write_text("")
    for name in ("foreign.txt", "foreign.csv"):
        (here / name).write_text("years of work\n")
    (here / "link").symlink_to("foreign.txt")
    os.mkfifo(here / "pipe")
    (here / "dir.csv").mkdir()
    (here / "dir").mkdir()
    (here / "dir" / "thesis.txt").write_text("years of work")
    (here / "stages.run" / "stages").mkdir(parents=True)
    (here / "stages.run" / "stages" / "thesis.txt").write_text("years of work")
    row = {"layer": 0, "bits": 2.0, "error": 0.1, "tokens": 4, "rounded": 0, "seconds": 0.1, "budget": 2.0}
    (here / "other.jsonl").write_text(json.dumps(row) + "\n")
    (here / "other.csv").write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    if places[:2] in (["-o", "."], ["-o", "sub/.."]):
        # an empty one
        shutil.rmtree(here)
        here.mkdir()
        os.chdir(here)
    before, source = contents(here), contents(model_folder)
    code, out, err = gemq_run("quantize", *options, *(p.format(model=model_folder) for p in places))
    assert (code, out) == (2, "") and re.search(message, err), err
    assert contents(here) == before and contents(model_folder) == source
    assert "work began" not in err and "internal error" not in err


def test_several_budgets_may_lie_in_the_present_folder(here, gemq_run, options, tmp_path):
    code, _, err = gemq_run("quantize", *options[:1], "--bits", "2.5,2", *options[3:], "-o", ".")
    assert code == 0, err
    assert contents(tmp_path) >= {"work/2", "work/2.5", "work/2/config.json"}
    assert sorted(os.listdir(tmp_path)) == ["work"] and sorted(os.listdir(here)) == ["2", "2.5"]
    assert run_directory(QuantizeConfig("m", ".")) == tmp_path / "work.run"


def test_runs_of_one_output_exclude_each_other(here, gemq_run, options):
    for output, taken in (("o", "o"), ("o/2", "o/2"), ("o/2.5", "o")):
        with claimed(Path(taken)):
            found = []
            arguments = [*options, "-o", output, "--run-dir", "other.run"]
            if taken == "o" and output != "o":
                arguments = [*options[:1], "--bits", "2.5,2", *options[3:], "-o", "o", "--run-dir", "other.run"]
            for more in ([], ["--keep=model"]):
                command = ["quantize", *arguments, *more]
                thread = threading.Thread(target=lambda c=command, f=found: f.append(gemq_run(*c)))
                thread.start()
                thread.join()
            assert [code for code, *_ in found] == [2, 2]
            assert all(f"is writing {taken}" in err for *_, err in found)
    assert not contents(here)


def test_the_output_stays_anothers_until_it_is_done(here, options, tiny_folder):
    """While a run is at work, saving into its output from elsewhere is refused."""
    program = ("import sys; from pathlib import Path; from gemq.staging import claimed\n"
               "with claimed(Path(sys.argv[1])): pass")
    ends = []

    def progress(stage, done, total):
        if stage == "quantize" and done == 1:
            found = subprocess.run([sys.executable, "-c", program, "out"], capture_output=True, text=True)
            ends.append(found.stderr.strip())

    gemq.quantize(QuantizeConfig(**tiny_folder, output="out", method=FAST), progress=progress)
    assert ends and all(f"another process ({os.getpid()}) is working in out" in text for text in ends)
    assert os.listdir(here) == ["out"]


# the source


def test_a_source_that_changes_under_a_run_is_noticed(here, tiny_folder, tmp_path):
    """By its time as soon as that is looked at, and by its content before anything is put in place."""
    model = Path(shutil.copytree(tiny_folder["model"], tmp_path / "model"))
    config = QuantizeConfig(**{**tiny_folder, "model": str(model)}, output="out", method=FAST)
    original = (model / WEIGHTS_FILE).read_bytes()
    stamp = (model / WEIGHTS_FILE).stat()

    def progress(stage, done, total):
        if stage == "quantize" and done == 2:
            # the last layer is done: the same size and time, another content
            data = bytearray(original)
            data[-3] ^= 64
            with (model / WEIGHTS_FILE).open("r+b") as file:
                file.write(data)
            os.utime(model / WEIGHTS_FILE, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))

    with pytest.raises(CheckpointError, match=rf"{WEIGHTS_FILE} of the model changed while it was being quantized"):
        gemq.quantize(config, progress=progress)
    assert os.listdir(here) == ["out.run"]
    (model / WEIGHTS_FILE).write_bytes(original)
    gemq.quantize(config)
    assert os.listdir(here) == ["out"]
    gemq.verify("out")


@pytest.mark.parametrize("change", ["touch", "append", "replace", "delete", "nothing"])
def test_the_watch_sees(tmp_path, change):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    watch = SourceWatch([file])
    sums = watch.read()
    if change == "touch":
        os.utime(file, ns=(1, 1))
    elif change == "append":
        file.write_bytes(b"weights and more")
    elif change == "replace":
        stamp = file.stat()
        (tmp_path / "new").write_bytes(b"weights")
        os.utime(tmp_path / "new", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        os.replace(tmp_path / "new", file)
    elif change == "delete":
        file.unlink()
    if change == "nothing":
        watch.check()
        assert watch.read() == sums
        return
    with pytest.raises(CheckpointError, match=r"model\.safetensors of the model changed"):
        watch.check()


def test_a_moved_model_and_text_are_known_by_content(here, tiny_folder, tmp_path, gemq_run):
    model = Path(shutil.copytree(tiny_folder["model"], tmp_path / "before"))
    text = Path(shutil.copy(tiny_folder["calibration"], tmp_path / "before.txt"))
    given = {**tiny_folder, "model": str(model), "calibration": str(text)}
    config = QuantizeConfig(**given, output="out", method=FAST)
    expected = here.parent / "expected"
    gemq.quantize(replace(config, output=str(expected)))
    with pytest.raises(Stopped):
        gemq.quantize(config, progress=stop_after("quantize", 1))
    model.rename(tmp_path / "after")
    text.rename(tmp_path / "after.txt")
    code, _, err = gemq_run("quantize", "--resume", "out.run")
    assert code == 2 and "no model in" in err
    changed = load_file(tmp_path / "after" / WEIGHTS_FILE)
    shutil.copytree(tmp_path / "after", tmp_path / "other")
    name = next(iter(changed))
    save_file(changed | {name: changed[name] + 1}, tmp_path / "other" / WEIGHTS_FILE, {"format": "pt"})
    moved = ["--calibration", tmp_path / "after.txt"]
    code, _, err = gemq_run("quantize", "--resume", "out.run", tmp_path / "other", *moved)
    assert code == 2 and f"model.{WEIGHTS_FILE} was" in err
    code, _, err = gemq_run("quantize", "--resume", "out.run", tmp_path / "after", *moved)
    assert code == 0, err
    assert tree(Path("out"))[WEIGHTS_FILE] == tree(expected)[WEIGHTS_FILE] and os.listdir(here) == ["out"]


def test_an_output_that_was_moved_is_given(here, tiny_folder, gemq_run):
    config = QuantizeConfig(**tiny_folder, output="out", method=FAST)
    with pytest.raises(Stopped):
        gemq.quantize(config, progress=stop_after("quantize", 1))
    os.rename("out.run", "kept")
    code, _, err = gemq_run("quantize", "--resume", "kept")
    assert code == 2 and "say where with --output" in err
    assert gemq_run("quantize", "--resume", "kept", "-o", "elsewhere")[0] == 0
    assert os.listdir(here) == ["elsewhere"]


def stop_after(stage: str, done: int):
    def progress(name: str, at: int, total: int) -> None:
        if (name, at) == (stage, done):
            raise Stopped

    return progress


# logs


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
@pytest.mark.parametrize("how", ["again", "resume", "restart"])
def test_a_layer_log_has_each_layer_once(here, options, gemq_run, monkeypatch, ending, how):
    log, real = here / f"layers.{ending}", gemq.pipeline.quantize
    many = [*options[:1], "--bits", "2.5,2", *options[3:], "-o", "o", "--layer-log", log]

    def killed(config, report, on_layer):
        def layer(found):
            on_layer(found)
            if (found.budget, found.layer) == (2.5, 1):
                raise OSError("pulled the plug")

        return real(config, report, layer)

    monkeypatch.setattr("gemq.pipeline.quantize", killed)
    assert gemq_run("quantize", *many)[0] == 2
    whole = log.read_bytes()
    log.write_bytes(whole + whole[-9:-1])
    monkeypatch.setattr("gemq.pipeline.quantize", real)
    again = {"again": many, "resume": ["--resume", "o.run", "--layer-log", log], "restart": [*many, "--restart"]}[how]
    code, _, err = gemq_run("quantize", *again)
    assert code == 0, err
    text = log.read_text()
    rows = [json.loads(line) for line in text.splitlines()] if ending == "jsonl" else list(csv.DictReader(
        text.splitlines()))
    assert [(float(r["budget"]), int(r["layer"])) for r in rows] == [(2.5, 0), (2.5, 1), (2.0, 0), (2.0, 1)]
    assert log.read_bytes().startswith(whole) or how == "restart"


def test_a_log_goes_on(here, options, gemq_run):
    assert gemq_run("quantize", *options, "-o", "a", "--log", "log.jsonl")[0] == 0
    before = Path("log.jsonl").read_text()
    assert gemq_run("quantize", *options, "-o", "b", "--log", "log.jsonl")[0] == 0
    after = Path("log.jsonl").read_text()
    assert after.startswith(before) and len(after) > len(before)


# run directories that are deleted


def test_a_killed_deletion_is_finished(tmp_path):
    run = tmp_path / "o.run"
    with opened(run, {"a": 1}) as directory:
        (run / "stages" / "x").mkdir(parents=True)
        directory.delete()
    assert not contents(tmp_path)
    run.mkdir()
    (run / "x").write_text("")

    def stop(path):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gemq.staging.durable.remove", stop)
        with pytest.raises(KeyboardInterrupt):
            discard(run)
    assert not run.exists() and len(os.listdir(tmp_path)) == 1
    recover(run)
    assert not contents(tmp_path)
