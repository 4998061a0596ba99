"""Copies of a tiny packed checkpoint, and how tests damage them."""

from __future__ import annotations

import json
import shutil
import struct

import pytest
import torch
from packed_models import quantized
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gemq
from gemq.checkpoint import save_packed
from gemq.errors import CheckpointError

LOADERS = {"gemq": gemq.from_pretrained, "transformers": AutoModelForCausalLM.from_pretrained}
CODES = "model.layers.0.block_sparse_moe.experts.gate_up_codes"
META = "model.layers.0.block_sparse_moe.experts.down_meta"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight_codes"


@pytest.fixture(name="made", scope="module")
def a_made():
    return quantized("mixtral", tune=False)


def save_both(made, root, shard):
    """``(single, sharded)``: pristine checkpoints, to be copied; one has files of ``shard``."""
    single = save_packed(made.packed, made.config, root / "single", dtype=torch.bfloat16)
    return single, save_packed(made.packed, made.config, root / "sharded", max_shard_size=shard)


@pytest.fixture(name="saved", scope="module")
def a_saved(made, tmp_path_factory):
    return save_both(made, tmp_path_factory.mktemp("saved"), "30KB")


@pytest.fixture(name="folder")
def a_folder(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "model")


@pytest.fixture(name="sharded")
def a_sharded(saved, tmp_path):
    return shutil.copytree(saved[1], tmp_path / "shards")


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
