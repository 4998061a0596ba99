"""List of transformers' modules that gemq's own decoding steps were compared with, by their exact class.

A step that computes what a module's ``forward`` would must know that forward. Attributes do not tell: a window, a
clip or a user's subclass looks the same. What is not listed here, was edited, or is listened to by a hook runs in its
own forward. Each function returns None, or a reason as a phrase.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

_STEMS = ("Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "Glm4Moe", "Dots1", "DeepseekV2", "DeepseekV3")
_GROUPED = tuple(f"{stem}Attention" for stem in _STEMS[:6])
_LATENT = tuple(f"{stem}Attention" for stem in _STEMS[6:])
_BLOCKS = frozenset((
    "MixtralSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock", "OlmoeSparseMoeBlock", "Glm4MoeMoE",
    "Dots1MoE", "DeepseekV2Moe", "DeepseekV3MoE",
))
_NAMES = {
    "causal": frozenset(f"{stem}ForCausalLM" for stem in _STEMS),
    "decoder": frozenset(f"{stem}Model" for stem in _STEMS),
    "layer": frozenset(f"{stem}DecoderLayer" for stem in _STEMS),
    "norm": frozenset(f"{stem}RMSNorm" for stem in _STEMS),
    "rotary": frozenset(f"{stem}RotaryEmbedding" for stem in _STEMS),
    "grouped": frozenset(_GROUPED), "latent": frozenset(_LATENT), "block": _BLOCKS,
    "mlp": frozenset(f"{stem}MLP" for stem in _STEMS),
}
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
# the same function of queries, keys and values; others may be anything, also what a user registered
_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# models whose layer types, not the window, decide which tokens a layer attends to
_BY_LAYER = ("qwen2_moe", "dots1")
_WINDOWED = (*_BY_LAYER, "mixtral", "qwen3_moe")


def unknown(module: Any, kind: str) -> str | None:
    """Tell why ``module`` is not one of the compared classes of ``kind``, as it came from transformers."""
    name = type(module).__name__
    if name not in _NAMES[kind] or not type(module).__module__.startswith("transformers.models."):
        return f"{name} was not compared"
    return edited(module)


def edited(module: nn.Module) -> str | None:
    """Return the reason for which the forward of ``module`` must be called: it was replaced, or it has a hook. Else
    None."""
    name = type(module).__name__
    if "forward" in vars(module) or not _defined_with(type(module)):
        return f"the forward of {name} was replaced"
    return f"{name} has a hook" if hooked(module) else None


def _defined_with(kind: Any) -> bool:
    """Tell if a class's forward comes from the library that the class comes from."""
    return kind.forward.__module__.partition(".")[0] == kind.__module__.partition(".")[0]


def hooked(module: nn.Module) -> bool:
    """Tell if a hook listens to a module's call. transformers' own hooks, which stay once installed, are ignored unless
    outputs are requested."""
    before, after = module._forward_pre_hooks, module._forward_hooks
    return bool(before) or any(_listens(hook) for hook in after.values())


def _listens(hook: object) -> bool:
    return getattr(hook, "__module__", None) != "transformers.utils.output_capturing"


def head_unknown(model: nn.Module) -> str | None:
    """Tell why a model's logits may be more than its head's product with the decoder's last hidden state."""
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        return "a hook listens to all modules"
    return unknown(model, "causal")


def model_unknown(model: Any, cache: Any) -> str | None:
    """Tell why a model with its filled cache is not one that gemq's own steps can run a token through."""
    if reason := head_unknown(model) or unknown(decoder := model.get_decoder(), "decoder"):
        return reason
    if reason := next(_layers_unknown(decoder), None) or _cache_unknown(cache, len(decoder.layers)):
        return reason
    rotary = decoder.rotary_emb
    if reason := unknown(rotary, "rotary") or unknown(decoder.norm, "norm"):
        return reason
    if rotary.rope_type not in _FIXED_ROTARY:
        return f"rotary embeddings of type {rotary.rope_type!r} change with the length"
    return _switch(model.config.get_text_config(), cache.layers[0].max_cache_len)


def _layers_unknown(decoder: Any) -> Iterator[str]:
    for layer in decoder.layers:
        attention = layer.self_attn if hasattr(layer, "self_attn") else None
        kind = "latent" if type(attention).__name__ in _NAMES["latent"] else "grouped"
        found = unknown(layer, "layer") or unknown(attention, kind)
        norms = (layer.input_layernorm, layer.post_attention_layernorm, *_own_norms(attention)) if not found else ()
        yield from filter(None, (found, *(unknown(norm, "norm") for norm in norms)))


def _own_norms(attention: Any) -> list[nn.Module]:
    names = ("q_norm", "k_norm", "q_a_layernorm", "kv_a_layernorm")
    return [norm for name in names if (norm := getattr(attention, name, None)) is not None]


def _switch(config: Any, limit: int) -> str | None:
    """Tell which field of a config changes what attention over ``limit`` tokens attends to or computes."""
    types, window = getattr(config, "layer_types", None) or (), getattr(config, "sliding_window", None)
    narrow = window is not None and window < limit
    windowed = ("sliding_attention",) if window and not narrow else ()
    if other := [kind for kind in types if kind not in ("full_attention", *windowed)]:
        return f"layer_types has {other[0]!r}"
    if narrow and config.model_type not in _BY_LAYER:
        return f"attention has a sliding window of {window}"
    if getattr(config, "clip_qkv", None) is not None:
        return "clip_qkv is set"
    if not getattr(config, "rope_interleave", True):
        return "rope_interleave is off"
    implementation = getattr(config, "_attn_implementation", None)
    return None if implementation in _ATTENTIONS else f"the attention implementation is {implementation!r}"


def _cache_unknown(cache: Any, layers: int) -> str | None:
    """Tell why a cache is not ``layers`` buffers that hold every token at its place."""
    from transformers.cache_utils import StaticLayer

    if len(cache.layers) < layers:
        return f"the cache has {len(cache.layers)} layers, the model {layers}"
    if any(getattr(layer, "is_sliding", False) for layer in cache.layers):
        return "attention sees a sliding window only"
    other = next((layer for layer in cache.layers if type(layer) is not StaticLayer), None)
    return None if other is None else f"the cache has a {type(other).__name__}"


def sees_windows(config: Any) -> bool:
    """Tell if the family's forward masks tokens outside a window. A prompt can then be given in chunks."""
    config = config.get_text_config()
    # transformers' cache keeps everything for a window of 1
    return config.model_type in _WINDOWED and (getattr(config, "sliding_window", None) or 2) > 1
