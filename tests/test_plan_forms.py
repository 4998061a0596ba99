"""Predictions for what differs from family to family: towers, layers of multi-token prediction, experts without a gate.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from listed_models import listed_model
from packed_models import quantized_model
from tiny_models import tiny_model

from gemq.algorithms.method import MethodConfig
from gemq.checkpoint import save_packed
from gemq.models import packed_modules
from gemq.nn import LowBitExperts
from gemq.packed_model import tower_prefixes
from gemq.planning import Machine, PlanConfig, Rates, make_plan
from gemq.planning.memory import Work
from gemq.planning.model_parts import count_parts, located
from gemq.planning.seconds import measuring, quantizing

UNIFORM = MethodConfig(budgets=(2.0,), method="uniform", tune=False, perturbation="rtn")
HERE = Machine("a test", True, None, 1 << 40, None, Rates(1e12, 1e11, 1e8, 1e11, "a test"))
FORMS = {
    "gateless": lambda: listed_model("nemotron_h"),
    "latent": lambda: listed_model("nemotron_h", moe_latent_size=32),
    "transposed-biased": lambda: listed_model("gpt_oss"),
    "weighted-inputs": lambda: listed_model("llama4_text"),
    "wrapper": lambda: listed_model("qwen3_vl_moe"),
    "wrapper-with-sound": lambda: listed_model("qwen3_omni_moe_thinker"),
    "dense-and-moe": lambda: tiny_model("deepseek_v3"),
}


def files(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def without_ahead(config):
    """The config of a checkpoint that has no layer of multi-token prediction, as none in memory has."""
    config.num_nextn_predict_layers = 0
    return config


@pytest.mark.parametrize("form", FORMS)
def test_file_and_what_a_token_reads(form: str, tmp_path) -> None:
    model = FORMS[form]()
    result = quantized_model(model, 2.0, tune=False, perturbation="rtn", method="uniform")
    save_packed(result.packed, result.config, tmp_path / "out", dtype=torch.bfloat16)
    plan = make_plan(without_ahead(model.config), PlanConfig(UNIFORM), HERE)
    assert plan.outputs[2.0].files == pytest.approx(files(tmp_path / "out"), abs=16)
    # everything that is held, but the experts that are not chosen, the towers and all rows of the embedding but one
    read = plan.inference[2.0].weights
    for _, module in packed_modules(result.packed):
        if isinstance(module, LowBitExperts):
            stacks = sum(b.nbytes for n, b in module.named_buffers() if n.rpartition("_")[2] in ("codes", "meta"))
            read -= stacks * (4 - result.dense.config.get_text_config().num_experts_per_tok) // 4
    towers = tower_prefixes(model)
    read -= 2 * sum(p.numel() for n, p in model.named_parameters() if n.startswith(towers))
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        read -= 2 * model.get_input_embeddings().weight[1:].numel()
    assert plan.inference[2.0].read == pytest.approx(read, abs=len(result.config.widths.experts) * 4)
    assert bool(towers) == form.startswith("wrapper")


def moe_layer(parts) -> int:
    return next(index for index, layer in enumerate(parts.layers) if layer.routed)


@pytest.mark.parametrize("form, rows, columns", [("gateless", 96, 64), ("latent", 96, 32), ("dense-and-moe", 192, 64)])
def test_operations_count_the_matrices_that_experts_have(form, rows, columns) -> None:
    parts = count_parts(located(FORMS[form]().config))
    assert (parts.expert_rows, parts.expert_hidden) == (rows, columns)
    assert parts.expert == (rows + 96) * columns
    work = Work(4, 16, MethodConfig(candidates=(2,), perturbation="rtn", granularity="expert"), 4, True)
    shared = (rows // 96 + 1) * 64 * parts.layers[moe_layer(parts)].mlp
    assert measuring(parts, work).rounded == parts.moe_layers * (4 * parts.expert + shared)
    linears = sum(n * k for layer in parts.layers for n, k in layer.linears)
    assert quantizing(parts, work).rounded == linears + parts.moe_layers * 4 * parts.expert
