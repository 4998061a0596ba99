"""Tiny random models of every supported family, for tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Dots1Config,
    Dots1ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

# deepseek_v2_groups is deepseek_v2 with group-limited routing and a compressed query
FAMILIES = (
    "mixtral", "deepseek_v2", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2_groups", "deepseek_v3", "glm4_moe",
    "qwen3_next", "dots1",
)
VOCAB = 96
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "num_experts_per_tok": 2,
}


_LATENT = {
    "num_key_value_heads": 4, "intermediate_size": 128, "moe_intermediate_size": 96, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
}
_GROUPS = {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5, "q_lora_rank": 32}


def tiny_model(family: str, seed: int = 0, layers: int = 2, experts: int = 4, config: Any = None):
    """A float32 model in evaluation mode with random weights large enough that its experts matter; of ``config`` if one
    is given."""
    torch.manual_seed(seed)
    if config is not None:
        model = AutoModelForCausalLM.from_config(config)
    elif family == "mixtral":
        config = MixtralConfig(**_COMMON, intermediate_size=96, num_hidden_layers=layers, num_local_experts=experts)
        model = MixtralForCausalLM(config)
    elif family == "deepseek_v2":
        # one dense layer first, two shared experts merged into one MLP
        config = DeepseekV2Config(
            **_COMMON | _LATENT, num_hidden_layers=layers + 1, n_routed_experts=experts, q_lora_rank=None, n_group=1,
            topk_group=1,
        )
        model = DeepseekV2ForCausalLM(config)
    elif family == "deepseek_v2_groups":
        config = DeepseekV2Config(
            **_COMMON | _LATENT | _GROUPS, num_hidden_layers=layers + 1, n_routed_experts=experts,
            topk_method="group_limited_greedy",
        )
        model = DeepseekV2ForCausalLM(config)
    elif family == "deepseek_v3":
        config = DeepseekV3Config(
            **_COMMON | _LATENT | _GROUPS, num_hidden_layers=layers + 1, n_routed_experts=experts,
        )
        model = DeepseekV3ForCausalLM(config)
    elif family == "dots1":
        config = Dots1Config(
            **_COMMON, intermediate_size=128, moe_intermediate_size=96, num_hidden_layers=layers + 1,
            n_routed_experts=experts, n_shared_experts=2, first_k_dense_replace=1, n_group=1, topk_group=1,
            norm_topk_prob=True, routed_scaling_factor=2.5,
        )
        model = Dots1ForCausalLM(config)
    elif family == "glm4_moe":
        config = Glm4MoeConfig(
            **_COMMON, head_dim=32, intermediate_size=128, moe_intermediate_size=96, num_hidden_layers=layers + 1,
            n_routed_experts=experts, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1,
            use_qk_norm=True, attention_bias=True, routed_scaling_factor=2.5,
        )
        model = Glm4MoeForCausalLM(config)
    elif family == "olmoe":
        config = OlmoeConfig(**_COMMON, intermediate_size=96, num_hidden_layers=layers, num_experts=experts)
        model = OlmoeForCausalLM(config)
    elif family == "qwen3_next":
        # the last layer's attention is full, the others' linear
        config = Qwen3NextConfig(
            **_COMMON, head_dim=32, intermediate_size=128, moe_intermediate_size=96,
            shared_expert_intermediate_size=128, num_hidden_layers=layers, num_experts=experts,
            layer_types=["linear_attention"] * (layers - 1) + ["full_attention"], linear_conv_kernel_dim=4,
            linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4,
        )
        model = Qwen3NextForCausalLM(config)
    elif family == "qwen2_moe":
        config = Qwen2MoeConfig(
            **_COMMON, intermediate_size=128, moe_intermediate_size=96, shared_expert_intermediate_size=128,
            num_hidden_layers=layers, num_experts=experts,
        )
        model = Qwen2MoeForCausalLM(config)
    elif family == "qwen3_moe":
        config = Qwen3MoeConfig(
            **_COMMON, head_dim=32, intermediate_size=128, moe_intermediate_size=96, num_hidden_layers=layers,
            num_experts=experts,
        )
        model = Qwen3MoeForCausalLM(config)
    else:
        raise ValueError(family)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 if name.endswith(("gate.weight", "conv1d.weight")) else 0.08)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    return model.eval()


def slow_but(every: Iterable[str], quick: tuple[str, ...]) -> list:
    """Parameters of a test: all of ``every``, those that are not ``quick`` in the slow suite alone."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in quick)) for name in every]


def random_windows(count: int = 6, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Token ids ``[count, length]``."""
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


def snapshot(model) -> dict[str, torch.Tensor]:
    """Copies of a model's tensors by name."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model) -> set[str]:
    """Names of the tensors of ``model`` that differ from those of :func:`snapshot`."""
    return {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}
