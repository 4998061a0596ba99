"""Layers of multi-token prediction: no model of transformers has them, checkpoints do, and packed ones keep them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ahead_models import PREFIXES, published_folder
from packed_models import logits
from safetensors.torch import load_file
from tiny_models import random_windows, tiny_model
from transformers import AutoConfig

import gemq
from gemq.algorithms.method import MethodConfig
from gemq.checkpoint import save_packed
from gemq.checkpoint_summary import summarize
from gemq.cli.run import run
from gemq.engine.progression import quantize_progressively
from gemq.engine.source import ResidentSource
from gemq.integrity import WEIGHTS_FILE, weight_files
from gemq.models.ahead import is_ahead
from gemq.pipeline import QuantizeConfig
from gemq.planning import Machine, PlanConfig, make_plan

METHOD = MethodConfig(budgets=(2.0,), method="uniform", tune=False, perturbation="rtn")
HERE = Machine("a test", True, None, None, None, None)
every_family = pytest.mark.parametrize("family", PREFIXES)


def held(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in weight_files(folder) for name, t in load_file(file).items()}


def quantize(source: Path, target: Path, text: Path, **options) -> QuantizeConfig:
    config = QuantizeConfig(str(source), str(target), str(text), 2, 16, method=METHOD, **options)
    list(gemq.quantize(config))
    return config


@every_family
def test_they_travel_through_every_command(family, tmp_path, tokenizer, text_file, capsys) -> None:
    source = tmp_path / "source"
    ahead = published_folder(family, source, tokenizer)
    for keep in ("layer", "model"):
        target = tmp_path / keep
        quantize(source, target, text_file, keep=keep)
        found = held(target)
        assert all(found[name].dtype == t.dtype and torch.equal(found[name], t) for name, t in ahead.items())
    assert (tmp_path / "layer" / WEIGHTS_FILE).read_bytes() == (tmp_path / "model" / WEIGHTS_FILE).read_bytes()
    target = tmp_path / "layer"
    assert logits(gemq.from_pretrained(target)).isfinite().all()
    assert summarize(target).tensor_bytes == sum(t.nbytes for t in held(target).values())
    for command in (["verify", str(target)], ["inspect", str(target)], ["inspect", str(target), "--format", "json"]):
        assert run(command) == 0, command
    capsys.readouterr()
    # again from the same folder, and to 16 bits and from there
    quantize(source, target, text_file, overwrite=True)
    assert all(torch.equal(held(target)[name], t) for name, t in ahead.items())
    assert run(["export", str(target), "-o", str(tmp_path / "wide")]) == 0
    quantize(tmp_path / "wide", tmp_path / "again", text_file)
    assert logits(gemq.from_pretrained(tmp_path / "again")).isfinite().all()


@every_family
def test_the_plan_counts_them(family, tmp_path, tokenizer, text_file) -> None:
    source = tmp_path / "source"
    ahead = published_folder(family, source, tokenizer)
    quantize(source, tmp_path / "out", text_file)
    real = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    config = AutoConfig.from_pretrained(source)
    plan = make_plan(config, PlanConfig(METHOD), HERE, str(source))
    assert plan.outputs[2.0].files == pytest.approx(real, abs=16)
    assert plan.outputs[2.0].ahead == sum(t.nbytes for t in ahead.values())
    alone = make_plan(config, PlanConfig(METHOD), HERE)
    if family == "qwen3_next":
        assert alone.outputs[2.0].ahead == 0, "its config says nothing of them"
        return
    assert alone.outputs[2.0].ahead == plan.outputs[2.0].ahead
    # layer 2 by its config, in place of 61 or 92: a digit a name, and places in the file
    assert 0 <= plan.outputs[2.0].files - alone.outputs[2.0].files <= 2 * len(ahead) + 16
    assert alone.inference[2.0] == plan.inference[2.0]


def test_a_layer_that_another_size_of_the_family_has_ahead_is_loaded(tmp_path) -> None:
    """GLM-4.5-Air's layer ahead is 46, which is one of GLM-4.5's own."""
    model = tiny_model("glm4_moe", layers=48)
    assert is_ahead(model, "model.layers.46.mlp.gate.weight")
    (result,) = quantize_progressively(ResidentSource(model), random_windows(1, 8), METHOD)
    packed, config = result.packed()
    save_packed(packed, config, tmp_path / "out", dtype=torch.bfloat16)
    loaded = gemq.from_pretrained(tmp_path / "out")
    assert "model.layers.46.mlp.gate.weight" in dict(loaded.named_parameters())
    assert run(["verify", str(tmp_path / "out")]) == 0
