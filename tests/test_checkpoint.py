"""Checkpoints: every way one can be wrong is refused by name, and verification finds what loading cannot."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct

import pytest
import torch
from packed_models import logits, quantized
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

import gemq
from gemq.checkpoint import load_packed_config, save_packed
from gemq.checkpoint_summary import summarize
from gemq.errors import CheckpointError
from gemq.integrity import INDEX_FILE, MANIFEST_FILE, WEIGHTS_FILE, weight_files
from gemq.packed_config import STORED, PackedConfig
from gemq.widths import Widths

LOADERS = {"gemq": gemq.from_pretrained, "transformers": AutoModelForCausalLM.from_pretrained}
CODES = "model.layers.0.block_sparse_moe.experts.gate_up_codes"
META = "model.layers.0.block_sparse_moe.experts.down_meta"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight_codes"


@pytest.fixture(scope="module")
def made():
    return quantized("mixtral", tune=False)


@pytest.fixture(scope="module")
def saved(made, tmp_path_factory):
    """``(single, sharded)``: pristine checkpoints, to be copied."""
    root = tmp_path_factory.mktemp("saved")
    single = save_packed(made.packed, made.config, root / "single", dtype=torch.bfloat16)
    return single, save_packed(made.packed, made.config, root / "sharded", max_shard_size="30KB")


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "model")


@pytest.fixture
def sharded(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "model")


def refused(folder, message, loaders=tuple(LOADERS)):
    """Every loader refuses the folder with a :class:`CheckpointError` of one line."""
    for name in loaders:
        with pytest.raises(CheckpointError, match=message) as caught:
            LOADERS[name](folder)
        assert len(str(caught.value)) < 600


def edit_json(file, change):
    data = json.loads(file.read_text())
    result = change(data)
    file.write_text(json.dumps(data if result is None else result))


def edit_config(folder, **changes):
    edit_json(folder / "config.json", lambda data: data["quantization_config"].update(changes))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_header(file, change):
    """Rewrite the JSON header; the payload stays."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


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


# config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 4}, "format version 4, this gemq .* reads up to 3; upgrade"),
        ({"version": "1"}, "version must be a positive integer, got '1'"),
        ({"version": None}, "version must be a positive integer, got None"),
        ({"version": True}, "version must be a positive integer"),
        ({"expert_bits": {"0": [9, 1, 2, 3], "1": [1, 1, 2, 3]}}, r"expert_bits\[0\] must be bits in 0\.\.8, got 9"),
        ({"expert_bits": {"0": [-1, 1, 2, 3], "1": [1, 1, 2, 3]}}, "got -1"),
        ({"expert_bits": {"0": [2.5, 1, 2, 3], "1": [1, 1, 2, 3]}}, "got 2.5"),
        ({"expert_bits": {"0": ["2", 1, 2, 3], "1": [1, 1, 2, 3]}}, "got '2'"),
        ({"expert_bits": {"0": [[[]]], "1": [1, 1, 2, 3]}}, r"got \[\[\]\]"),
        ({"expert_bits": {"0": [1, 2, 2, 3]}}, "does not match its digest"),
        ({"expert_bits": {"0": [], "1": [2]}}, r"expert_bits\['0'\] is malformed"),
        ({"expert_bits": {}}, "expert_bits names no layer"),
        ({"expert_bits": {"x": [2, 2, 2, 2]}}, r"expert_bits\['x'\] is malformed"),
        ({"expert_bits": {"9" * 5000: [2]}}, r"expert_bits\[.*\] is malformed"),
        ({"expert_bits": {"0": 3}}, r"expert_bits\['0'\] is malformed: 3"),
        ({"expert_bits": [[1, 2]]}, "expert_bits must map layers to bits, got list"),
        ({"expert_bits": None}, "expert_bits must map layers to bits, got NoneType"),
        ({"shared_bits": {"0": 0}}, r"shared_bits\[0\] must be bits in 1\.\.8 or 16, got 0"),
        ({"attention_bits": 9}, r"attention_bits must be bits in 1\.\.8 or 16, got 9"),
        ({"dense_bits": True}, "dense_bits must be bits"),
        ({"attention_bits": 8}, "does not match its digest"),
        ({"group_size": 48}, r"group_size must be one of \(32, 64, 128\), got 48"),
        ({"group_size": 64}, "does not match its digest"),
        ({"budget": float("nan")}, "budget must be a number, got nan"),
        ({"method": 3}, "method must be a string, got 3"),
        ({"digest": "0" * 64}, "does not match its digest"),
        ({"digest": None}, "does not match its digest"),
        ({"down_bits": {"0": [9, 2, 2, 2]}}, r"down_bits\[0\] must be bits in 0\.\.8, got 9"),
        ({"down_bits": {}}, "down_bits names no layer"),
        ({"down_bits": [1]}, "down_bits must map layers to bits, got list"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_edited_quantization_config(folder, changes, message):
    edit_config(folder, **changes)
    refused(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "down_bits must be absent before format version 3"),
        ({"down_bits": {"0": [2] * 4, "1": [2] * 4}}, "does not match its digest"),
        ({"expert_bits": {"0": [2] * 4, "1": [2] * 4}}, "does not match its digest"),
    ],
    ids=str,
)
def test_edited_widths_of_down(folder, changes, message):
    _with_bits(folder, load_packed_config(folder).widths.experts, {0: [1, 2, 3, 4], 1: [4, 3, 2, 1]})
    edit_config(folder, **changes)
    refused(folder, message)


