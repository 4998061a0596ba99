"""Tiny random models of the types that are supported by their structure alone: their attention and routing run in
transformers' own forward."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from tiny_models import VOCAB
from torch import nn
from transformers import CONFIG_MAPPING

from gemq.transformers_versions import lacks

# values of the fields that a config class has
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 128, "intermediate_size": 96, "moe_intermediate_size": 96, "num_hidden_layers": 3,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "shared_expert_intermediate_size": 96, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_head_dim": 16, "linear_num_heads": 4, "sliding_window": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8,
}
_MIXED = {"layer_types": ["linear_attention", "linear_attention", "full_attention"]}
_LATENT = {"num_key_value_heads": 4}
# by type: the class of the model, and fields of its own
LISTED: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": ("AfmoeForCausalLM", {}),
    "axk1": ("AXK1ForCausalLM", _LATENT),
    "axk2": ("AXK2ForCausalLM", _LATENT),
    "bailing_hybrid": ("BailingHybridForCausalLM", _LATENT | _MIXED | {"head_dim": 16}),
    "beam": ("BeamForCausalLM", {"mlp_layer_types": ["dense", "sparse", "sparse"]}),
    "cohere2_moe": ("Cohere2MoeForCausalLM", {}),
    "deepseek_v32": ("DeepseekV32ForCausalLM", _LATENT),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", {}),
    "exaone_moe": ("ExaoneMoeForCausalLM", {}),
    "flex_olmo": ("FlexOlmoForCausalLM", {}),
    "flint": ("FlintForCausalLM", {}),
    "gemma4_text": ("Gemma4ForCausalLM", {
        "enable_moe_block": True, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 0,
        "num_global_key_value_heads": 2, "global_head_dim": 64, "final_logit_softcapping": None,
    }),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", _LATENT),
    "gpt_oss": ("GptOssForCausalLM", {}),
    "granitemoe": ("GraniteMoeForCausalLM", {}),
    "granitemoe_swa": ("GraniteMoeSWAForCausalLM", {}),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", {
        "shared_intermediate_size": 96, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2,
    }),
    "granitemoeshared": ("GraniteMoeSharedForCausalLM", {"shared_intermediate_size": 96}),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", {}),
    "hy_v3": ("HYV3ForCausalLM", {}),
    "jamba": ("JambaForCausalLM", {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1,
    }),
    "kimi_linear": ("KimiLinearForCausalLM", _LATENT | _MIXED | {"linear_head_dim": 32, "q_lora_rank": None}),
    "kolibri1": ("Kolibri1ForCausalLM", {}),
    "laguna": ("LagunaForCausalLM", {"moe_routed_scaling_factor": 2.5}),
    "lfm2_moe": ("Lfm2MoeForCausalLM", {"layer_types": ["conv", "conv", "full_attention"], "num_dense_layers": 1}),
    "llama4_text": ("Llama4ForCausalLM", {"intermediate_size_mlp": 96, "num_experts_per_tok": 1}),
    "mistral4": ("Mistral4ForCausalLM", _LATENT),
    "minimax_m3_vl_text": ("MiniMaxM3VLForCausalLM", {}),
    "aria_text": ("AriaTextForCausalLM", {}),
    "mellum": ("MellumForCausalLM", {}),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", {}),
    "minimax_m2": ("MiniMaxM2ForCausalLM", {}),
    "nemotron_h": ("NemotronHForCausalLM", {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "moe_shared_expert_intermediate_size": 96, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 1,
        "ssm_state_size": 16, "chunk_size": 16,
    }),
    "phimoe": ("PhimoeForCausalLM", {}),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM", _MIXED),
    "qwen4_exp_text": ("Qwen4ExpForCausalLM", _MIXED | {
        "hc_lowrank": 8, "ngram_vocab_size_base": 100, "split_ngram_parts": 1, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 32, "indexer_budget": 16, "indexer_compress_ratio": 4,
    }),
    "solar_open": ("SolarOpenForCausalLM", {}),
}
# wrappers by type: class of the whole, type of the text model in LISTED or fields of its own
_VISION = {
    "hidden_size": 32, "embed_dim": 32, "depth": 1, "num_hidden_layers": 1, "num_heads": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "out_hidden_size": 64, "image_size": 28, "patch_size": 14, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0], "encoder_layers": 1, "d_model": 32, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32, "output_dim": 64,
}
WRAPPED: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": ("Gemma4ForConditionalGeneration", LISTED["gemma4_text"][1]),
    "glm4v_moe": ("Glm4vMoeForConditionalGeneration", {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0,
                            "mrope_section": [2, 3, 3]},
    }),
    "kimi_k25": ("Kimi_K25ForConditionalGeneration", _LATENT),
    "llama4": ("Llama4ForConditionalGeneration", LISTED["llama4_text"][1]),
    "minimax_m3_vl": ("MiniMaxM3SparseForConditionalGeneration", {}),
    "step3p7": ("Step3p7ForConditionalGeneration", {
        "mlp_layer_types": ["dense", "sparse", "sparse"], "layer_types": ["full_attention"] * 3,
    }),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", _MIXED),
    "qwen3_omni_moe_thinker": ("Qwen3OmniMoeThinkerForConditionalGeneration", {}),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", {}),
    "qwen4_exp": ("Qwen4ExpForConditionalGeneration", LISTED["qwen4_exp_text"][1]),
}


def _known(kinds: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Those that the installed transformers has: types that it lacks do not exist for the tests."""
    return {kind: value for kind, value in kinds.items() if hasattr(transformers, value[0]) and not lacks(kind)}


