"""Small Mixture-of-Experts models in transformers' own classes, 10 to 60 M parameters each.

They keep what is special in the published ones: Mixtral's 8 experts of which 2 are used; DeepSeek-V2's latent
attention, dense first layer, shared experts and many small experts; Qwen2-MoE's gated shared expert; Qwen3-MoE's
normalised queries and many experts without a shared one.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

ARCHITECTURES = ("mixtral", "deepseek_v2", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True)
class Size:
    """Size of a model. ``intermediate`` is the width of an expert; None chooses it so that the experts used by a token
    are together as wide as 4 x ``hidden``, in steps of 64."""

    hidden: int = 256
    layers: int = 6
    experts: int | None = None
    top_k: int | None = None
    intermediate: int | None = None
    heads: int = 4
    vocabulary: int = 4096
    positions: int = 2048


# experts and how many of them a token uses
DEFAULTS = {"mixtral": (8, 2), "deepseek_v2": (32, 4), "qwen2_moe": (16, 4), "qwen3_moe": (64, 8)}


def _experts(architecture: str, size: Size) -> tuple[int, int, int]:
    """Number of experts, how many a token uses, and the width of one."""
    experts, top_k = DEFAULTS[architecture]
    experts, top_k = size.experts or experts, size.top_k or top_k
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must be in 1..{experts} experts, got {top_k}")
    return experts, top_k, size.intermediate or max(64, 4 * size.hidden // top_k // 64 * 64)


def build(architecture: str, size: Size, begin: int = 0, end: int = 1) -> nn.Module:
    """An untrained model; ``begin`` and ``end`` are the ids of the tokens around a document.

    Raises ``ValueError`` for an unknown architecture or sizes that do not fit one another.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
    if size.hidden % (2 * size.heads):
        raise ValueError(f"hidden must be a multiple of twice the {size.heads} heads, got {size.hidden}")
    import transformers

    experts, top_k, width = _experts(architecture, size)
    head = size.hidden // size.heads
    given = {
        "vocab_size": size.vocabulary, "hidden_size": size.hidden, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": max(1, size.heads // 2),
        "num_experts_per_tok": top_k, "max_position_embeddings": size.positions, "tie_word_embeddings": True,
        "initializer_range": 0.03, "bos_token_id": begin, "eos_token_id": end,
    }
    if architecture == "mixtral":
        given |= {"intermediate_size": width, "num_local_experts": experts}
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**given))
    if architecture == "deepseek_v2":
        given |= {
            "intermediate_size": 4 * size.hidden, "moe_intermediate_size": width, "n_routed_experts": experts,
            "n_shared_experts": 2, "first_k_dense_replace": 1, "kv_lora_rank": head, "q_lora_rank": None,
            "qk_rope_head_dim": head // 2, "qk_nope_head_dim": head // 2, "v_head_dim": head, "n_group": 1,
            "topk_group": 1, "num_key_value_heads": size.heads, "norm_topk_prob": True,
        }
        return transformers.DeepseekV2ForCausalLM(transformers.DeepseekV2Config(**given))
    given |= {"intermediate_size": 4 * size.hidden, "moe_intermediate_size": width, "num_experts": experts,
              "norm_topk_prob": True}
    if architecture == "qwen2_moe":
        given |= {"shared_expert_intermediate_size": 2 * width}
        return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**given))
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**given | {"head_dim": head}))
