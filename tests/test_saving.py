"""Saving: checked before work, nothing half-written, sizes as the bits say."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from packed_models import logits, quantized

import gemq
from gemq import durable
from gemq.checkpoint import check_output, save_packed
from gemq.checkpoint_summary import summarize
from gemq.errors import CheckpointError
from gemq.integrity import MANIFEST_FILE, WEIGHTS_FILE, read_header, weight_files
from gemq.staging import claimed


@pytest.fixture(scope="module")
def made():
    return quantized("mixtral", tune=False)


@pytest.fixture
def folder(made, tmp_path):
    """A checkpoint that is there already, in several shards."""
    return save_packed(made.packed, made.config, tmp_path / "model", dtype=torch.bfloat16, max_shard_size="30KB")


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_output_is_checked_before_work(folder, tmp_path):
    with pytest.raises(CheckpointError, match="is the model itself"):
        check_output(folder, folder, overwrite=True)
    with pytest.raises(CheckpointError, match="is the model itself or holds it"):
        check_output(tmp_path, folder, overwrite=True)
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(CheckpointError, match="is the model itself"):
        check_output(tmp_path / "link", folder, overwrite=True)
    with pytest.raises(CheckpointError, match="is not empty; choose another or pass --overwrite"):
        check_output(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="exists and is not a folder"):
        check_output(tmp_path / "file", overwrite=True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_output(tmp_path / "file" / "below")
    (tmp_path / "empty").mkdir()
    for path in (folder, tmp_path / "empty", tmp_path / "new" / "below"):
        assert check_output(path, overwrite=True) == path


def test_overwrite_replaces_checkpoints_only(made, tmp_path):
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds other things than a checkpoint; choose another"):
        save_packed(made.packed, made.config, documents, overwrite=True)
    assert (documents / "thesis.txt").read_text() == "years of work"


def test_overwrite_replaces_every_file(made, folder, tmp_path):
    save_packed(made.packed, made.config, folder, overwrite=True)
    assert {p.name for p in folder.iterdir()} == {"config.json", "generation_config.json", MANIFEST_FILE, WEIGHTS_FILE}
    assert os.listdir(tmp_path) == ["model"]
    gemq.verify(folder)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "ctrl-c"])
@pytest.mark.parametrize("place", ["weights", "extra", "config", "rename"])
def test_a_failing_save_leaves_the_old_checkpoint(made, folder, tmp_path, monkeypatch, error, place):
    def fail(*args, **kwargs):
        raise error

    def rename(source, target, replace=os.replace):
        if Path(source).name == "new":
            raise error
        replace(source, target)

    if place == "weights":
        monkeypatch.setattr("gemq.checkpoint.save_torch_state_dict", fail)
    if place == "config":
        monkeypatch.setattr("gemq.checkpoint.write_manifest", fail)
    if place == "rename":
        monkeypatch.setattr("gemq.durable.os.replace", rename)
    extra = {"notes.json": fail} if place == "extra" else {}
    before = snapshot(folder)
    # a full disk is told with the folder
    raised = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(raised, match="could not be written: No space" if isinstance(error, OSError) else None):
        save_packed(made.packed, made.config, folder, extra_files=extra, overwrite=True)
    with pytest.raises(raised):
        save_packed(made.packed, made.config, tmp_path / "new", extra_files=extra)
    assert snapshot(folder) == before
    assert os.listdir(tmp_path) == ["model"]


def test_config_is_written_last(made, tmp_path, monkeypatch):
    synced = []
    sync = durable.sync

    def record(path):
        if path.is_file():
            synced.append(path.name)
            # nothing is loadable before everything else is on the disk
            assert (path.parent / "config.json").exists() == (path.name == "config.json")
        sync(path)

    monkeypatch.setattr(durable, "sync", record)
    save_packed(made.packed, made.config, tmp_path / "model", extra_files={"x.json": lambda path: path.touch()})
    assert set(synced[:-1]) == {WEIGHTS_FILE, MANIFEST_FILE, "generation_config.json", "x.json"}
    assert synced[-1] == "config.json"


def left_behind(folder: Path, name: str, marks: str | None, *held: str) -> Path:
    """A helper folder of the output ``name`` as a killed process leaves it."""
    left = folder / f".{name}.gemq-partial-abcdefgh"
    left.mkdir()
    if marks is not None:
        (left / "gemq.json").write_text(marks)
    for part in held:
        (left / part).mkdir()
        (left / part / "junk.safetensors").write_text("")
    return left


@pytest.mark.parametrize("marks, held", [('{"gemq": "model"}', ["new"]), ('{"gem', []), (None, [])])
def test_what_a_killed_process_left_is_cleared(made, tmp_path, marks, held):
    left_behind(tmp_path, "model", marks, *held)
    (tmp_path / ".model.gemq-lock").write_text("4194305")
    save_packed(made.packed, made.config, tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]
    gemq.verify(tmp_path / "model")


def test_what_a_killed_process_had_moved_aside_comes_back(made, folder, tmp_path):
    """It was killed between the two renames of replacing a checkpoint."""
    before, left = snapshot(folder), left_behind(tmp_path, "model", '{"gemq": "model"}', "new")
    folder.rename(left / "old")
    with pytest.raises(CheckpointError, match="is not empty"), claimed(folder):
        check_output(folder)
    assert snapshot(folder) == before and os.listdir(tmp_path) == ["model"]


def test_folders_of_others_stay(made, tmp_path):
    for name in ("model.partial", ".model.gemq-partial-thesis"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    other = left_behind(tmp_path, "model", '{"gemq": "another"}', "new")
    save_packed(made.packed, made.config, tmp_path / "model")
    save_packed(made.packed, made.config, tmp_path / "model", overwrite=True)
    assert (tmp_path / "model.partial" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / ".model.gemq-partial-thesis" / "thesis.txt").is_file() and (other / "new").is_dir()
    gemq.verify(tmp_path / "model")


def test_overwriting_leaves_no_note_of_others(made, folder):
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds other things than a checkpoint: additional_chat_templates/thes"):
        save_packed(made.packed, made.config, folder, overwrite=True)


HOLDER = """
import sys, time
from pathlib import Path
from gemq.staging import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


