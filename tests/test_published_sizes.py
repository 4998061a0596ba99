"""Families at the sizes of their published models, without storage: parameters, parts, a layout for every matrix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tiny_models import slow_but
from transformers import AutoConfig

from gemq.bench.architectures import KNOWN, PUBLISHED, STATED, load_config, meta_model, parameters
from gemq.bench.random_model import packed_plan
from gemq.models import describe
from gemq.packed_model import packed_skeleton

ROOT = Path(__file__).resolve().parents[1]
# overrides of transformers' defaults, which are those of the published model for the other families
OLMOE = {"intermediate_size": 1024}
DOTS1 = {
    "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 32, "n_routed_experts": 128,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
}
DEEPSEEK_V2 = {
    "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 160, "n_shared_experts": 2,
    "n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy", "num_experts_per_tok": 6,
    "q_lora_rank": 1536, "first_k_dense_replace": 1, "vocab_size": 102400,
}


# billions of parameters as published (without the layers of multi-token prediction), experts, MoE layers, linears
# of attention and dense MLPs, shared multiple
@pytest.mark.parametrize("kind, changes, billions, experts, layers, attention, dense, shared", [
    ("olmoe", OLMOE, 6.92, 64, 16, 4 * 16, 0, 0.0),
    ("deepseek_v2", DEEPSEEK_V2, 235.7, 160, 59, 5 * 60, 3, 2.0),
    ("deepseek_v3", {}, 671.0, 256, 58, 5 * 61, 9, 1.0),
    # Dots1Config's defaults are not the published model's: dots.llm1
    ("dots1", DOTS1, 142.8, 128, 61, 4 * 62, 3, 2.0),
    ("glm4_moe", {}, None, 128, 45, 4 * 46, 3, 1.0),
    ("qwen3_next", {}, 79.7, 512, 48, 4 * 12 + 2 * 36, 0, 1.0),
])  # fmt: skip
def test_a_published_size(kind, changes, billions, experts, layers, attention, dense, shared):
    config = AutoConfig.for_model(kind, **changes)
    if billions is not None:
        assert parameters(config) / 1e9 == pytest.approx(billions, rel=0.002)
    model = meta_model(config)
    moe = describe(model)
    assert (moe.num_experts, len(moe.moe), moe.shared_multiple) == (experts, layers, shared)
    assert (len(moe.attention), len(moe.dense)) == (attention, dense)
    plan = packed_plan(config, ((2, 1.0),), 4, 4)
    modules = packed_skeleton(moe, plan.widths, plan.group_size, "meta")
    assert len(modules) == layers + attention + dense + (3 * layers if shared else 0)
    buffers = [b for m in modules.values() for b in m.buffers()]
    assert len(buffers) == 2 * len(modules) + 2 * layers and {b.device for b in buffers} == {torch.device("meta")}


@pytest.mark.parametrize("name", slow_but(STATED, ("gpt-oss-20b", "gemma-4-26b-a4b", "nemotron-3-nano-30b-a3b")))
def test_a_config_that_ships_has_the_parameters_that_its_makers_state(name):
    config = load_config(name)
    assert parameters(config) / 1e9 == pytest.approx(STATED[name], rel=0.03)
    assert describe(meta_model(config)).moe


def test_the_page_of_what_fits_knows_every_config():
    rows = re.findall(r"^\| `(.*?)`(\*?) \|", (ROOT / "docs" / "what-fits.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == set(KNOWN) and {name for name, mark in rows if mark} == set(PUBLISHED)


@pytest.mark.parametrize("name", ["lfm2-8b-a1b"])
def test_a_row_of_the_page_is_what_the_script_computes(name, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import what_fits

    assert what_fits.row(name) in (ROOT / "docs" / "what-fits.md").read_text().splitlines()
