"""Damaged checkpoints: files, shards and sums that do not fit are refused in one line, by every loader."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct

import pytest
import torch
from broken_checkpoints import (  # noqa: F401
    CODES,
    LOADERS,
    META,
    Q_PROJ,
    a_folder,
    a_made,
    a_saved,
    a_sharded,
    edit_header,
    edit_json,
    edit_tensors,
    refused,
)
from packed_models import logits
from safetensors.torch import load_file

import gemq
from gemq.checkpoint_summary import summarize
from gemq.errors import CheckpointError
from gemq.integrity import INDEX_FILE, MANIFEST_FILE, WEIGHTS_FILE, weight_files

# files


def test_pristine_checkpoints_load(saved, made):
    for path in saved:
        for load in LOADERS.values():
            assert torch.isfinite(logits(load(path))).all()
    assert len(weight_files(saved[1])) > 2
    assert torch.equal(logits(gemq.from_pretrained(saved[1])), logits(made.packed))


@pytest.mark.parametrize("keep", [lambda n: n - 1, lambda n: n // 2, lambda n: 7, lambda n: 0])
def test_truncated_weights(folder, keep):
    file = folder / WEIGHTS_FILE
    os.truncate(file, keep(file.stat().st_size))
    refused(folder, r"model\.safetensors (is truncated or corrupt|has no readable safetensors header)")


def test_one_byte_too_many(folder):
    with (folder / WEIGHTS_FILE).open("ab") as handle:
        handle.write(b"\0")
    refused(folder, r"model\.safetensors is truncated or corrupt")


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8 + 1])
def test_header_too_long(folder, length):
    file = folder / WEIGHTS_FILE
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    refused(folder, f"its header claims {length} bytes")


def _overlap(header):
    header[CODES]["data_offsets"] = [end - 8 for end in header[CODES]["data_offsets"]]


@pytest.mark.parametrize(
    "change",
    [
        _overlap,
        lambda h: h[CODES].update(dtype="F7"),
        lambda h: h[CODES].update(shape=[-1]),
        lambda h: h[CODES].update(shape=[1.5]),
        lambda h: h[CODES].update(shape=7),
        lambda h: h[CODES].pop("data_offsets"),
        lambda h: h[CODES].update(data_offsets=[0, 1 << 70]),
        lambda h: h.update({CODES: []}),
    ],
    ids=["overlap", "dtype", "negative", "fraction", "no-list", "no-offsets", "huge", "no-object"],
)
def test_malformed_headers(folder, change):
    edit_header(folder / WEIGHTS_FILE, change)
    refused(folder, r"model\.safetensors (is corrupt|has no readable safetensors header)")


@pytest.mark.parametrize("text", [b"[]", b"{", b"\xff\xfe", b"[" * 50_000])
def test_headers_that_are_no_json_object(folder, text):
    (folder / WEIGHTS_FILE).write_bytes(struct.pack("<Q", len(text)) + text)
    refused(folder, r"model\.safetensors has no readable safetensors header")


def test_missing_tensors_are_all_named(folder):
    edit_tensors(folder / WEIGHTS_FILE, lambda t: [t.pop(name) for name in (CODES, Q_PROJ, "lm_head.weight")])
    refused(folder, rf"lm_head\.weight is missing; {CODES} is missing; {Q_PROJ} is missing")


def test_unknown_tensor(folder):
    edit_tensors(folder / WEIGHTS_FILE, lambda t: t.update(extra=torch.zeros(3)))
    refused(folder, "extra is not part of the model")


@pytest.mark.parametrize("name", [CODES, META, Q_PROJ, "lm_head.weight"])
def test_wrong_shape(folder, name):
    edit_tensors(folder / WEIGHTS_FILE, lambda t: t.update({name: t[name][:-1].clone()}))
    refused(folder, rf"{name} has shape \[.*\], expected \[.*\]")


def test_one_half_taken_for_the_other(folder):
    """The same bytes would be other numbers."""

    def change(tensors):
        kept = [name for name in tensors if not name.endswith(("_codes", "_meta"))]
        tensors.update({name: tensors[name].bfloat16() for name in kept})
        tensors["model.norm.weight"] = tensors["model.norm.weight"].half()

    edit_tensors(folder / WEIGHTS_FILE, change)
    refused(folder, "model.norm.weight is F16 among tensors in BF16")


@pytest.mark.parametrize("name", [CODES, META, "lm_head.weight"])
def test_wrong_dtype(folder, name):
    edit_tensors(folder / WEIGHTS_FILE, lambda t: t.update({name: t[name].to(torch.int32)}))
    refused(folder, f"{name} is I32, expected (U8|F16|F32 or F16 or BF16)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_metadata_that_is_not_finite(folder, value):
    edit_tensors(folder / WEIGHTS_FILE, lambda t: t[META].__setitem__(5, value))
    refused(folder, r"model\.layers\.0\.mlp\.experts\.down_meta holds NaN or infinity")


def test_a_pickle_is_not_opened(folder):
    (folder / WEIGHTS_FILE).unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")
    refused(folder, "neither model.safetensors nor", ["gemq"])
    refused(folder, r"not a \.safetensors file", ["transformers"])


def test_a_folder_may_be_given_by_any_path(folder, monkeypatch):
    below = folder / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    for path in ("..", "../../model", f"{folder}/", folder / ".." / "model", "./.."):
        for load in LOADERS.values():
            assert load(path).dtype == torch.bfloat16


# shards


def test_missing_shard(sharded):
    lost = weight_files(sharded)[1]
    lost.unlink()
    refused(sharded, f"lacks {lost.name}", ["gemq"])
    with pytest.raises((OSError, CheckpointError)):
        LOADERS["transformers"](sharded)


def test_shard_missing_from_the_index(sharded):
    lost = weight_files(sharded)[0].name

    def forget(index):
        index["weight_map"] = {k: v for k, v in index["weight_map"].items() if v != lost}

    edit_json(sharded / INDEX_FILE, forget)
    refused(sharded, "is missing")


def test_tensor_in_two_shards(sharded):
    first, second = weight_files(sharded)[:2]
    name, value = next(iter(load_file(first).items()))
    edit_tensors(second, lambda t: t.update({name: value}))
    refused(sharded, f"the tensor {name} is in more than one file")


@pytest.mark.parametrize(
    "outside", ["../outside.safetensors", "{root}/outside.safetensors", "a/../../outside.safetensors"]
)
def test_an_index_cannot_lead_out_of_the_folder(sharded, tmp_path, outside, monkeypatch):
    name = weight_files(sharded)[0].name
    shutil.copy(sharded / name, tmp_path / "outside.safetensors")
    outside = outside.format(root=tmp_path)

    def redirect(index):
        index["weight_map"] = {k: outside if v == name else v for k, v in index["weight_map"].items()}

    edit_json(sharded / INDEX_FILE, redirect)
    monkeypatch.setattr("gemq.hf.read_header", lambda file: pytest.fail(f"opened {file}"))
    refused(sharded, r"names '.*outside\.safetensors', which is not a \.safetensors file of the folder")
    with pytest.raises(CheckpointError, match="outside"):
        summarize(sharded)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 3}}, []], ids=str)
def test_malformed_index(sharded, index):
    edit_json(sharded / INDEX_FILE, lambda data: index)
    refused(sharded, "no weight_map|must hold a JSON object", ["gemq"])


# verification


def test_verify_accepts_what_was_saved(saved, made):
    for path in saved:
        found = gemq.verify(path)
        assert found.files == len(list(path.iterdir())) - 1
        assert found.bytes == sum(f.stat().st_size for f in path.iterdir() if f.name != MANIFEST_FILE)
    assert torch.equal(logits(gemq.from_pretrained(saved[1], verify=True)), logits(made.packed))


def test_a_flipped_bit_is_found(folder):
    file = folder / WEIGHTS_FILE
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 16
    file.write_bytes(raw)
    gemq.from_pretrained(folder)
    with pytest.raises(CheckpointError, match=r"model\.safetensors differs from its SHA-256"):
        gemq.verify(folder)
    with pytest.raises(CheckpointError, match="differs"):
        gemq.from_pretrained(folder, verify=True)


def test_files_that_went_came_or_changed_are_all_named(sharded):
    first, second = weight_files(sharded)[:2]
    first.unlink()
    os.truncate(second, 50)
    (sharded / WEIGHTS_FILE).write_bytes(b"")
    (sharded / "README.md").write_text("about")
    edit_json(sharded / "config.json", lambda data: data.update(rms_norm_eps=0.5))
    with pytest.raises(CheckpointError) as caught:
        gemq.verify(sharded)
    parts = (f"{first.name} is missing", f"{second.name} has 50 bytes", "model.safetensors was added", "config.json")
    for part in parts:
        assert part in str(caught.value)
    assert "README" not in str(caught.value)


def test_a_plain_save_cannot_be_verified(folder, tmp_path):
    gemq.from_pretrained(folder).save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"has no gemq_manifest\.json, so it cannot be verified: save_pre"):
        gemq.verify(tmp_path / "plain")
    with pytest.raises(CheckpointError, match="cannot be verified"):
        gemq.from_pretrained(tmp_path / "plain", verify=True)
    assert torch.equal(logits(gemq.from_pretrained(tmp_path / "plain")), logits(gemq.from_pretrained(folder)))


@pytest.mark.parametrize(
    "manifest",
    [
        [], {}, {"version": 2, "files": {"a": {}}}, {"version": 1, "files": {"../a": {}}},
        {"version": 1, "files": {"/a": {}}}, {"version": 1, "files": {"a": 3}},
    ],
    ids=str,
)
def test_malformed_manifest(folder, manifest):
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest"):
        gemq.verify(folder)


def test_the_manifest_is_plain_sha256(folder):
    files = json.loads((folder / MANIFEST_FILE).read_text())["files"]
    for name, entry in files.items():
        content = (folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
