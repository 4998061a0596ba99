"""Checkpoints that strangers made: numbers, links, keys, code and sizes that no quantizer writes."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct

import pytest
import torch
from hostile_checkpoints import (  # noqa: F401
    LOADERS,
    META,
    a_folder,
    a_gemq_run,
    a_made,
    a_saved,
    a_sharded,
    edit_json,
    refused,
)
from packed_models import logits
from safetensors.torch import load_file, save_file

import gemq
from gemq.errors import CheckpointError, GemqError
from gemq.integrity import INDEX_FILE, WEIGHTS_FILE, weight_files
from gemq.reference.grid import round_to_nearest

# metadata


@pytest.mark.parametrize("value", [0.0, -0.0, -1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("name", [META, "model.layers.0.self_attn.q_proj.weight_meta"])
def test_scales_that_no_quantizer_writes(folder, value, name):
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors[name][6] = value
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    refused(folder, r"_meta holds (NaN or infinity|a scale that is not above zero)")


def test_offsets_may_be_zero_but_not_nan(folder):
    tensors = load_file(folder / WEIGHTS_FILE)
    tensors[META][7] = 0.0
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    gemq.from_pretrained(folder)
    tensors[META][7] = float("nan")
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    refused(folder, "holds NaN or infinity")


def test_zero_weights_give_scales_above_zero():
    """A group of zeros gets the smallest scale above zero; the check of stored scales relies on it."""
    for bits in range(1, 9):
        _, meta = round_to_nearest(torch.zeros(2, 64), bits, 32)
        assert (meta[..., 0] > 0).all()


# links


def test_a_link_out_of_the_folder_is_not_followed(folder, tmp_path, monkeypatch):
    outside = shutil.move(folder / WEIGHTS_FILE, tmp_path / "outside.safetensors")
    (folder / WEIGHTS_FILE).symlink_to(outside)
    monkeypatch.setattr("gemq.hf.read_header", lambda file: pytest.fail(f"opened {file}"))
    refused(folder, r"model\.safetensors is a link to .*outside\.safetensors, which is not in the folder")


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside.safetensors"])
def test_a_shard_that_is_a_link(sharded, tmp_path, target):
    shard = weight_files(sharded)[1]
    shutil.move(shard, tmp_path / "outside.safetensors")
    shard.symlink_to(target)
    refused(sharded, rf"{shard.name} is a link to .*, which is not in the folder of the checkpoint")


def test_links_that_stay_inside(folder, tmp_path):
    """Within the folder, a link to the folder itself, and the hub's cache: snapshots that link to blobs."""
    (folder / WEIGHTS_FILE).rename(folder / "weights-1")
    (folder / WEIGHTS_FILE).symlink_to("weights-1")
    expected = logits(gemq.from_pretrained(folder))
    (tmp_path / "link").symlink_to(folder)
    assert torch.equal(logits(gemq.from_pretrained(tmp_path / "link")), expected)
    cache = tmp_path / "models--someone--model"
    snapshot = cache / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(folder, snapshot, symlinks=True)
    (cache / "blobs").mkdir()
    (snapshot / "weights-1").rename(cache / "blobs" / "9f86d081")
    (snapshot / WEIGHTS_FILE).unlink()
    (snapshot / WEIGHTS_FILE).symlink_to("../../blobs/9f86d081")
    for load in LOADERS.values():
        assert torch.equal(logits(load(snapshot)), expected)
    (cache / "blobs").rename(cache / "elsewhere")
    (snapshot / WEIGHTS_FILE).unlink()
    (snapshot / WEIGHTS_FILE).symlink_to("../../elsewhere/9f86d081")
    refused(snapshot, "is a link to")


# keys that come twice


def test_duplicate_keys(folder, sharded):
    file = folder / "config.json"
    good = file.read_text()
    file.write_text(re.sub(r'("version": \d)', r'\1, \1', good))
    assert file.read_text() != good
    refused(folder, r"config\.json is not valid JSON \(the key 'version' comes twice\)", ("gemq",))
    index = sharded / INDEX_FILE
    name = next(iter(json.loads(index.read_text())["weight_map"]))
    index.write_text(index.read_text().replace(f'"{name}"', f'"{name}": "x.safetensors", "{name}"', 1))
    refused(sharded, "comes twice", ("gemq",))


def test_a_tensor_twice_in_one_header(folder):
    file = folder / WEIGHTS_FILE
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = raw[8 : 8 + length].rstrip()
    entry = header[header.index(b'"lm_head.weight"') :].split(b"}")[0] + b"}"
    header = header[:-1] + b"," + entry + b"}"
    file.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    refused(folder, r"the key 'lm_head\.weight' comes twice")


def test_missing_shards_are_counted(sharded):
    files = weight_files(sharded)
    for file in files:
        file.unlink()
    shown = ", ".join(file.name for file in files[:5])
    more = f" and {len(files) - 5} more" if len(files) > 5 else ""
    refused(sharded, f"lacks {shown}{more}, which", ("gemq",))


# code in a checkpoint


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_checkpoint_is_executed(folder, tmp_path):
    """Pickles beside the weights or in their place, and the module of an ``auto_map``."""
    sprung = tmp_path / "sprung"
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin"):
        torch.save(Trap(sprung), folder / name)
    (folder / "modeling_trap.py").write_text(f"import os\nos.mkdir({str(sprung)!r})\n")
    classes = {"AutoConfig": "modeling_trap.Config", "AutoModelForCausalLM": "modeling_trap.Model"}
    edit_json(folder / "config.json", lambda data: data.update(auto_map=classes))
    for load in LOADERS.values():
        load(folder)
    (folder / WEIGHTS_FILE).rename(folder / "kept")
    refused(folder, "neither model.safetensors nor", ("gemq",))
    with pytest.raises((OSError, CheckpointError)):
        LOADERS["transformers"](folder)
    shutil.copy(folder / "pytorch_model.bin", folder / WEIGHTS_FILE)
    refused(folder, r"model\.safetensors is truncated or corrupt: its header claims")
    assert not sprung.exists()


def test_an_unknown_model_type_with_code(folder, tmp_path):
    sprung = tmp_path / "sprung"
    (folder / "modeling_trap.py").write_text(f"import os\nos.mkdir({str(sprung)!r})\n")
    classes = {"AutoConfig": "modeling_trap.Config", "AutoModelForCausalLM": "modeling_trap.Model"}
    edit_json(folder / "config.json", lambda data: data.update(auto_map=classes, model_type="trap"))
    refused(folder, "needs code that comes with it, which is run with --trust-remote-code alone", ("gemq",))
    assert not sprung.exists()


# sizes nobody has


@pytest.mark.parametrize(
    "changes",
    [
        {"num_local_experts": 10**9}, {"num_hidden_layers": 10**9}, {"hidden_size": 2**40}, {"vocab_size": 2**62},
        {"intermediate_size": 2**63 - 1}, {"num_hidden_layers": -1}, {"num_local_experts": 0}, {"hidden_size": 0},
        {"num_attention_heads": 0}, {"head_dim": 2**61}, {"num_experts_per_tok": 10**9, "num_local_experts": 10**9},
    ],
    ids=str,
)
@pytest.mark.timeout(60)
def test_sizes_nobody_has(folder, changes):
    """A typed error, before memory is taken or a model of a billion layers is begun."""
    edit_json(folder / "config.json", lambda data: data.update(changes))
    message = rf"{next(iter(changes))} must be a whole number in|num_local_experts must be|has shape"
    for load in LOADERS.values():
        with pytest.raises(GemqError, match=message):
            load(folder)