def test_an_output_has_one_writer(made, tmp_path):
    """Also after the first was killed, and for links to the same folder."""
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "model")
    target = tmp_path / "deep" / "model"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(target)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            for path in (target, tmp_path / "link"):
                with pytest.raises(CheckpointError, match=rf"another process \({other.pid}\) is working in {path}"):
                    save_packed(made.packed, made.config, path)
        finally:
            other.kill()
    save_packed(made.packed, made.config, target)
    assert os.listdir(tmp_path / "deep") == ["model"]


def test_threads_of_one_process_exclude_each_other(tmp_path):
    failures = []

    def again():
        try:
            with claimed(tmp_path / "out"):
                failures.append(None)
        except CheckpointError as error:
            failures.append(str(error))

    with claimed(tmp_path / "out"), claimed(tmp_path / "out"):
        thread = threading.Thread(target=again)
        thread.start()
        thread.join()
    assert failures == [f"another thread of this process is writing {tmp_path / 'out'}; wait for it"]
    assert not os.listdir(tmp_path)


def test_a_claim_leaves_no_folders(tmp_path):
    with claimed(tmp_path / "a" / "b" / "out"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not os.listdir(tmp_path)
    with claimed(tmp_path / ("long" * 60)):
        assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("given", [".", "..", "../here", "/", "", "sub/.."])
def test_folders_that_cannot_be_replaced(tmp_path, monkeypatch, given):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(CheckpointError, match="the output"):
        check_output(given)
    assert not os.listdir(tmp_path / "here")


def test_an_output_in_the_model(folder):
    with pytest.raises(CheckpointError, match=r"lies in the model's folder .*; choose another folder"):
        check_output(folder / "sub" / "out", folder)


def test_saving_leaves_the_model_as_it_is(made, tmp_path):
    before, dtype = logits(made.packed), made.packed.config.dtype
    save_packed(made.packed, made.config, tmp_path / "model", dtype=torch.float16)
    assert torch.equal(logits(made.packed), before)
    assert (made.packed.dtype, made.packed.config.dtype) == (torch.float32, dtype)
    assert gemq.from_pretrained(tmp_path / "model").dtype == torch.float16


def test_unquantized_tensors_are_stored_in_the_dtype_asked_for(folder):
    dtypes = {name: entry.dtype for file in weight_files(folder) for name, entry in read_header(file).items()}
    for name, dtype in dtypes.items():
        assert dtype == ("U8" if name.endswith("_codes") else "F16" if name.endswith("_meta") else "BF16")


def test_size_on_disk_is_what_the_bits_say(tmp_path):
    made = quantized("deepseek_v2", layers=4, experts=24, tune=False)
    save_packed(made.packed, made.config, tmp_path / "model", dtype=torch.bfloat16)
    said = made.stage.bytes
    # by hand: codes, and 32 bits for each row of each group (64 columns, or 32 where that does not divide)
    gate_up, down = ([b for row in rows.values() for b in row] for rows in (made.config.widths.experts,
                                                                            made.config.widths.down))
    experts = sum(192 * 64 * b // 8 + 4 * 192 for b in gate_up) + sum(64 * 96 * b // 8 + 4 * 64 * 3 for b in down)
    summary = summarize(tmp_path / "model")
    assert experts == summary.bytes_by_kind["experts codes"] + summary.bytes_by_kind["experts meta"]
    assert summary.tensor_bytes == said
    on_disk = sum(f.stat().st_size for f in (tmp_path / "model").glob("*.safetensors"))
    assert on_disk == summary.file_bytes
    assert said <= on_disk <= 1.02 * said
    assert gate_up != down
    assert summary.expert_bits == pytest.approx((2 * sum(gate_up) + sum(down)) / (3 * len(down)))
