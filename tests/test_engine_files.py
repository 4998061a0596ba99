"""Sealed files, scratch arrays, and run directories: what is torn, changed, locked or does not fit."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gemq import durable
from gemq.algorithms.method import MethodConfig
from gemq.engine.fingerprint import differences
from gemq.engine.journal import MANIFEST, PREVIOUS, opened, read_manifest
from gemq.engine.scratch import Scratch
from gemq.errors import CheckpointError

FAST = MethodConfig(budgets=(2.0,), method="gemq", per_layer="none", tune=False, batch_size=2)


@given(st.binary(max_size=200), st.data())
def test_a_sealed_file_is_whole_or_absent(payload: bytes, data) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        assert durable.unseal(path) is None
        durable.seal(path, payload)
        assert durable.unseal(path) == payload
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        assert durable.unseal(path) is None
        at = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << data.draw(st.integers(0, 7))]) + whole[at + 1 :])
        assert durable.unseal(path) is None


def test_sealed_tensors_and_notes_come_back(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3), "b": torch.tensor([float("nan"), 1e-30]).bfloat16()}
    durable.seal_tensors(tmp_path / "x", tensors, [0.1, None, {"k": [1]}])
    found, notes = durable.unseal_tensors(tmp_path / "x")
    assert notes == [0.1, None, {"k": [1]}]
    assert all(torch.equal(found[k].view(torch.uint8), v.view(torch.uint8)) for k, v in tensors.items())
    durable.seal_tensors(tmp_path / "empty", {}, "nothing")
    assert durable.unseal_tensors(tmp_path / "empty") == ({}, "nothing")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    durable.seal(tmp_path / "x", b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"x could not be written: File too large; what was finished is kept"):
            durable.seal(tmp_path / "x", bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert durable.unseal(tmp_path / "x") == b"old" and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("on_disk", [True, False])
def test_scratch_arrays(tmp_path: Path, on_disk: bool) -> None:
    scratch = Scratch(tmp_path / "scratch" if on_disk else None)
    batches = [torch.randn(3, 2).bfloat16(), torch.randint(0, 9, (2, 2)), torch.zeros(0, 4)]
    with scratch.writing("a", True) as out:
        for batch in batches:
            out.append(batch)
        batches[0].data.zero_()
    assert scratch.sound("a") and not scratch.sound("b")
    assert torch.equal(scratch.batch("a", 1), batches[1]) and scratch.batch("a", 2).shape == (0, 4)
    # what was written, not what became of it
    assert scratch.batch("a", 0).any()
    scratch.drop("a")
    assert not scratch.sound("a")


@pytest.mark.parametrize("on_disk", [True, False])
def test_rows_of_scratch_arrays(tmp_path: Path, on_disk: bool) -> None:
    scratch = Scratch(tmp_path if on_disk else None)
    batches = [torch.randn(3, 2).bfloat16(), torch.zeros(0, 2).bfloat16(), torch.randn(50, 2).bfloat16()]
    with scratch.writing("a") as out:
        for batch in batches:
            out.append(batch)
    for _ in range(2):
        for at, batch in enumerate(batches):
            assert torch.equal(scratch.rows("a", at, slice(None)), batch)
            some = torch.arange(len(batch) - 1, -1, -2)
            assert torch.equal(scratch.rows("a", at, some), batch[some])
            assert scratch.rows("a", at, torch.empty(0, dtype=torch.int64)).shape == (0, 2)
    # what is written anew is read anew
    with scratch.writing("a") as out:
        out.append(batches[0] + 1)
    assert torch.equal(scratch.rows("a", 0, slice(1, 2)), (batches[0] + 1)[1:2])


def test_rows_of_a_harmed_array_are_refused(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    with scratch.writing("a") as out:
        out.append(torch.arange(10))
    os.truncate(tmp_path / "a.bin", 50)
    with pytest.raises(CheckpointError, match=r"a.bin is corrupt; it was removed, the same command continues"):
        scratch.rows("a", 0, torch.tensor([1]))


@pytest.mark.parametrize("harm", ["flip", "truncate", "no index", "torn index", "no data"])
def test_a_harmed_array_is_not_trusted(tmp_path: Path, harm: str) -> None:
    scratch = Scratch(tmp_path)
    with scratch.writing("a", True) as out:
        out.append(torch.arange(10))
        out.append(torch.arange(5))
    assert Scratch(tmp_path).sound("a")
    data, index = tmp_path / "a.bin", tmp_path / "a.index"
    if harm == "flip":
        content = bytearray(data.read_bytes())
        content[90] ^= 4
        data.write_bytes(content)
    elif harm == "truncate":
        os.truncate(data, 100)
    elif harm == "torn index":
        os.truncate(index, 40)
    else:
        (index if harm == "no index" else data).unlink()
    if harm in ("flip", "truncate"):
        with pytest.raises(CheckpointError, match=r"a.bin is corrupt; it was removed, the same command continues"):
            scratch.batch("a", 1)
    assert not Scratch(tmp_path).sound("a")


def test_an_array_that_was_not_finished_does_not_exist(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    with pytest.raises(RuntimeError), scratch.writing("a", True) as out:
        out.append(torch.zeros(3))
        raise RuntimeError
    assert not scratch.sound("a") and not Scratch(tmp_path).sound("a")


# run directories


def test_other_settings_are_refused_with_the_differences(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with opened(path, {"model": {"a": "1"}, "bits": (2.0,)}):
        pass
    with opened(path, {"model": {"a": "1"}, "bits": (2.0,)}) as run:
        stage = run.stage("measure", 2.0)
        durable.seal_json(stage.file("x"), 1)
    with pytest.raises(CheckpointError, match=r"bits was \[2.0\], is \[1.5\]; model.a was \"1\", is \"2\""), opened(
        path, {"model": {"a": "2"}, "bits": (1.5,)}
    ):
        raise AssertionError
    with opened(path, {"model": {"a": "1"}, "bits": (1.5,)}, changed="redo") as run:
        assert durable.unseal_json(run.stage("measure", 2.0).file("x")) == 1
        assert durable.unseal_json(run.stage("measure", 1.5).file("x")) is None
    assert read_manifest(path)["settings"]["bits"] == [1.5]
    with opened(path, {"model": {}}, changed="restart") as run:
        assert durable.unseal_json(run.stage("measure", 2.0).file("x")) is None


def test_a_torn_manifest_falls_back_to_the_one_before(tmp_path: Path) -> None:
    for bits in (1, 2):
        with opened(tmp_path, {"bits": bits}, {"model": "m"}, changed="redo"):
            pass
    text = (tmp_path / MANIFEST).read_text()
    for torn in (text[: len(text) // 2], text.replace('"bits": 2', '"bits": 3'), "", "[]", "{}"):
        (tmp_path / MANIFEST).write_text(torn)
        assert read_manifest(tmp_path) == {"settings": {"bits": 1}, "command": {"model": "m"}}
    (tmp_path / PREVIOUS).write_text("")
    with pytest.raises(CheckpointError, match=r"manifest of .* is unreadable; --changed restart begins anew"), opened(
        tmp_path, {"bits": 1}
    ):
        raise AssertionError
    with opened(tmp_path, {"bits": 1}, changed="restart"):
        pass


def test_a_folder_of_other_things_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match=r"holds other things than a run: thesis.tex"), opened(tmp_path, {}):
        raise AssertionError
    with pytest.raises(CheckpointError, match="exists and is not a folder"), opened(tmp_path / "thesis.tex", {}):
        raise AssertionError
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_one_process_works_in_a_run_directory(tmp_path: Path) -> None:
    # the kernel's lock belongs to the open file, so a second one in this process is as foreign as another's
    with opened(tmp_path, {}) as run:
        stage = run.stage("measure")
        with pytest.raises(CheckpointError, match=rf"another process \({os.getpid()}\) is working in"), opened(
            tmp_path, {}, changed="restart"
        ):
            raise AssertionError
        assert stage.folder.is_dir()
    with opened(tmp_path, {}):
        pass


def test_scratch_of_other_stages_is_deleted(tmp_path: Path) -> None:
    with opened(tmp_path, {}) as run:
        first = run.stage("measure")
        Scratch(first.scratch)
        second = run.stage("quantize")
        assert not first.scratch.exists() and first.folder.is_dir()
        Scratch(second.scratch)
        run.finished(second)
        assert not second.scratch.exists()
        run.log(stage="quantize", seconds=1.5)
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line["stage"] == "quantize" and line["seconds"] == 1.5 and line["time"] > 1e9


def test_differences_are_lines() -> None:
    before, now = {"a": {"b": 1, "c": [1, 2]}, "d": "x" * 100}, {"a": {"b": 1, "c": [1]}, "e": None, "d": "y"}
    assert differences(before, now) == [
        "a.c was [1, 2], is [1]", f'd was "{"x" * 39}...{"x" * 11}", is "y"',
    ]
