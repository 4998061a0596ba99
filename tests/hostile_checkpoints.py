"""Copies of a tiny packed checkpoint for tests of what strangers may put into one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from packed_models import quantized
from transformers import AutoModelForCausalLM

import gemq
from gemq.checkpoint import save_packed
from gemq.cli.run import run
from gemq.errors import CheckpointError

LOADERS = (gemq.from_pretrained, AutoModelForCausalLM.from_pretrained)
META = "model.layers.0.block_sparse_moe.experts.down_meta"


@pytest.fixture(name="made", scope="module")
def a_made():
    return quantized("mixtral", tune=False)


@pytest.fixture(name="pristine", scope="module")
def a_pristine(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("pristine")
    single = save_packed(made.packed, made.config, root / "single", dtype=torch.bfloat16)
    return single, save_packed(made.packed, made.config, root / "sharded", max_shard_size="12KB")


@pytest.fixture(name="folder")
def a_folder(pristine, tmp_path):
    return shutil.copytree(pristine[0], tmp_path / "model")


@pytest.fixture(name="sharded")
def a_sharded(pristine, tmp_path):
    return shutil.copytree(pristine[1], tmp_path / "shards")


def refused(folder, message, loaders=LOADERS):
    for load in loaders:
        with pytest.raises(CheckpointError, match=message):
            load(folder)


def edit_json(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.fixture(name="gemq_run")
def a_gemq_run(capsys):
    """Run a command in this process: ``(exit code, standard output, lines of standard error)``."""

    def call(*arguments):
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line.strip()]

    return call