ABSENT = tuple(sorted((LISTED | WRAPPED).keys() - _known(LISTED | WRAPPED).keys()))
LISTED, WRAPPED = _known(LISTED), _known(WRAPPED)
# types whose tokens run in gemq's own steps
OWN_STEPS = frozenset((
    "glm4_moe_lite", "gpt_oss", "gemma4", "gemma4_text", "nemotron_h", "qwen3_5_moe", "qwen3_5_moe_text",
))
_ROUTERS = ("gate.weight", "router.weight", "wg.weight", "router.layer.weight", "conv1d.weight")


def _fields(config_class: type) -> set[str]:
    named = {name for kind in config_class.__mro__ for name in getattr(kind, "__annotations__", {})}
    return named | set(inspect.signature(config_class.__init__).parameters)


def _sized(config_class: Any, values: dict[str, Any], own: dict[str, Any]) -> Any:
    known = _fields(config_class) | own.keys()
    return config_class(**{field: value for field, value in values.items() if field in known})


def _wrapper(kind: str, own: dict[str, Any]) -> Any:
    """The config of the wrapper ``kind``, with one layer in each of its towers."""
    config_class: Any = CONFIG_MAPPING[kind]
    parts: dict[str, Any] = {}
    for name, part in config_class.sub_configs.items():
        if "text" in name:
            # Kimi's text model is a DeepSeek-V3
            text = "deepseek_v3" if kind == "kimi_k25" else f"{kind}_text"
            part = CONFIG_MAPPING[text] if part.__name__ == "AutoConfig" else part
            parts[name] = _sized(part, _SIZES | own, own).to_dict()
        elif part.__name__ != "AutoConfig":
            known = _fields(part)
            parts[name] = {field: value for field, value in _VISION.items() if field in known}
    config = config_class(**parts)
    if not hasattr(config, "vision_start_token_id"):
        config.vision_start_token_id = 3  # Qwen3-Omni's forward asks for it, its config class does not name it
    return config


def listed_model(kind: str, seed: int = 0, **fields: Any) -> nn.Module:
    """A model of two to four layers of 4 experts, in float32, whose routers decide clearly, with other ``fields``."""
    torch.manual_seed(seed)
    name, own = (LISTED | WRAPPED)[kind]
    own = own | fields
    config_class = CONFIG_MAPPING[kind]
    config = _wrapper(kind, own) if kind in WRAPPED else _sized(config_class, _SIZES | own, own)
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.5 if path.endswith(_ROUTERS) else 0.08)
        for path, buffer in model.named_buffers():
            if path.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    return model.eval()
