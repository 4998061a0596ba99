"""Differences between versions of transformers: types that one lacks, and what loading makes up for."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from listed_models import ABSENT
from tiny_models import tiny_model
from torch import nn
from transformers import CONFIG_MAPPING

from gemq import transformers_versions
from gemq.errors import CheckpointError, UnsupportedModelError
from gemq.model_config import model_config
from gemq.models import SUPPORTED, describe
from gemq.transformers_versions import SINCE, ConfigSeer, cached_width, cast_as_declared, dtypes_of, lacks


def test_types_that_are_missing_are_those_known_to_be_younger():
    """Of every supported type that the installed transformers does not have, the release that has it is known."""
    assert {kind for kind in SUPPORTED if lacks(kind)} == set(ABSENT)
    assert {kind for kind in SUPPORTED if kind not in CONFIG_MAPPING} <= set(ABSENT) <= SINCE.keys() <= set(SUPPORTED)


@pytest.mark.parametrize("kind", SINCE)
def test_a_younger_type_is_named_with_its_release(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_versions, "VERSION", "5.16.1")
    assert lacks(kind) and not lacks("mixtral")
    said = rf"model type '{kind}' needs transformers {SINCE[kind]} or newer, and 5\.16\.1 is installed"
    model = tiny_model("mixtral")
    model.config.model_type = kind
    with pytest.raises(UnsupportedModelError, match=said):
        describe(model)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", unrecognized)
    with pytest.raises(CheckpointError, match=f"no model in .*: {said}"):
        model_config(str(tmp_path))


def unrecognized(*_, **__):
    raise ValueError("The checkpoint has a model type but Transformers does not recognize this model type")


def test_a_type_that_no_release_has_is_named_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "made_up"}')
    with pytest.raises(CheckpointError, match=rf"transformers {transformers.__version__} does not know .* `made_up`$"):
        model_config(str(tmp_path))


def test_the_config_is_seen_by_the_hook_of_this_version():
    seen = []

    class Quantizer(ConfigSeer):
        def see_config(self, config):
            seen.append(config)

        is_serializable = is_trainable = None

    config = SimpleNamespace()
    quantizer = Quantizer.__new__(Quantizer)
    name = "update_attn_implementation" if hasattr(ConfigSeer, "update_attn_implementation") else "update_tp_plan"
    assert getattr(quantizer, name)(config) is config and seen == [config]


def test_tensors_get_the_dtypes_that_the_model_declares():
    with torch.device("meta"):
        declared = nn.ModuleDict({"gate": nn.Linear(2, 2), "norm": nn.LayerNorm(2, dtype=torch.bfloat16)})
        declared["packed"] = nn.Module()
        declared["packed"].register_buffer("codes_meta", torch.zeros(2, dtype=torch.float16))
    dtypes = dtypes_of(declared, {"norm.weight"})
    loaded = nn.ModuleDict({"gate": nn.Linear(2, 2).half(), "norm": nn.LayerNorm(2, dtype=torch.bfloat16)})
    loaded["packed"] = nn.Module()
    loaded["packed"].register_buffer("codes_meta", torch.ones(2, dtype=torch.float16))
    cast_as_declared(loaded, dtypes)
    assert loaded["gate"].weight.dtype == loaded["norm"].weight.dtype == torch.float32
    assert loaded["norm"].bias.dtype == torch.bfloat16 and loaded["packed"].codes_meta.dtype == torch.float16


@pytest.mark.parametrize("version, indexer, width", [("5.17.0", 32, 256), ("5.17.0", None, 48), ("5.18.0", 32, 48)])
def test_what_latent_attention_caches(monkeypatch, version, indexer, width):
    monkeypatch.setattr(transformers_versions, "VERSION", version)
    sizes = {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32, "index_head_dim": indexer}
    assert cached_width(48, 4, SimpleNamespace(**sizes)) == width
