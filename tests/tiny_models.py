"""Tiny random models of every supported family, for tests."""

from __future__ import annotations

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FAMILIES = ("mixtral", "deepseek_v2", "qwen2_moe", "qwen3_moe")
VOCAB = 96
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "num_experts_per_tok": 2,
}


def tiny_model(family: str, seed: int = 0, layers: int = 2, experts: int = 4):
    """A float32 model in evaluation mode with random weights large enough that its experts matter."""
    torch.manual_seed(seed)
    if family == "mixtral":
        config = MixtralConfig(**_COMMON, intermediate_size=96, num_hidden_layers=layers, num_local_experts=experts)
        model = MixtralForCausalLM(config)
    elif family == "deepseek_v2":
        # one dense layer first, two shared experts merged into one MLP
        options = _COMMON | {"num_key_value_heads": 4}
        config = DeepseekV2Config(
            **options, intermediate_size=128, moe_intermediate_size=96, num_hidden_layers=layers + 1,
            n_routed_experts=experts, n_shared_experts=2, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=32,
            qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32, n_group=1, topk_group=1,
        )
        model = DeepseekV2ForCausalLM(config)
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
                parameter.normal_(0, 0.5 if name.endswith("gate.weight") else 0.08)
    return model.eval()


def random_windows(count: int = 6, length: int = 24, seed: int = 0) -> torch.Tensor:
    """Token ids ``[count, length]``."""
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