def test_a_huge_list_of_bits(folder):
    edit_config(folder, expert_bits={"0": [2] * 200_000, "1": [2] * 4})
    refused(folder, "digest")
    edit_config(folder, expert_bits={"0": [2] * 199_999 + [17], "1": [2] * 4})
    refused(folder, "got 17")


def test_exchanged_widths_are_refused_though_the_sizes_fit(folder):
    before = load_packed_config(folder).widths.experts
    row = next(widths for widths in before.values() if len(set(widths)) > 1)
    one, other = row.index(min(row)), row.index(max(row))
    row[one], row[other] = row[other], row[one]
    edit_config(folder, expert_bits={str(k): v for k, v in before.items()})
    refused(folder, "quantization_config does not match its digest: it was edited")


def _with_bits(folder, expert_bits, down_bits=None):
    """Replace the widths and the digest with them, as someone would who knows the format."""
    data = json.loads((folder / "config.json").read_text())
    values = data["quantization_config"]
    values = {k: v for k, v in values.items() if k not in ("quant_method", "digest", "down_bits")}
    values |= {"expert_bits": expert_bits, "down_bits": down_bits or {}}
    widths = Widths(**{part: values.pop(name) for name, part in STORED.items() if name in values})
    data["quantization_config"] = PackedConfig(widths, **values).to_dict()
    (folder / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({0: [1, 2, 2, 3]}, r"expert_bits names layers \[0\], but the model's MoE layers are \[0, 1\]"),
        ({0: [2] * 4, 7: [2] * 4}, r"names layers \[0, 7\]"),
        ({0: [1, 2, 3], 1: [1, 2, 2, 3]}, r"expert_bits\[0\] has 3 widths for 4 experts"),
        ({0: [8] * 4, 1: [8] * 4}, r"gate_up_codes has shape \[\d+\], expected \[\d+\]"),
    ],
    ids=["layer-missing", "other-layer", "expert-missing", "sizes"],
)
def test_widths_that_do_not_fit_the_model(folder, bits, message):
    _with_bits(folder, bits)
    refused(folder, message)


@pytest.mark.parametrize(
    ("down", "message"),
    [
        ({0: [2] * 4}, "down_bits must be of the layers and experts of expert_bits, got"),
        ({0: [2] * 4, 1: [2] * 3}, "down_bits must be of the layers and experts of expert_bits, got"),
        ({0: [8] * 4, 1: [8] * 4}, r"down_codes has shape \[\d+\], expected \[\d+\]"),
    ],
    ids=["layer-missing", "expert-missing", "sizes"],
)
def test_widths_of_down_that_do_not_fit(folder, down, message):
    _with_bits(folder, load_packed_config(folder).widths.experts, down)
    refused(folder, message)


def test_config_of_another_model(folder):
    edit_json(folder / "config.json", lambda data: data.update(num_hidden_layers=3))
    refused(folder, r"MoE layers are \[0, 1, 2\]")
    edit_json(folder / "config.json", lambda data: data.update(num_hidden_layers=2, hidden_size=128))
    refused(folder, "has shape")
    edit_json(folder / "config.json", lambda data: data.update(hidden_size="wide"))
    refused(folder, "hidden_size must be a whole number", ["gemq"])


def test_a_full_precision_model_is_not_a_packed_one(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", "not a gemq checkpoint: config.json has no quantization_config of gemq", ["gemq"])


@pytest.mark.parametrize("method", ["awq", "gemqq", None, 3])
def test_another_quantization_method(folder, method):
    edit_config(folder, quant_method=method)
    refused(folder, "not a gemq checkpoint", ["gemq"])


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "[" * 50_000, '{"quantization_config": []}'])
def test_config_that_is_not_an_object(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "is not valid JSON|must hold a JSON object|not a gemq checkpoint", ["gemq"])


def test_a_partial_output_has_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "not a complete checkpoint: it has no config.json", ["gemq"])
    with pytest.raises((OSError, ValueError), match=r"config\.json"):
        LOADERS["transformers"](folder)


def test_no_folder(tmp_path):
    refused(tmp_path / "nowhere", "there is no folder .*nowhere", ["gemq"])


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
