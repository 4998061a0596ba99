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

from gemq.generation.states import cache_unknown
from gemq.models.forward import decoder_of

_STEMS = (
    "Mixtral", "Qwen2Moe", "Qwen3Moe", "Olmoe", "Glm4Moe", "Dots1", "GptOss", "Qwen3Next", "Qwen3_5Moe", "NemotronH",
    "DeepseekV2", "DeepseekV3", "Glm4MoeLite",
)
# the query's projection has a gate beside each head
GATED = ("Qwen3NextAttention", "Qwen3_5MoeAttention")
# rotary modules that give one half of their tables
HALF_TABLES = ("GptOssRotaryEmbedding",)
_GROUPED = (*(f"{stem}Attention" for stem in _STEMS[:10]), "Gemma4TextAttention")
_LATENT = tuple(f"{stem}Attention" for stem in _STEMS[10:])
_BLOCKS = (
    "MixtralSparseMoeBlock", "Qwen2MoeSparseMoeBlock", "Qwen3MoeSparseMoeBlock", "OlmoeSparseMoeBlock", "Glm4MoeMoE",
    "Dots1MoE", "DeepseekV2Moe", "DeepseekV3MoE", "GptOssMLP", "Qwen3NextSparseMoeBlock", "Qwen3_5MoeSparseMoeBlock",
    "NemotronHMoE", "Glm4MoeLiteMoE",
)


def _of_stems(suffix: str, *more: str) -> frozenset[str]:
    return frozenset((*(f"{stem}{suffix}" for stem in _STEMS), *more))


_NAMES = {
    "causal": _of_stems(
        "ForCausalLM", "Gemma4ForCausalLM", "Gemma4ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"
    ),
    "decoder": _of_stems("Model", "Gemma4TextModel", "Qwen3_5MoeTextModel"),
    "layer": _of_stems("DecoderLayer", "NemotronHBlock"), "sandwich": frozenset(("Gemma4TextDecoderLayer",)),
    "norm": _of_stems("RMSNorm", "Gemma4RMSNorm"),
    "gated norm": frozenset((
        "Qwen3NextRMSNormGated", "Qwen3_5MoeRMSNormGated", "NemotronHRMSNormGated", "Zamba2RMSNormGated",
    )),
    "rotary": _of_stems("RotaryEmbedding", "Gemma4TextRotaryEmbedding", "Qwen3_5MoeTextRotaryEmbedding"),
    "grouped": frozenset(_GROUPED), "latent": frozenset(_LATENT),
    "delta": frozenset(("Qwen3NextGatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")),
    "mamba": frozenset(("NemotronHMamba2Mixer",)),
    "block": frozenset(_BLOCKS), "mlp": _of_stems("MLP", "Gemma4TextMLP"), "router": frozenset(("Gemma4TextRouter",)),
}
_MIXERS = ("grouped", "latent", "delta", "mamba")
_FIXED_ROTARY = ("default", "linear", "llama3", "yarn", "proportional")
# the same function of queries, keys and values; others may be anything, also what a user registered
_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
# models whose layer types, not the window, decide which tokens a layer attends to
_BY_LAYER = ("qwen2_moe", "dots1", "nemotron_h")
# models whose windows are known here: a layer's cache says which it has
_IN_TURN = ("gpt_oss", "gemma4_text")
# kinds of layers beside attention
_STATEFUL = ("linear_attention", "moe", "mlp")
_WINDOWED = (*_BY_LAYER, *_IN_TURN, "mixtral", "qwen3_moe")


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
    if reason := head_unknown(model) or unknown(decoder := decoder_of(model), "decoder"):
        return reason
    if reason := next(_layers_unknown(decoder), None) or cache_unknown(cache, len(decoder.layers)):
        return reason
    norm, rotary = final_norm(decoder), getattr(decoder, "rotary_emb", None)
    if reason := (rotary and unknown(rotary, "rotary")) or unknown(norm, "norm"):
        return reason
    types = getattr(rotary, "rope_type", "default")
    changing = [t for t in (types.values() if isinstance(types, dict) else [types]) if t not in _FIXED_ROTARY]
    if changing:
        return f"rotary embeddings of type {changing[0]!r} change with the length"
    return _switch(model.config.get_text_config(), cache)


def final_norm(decoder: Any) -> Any:
    """The norm before the head."""
    return decoder.norm_f if hasattr(decoder, "norm_f") else decoder.norm


def softcap(model: Any) -> float | None:
    """The bound that a model's logits are brought under by a tangent, None for most."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def kind_of(mixer: Any) -> str | None:
    """The kind of a compared mixer class: "grouped", "latent", "delta" or "mamba"; None for any other module."""
    return next((kind for kind in _MIXERS if type(mixer).__name__ in _NAMES[kind]), None)


def mixer_of(layer: Any) -> Any:
    """A layer's attention, linear attention or Mamba; None for a layer of Nemotron-H that has none."""
    for name in ("self_attn", "linear_attn", "mixer"):
        found = getattr(layer, name, None)
        if found is not None:
            return found if name != "mixer" or kind_of(found) else None
    return None


def feed_of(layer: Any) -> Any:
    """A layer's MoE block or MLP; None for a layer of Nemotron-H that has none."""
    if hasattr(layer, "mixer"):
        return None if kind_of(layer.mixer) else layer.mixer
    return layer.mlp


def is_sandwich(layer: Any) -> bool:
    """Tell layers with a norm before and behind everything (Gemma 4) from those with one before."""
    return type(layer).__name__ in _NAMES["sandwich"]


def layer_norms(layer: Any) -> tuple[Any, ...]:
    """The norms of a layer's own."""
    if hasattr(layer, "mixer"):
        return (layer.norm,)
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    if not is_sandwich(layer):
        return norms
    more = ("pre_feedforward_layernorm", "post_feedforward_layernorm", "pre_feedforward_layernorm_2",
            "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")
    return (*norms, *(norm for name in more if (norm := getattr(layer, name, None)) is not None))


def _layers_unknown(decoder: Any) -> Iterator[str]:
    for layer in decoder.layers:
        mixer = mixer_of(layer)
        found = unknown(layer, "sandwich" if is_sandwich(layer) else "layer")
        if not found and (mixer is not None or feed_of(layer) is None):
            found = unknown(mixer, kind_of(mixer) or "grouped")
        if found:
            yield found
            continue
        yield from filter(None, (unknown(norm, "norm") for norm in (*layer_norms(layer), *_own_norms(mixer))))
        if kind_of(mixer) in ("delta", "mamba"):
            yield from filter(None, (unknown(mixer.norm, "gated norm"), edited(mixer.conv1d), _activation(mixer)))
        if is_sandwich(layer):
            yield from filter(None, (_sandwich_unknown(layer),))


def _activation(mixer: Any) -> str | None:
    return None if mixer.activation in ("silu", "swish") else f"the convolution's activation is {mixer.activation!r}"


def _sandwich_unknown(layer: Any) -> str | None:
    if layer.hidden_size_per_layer_input:
        return "each layer takes an embedding of every token besides"
    if layer.self_attn.is_kv_shared_layer:
        return "layers share their keys and values"
    if not layer.self_attn.is_causal:
        return "attention sees both ways"
    return (unknown(layer.router, "router") or unknown(layer.router.norm, "norm")) if layer.enable_moe_block else None


def _own_norms(attention: Any) -> list[nn.Module]:
    names = ("q_norm", "k_norm", "v_norm", "q_a_layernorm", "kv_a_layernorm")
    return [norm for name in names if (norm := getattr(attention, name, None)) is not None]


def _switch(config: Any, cache: Any) -> str | None:
    """Tell which field of a config changes what attention over a cache attends to or computes."""
    types, window = getattr(config, "layer_types", None) or (), getattr(config, "sliding_window", None)
    limit = max((getattr(layer, "max_cache_len", 0) for layer in cache.layers), default=0)
    in_turn = config.model_type in _IN_TURN
    narrow = window is not None and window < limit
    windowed = ("sliding_attention",) if in_turn or (window and not narrow) else ()
    if other := [kind for kind in types if kind not in ("full_attention", *_STATEFUL, *windowed)]:
        return f"layer_types has {other[0]!r}"
    if any(getattr(layer, "is_sliding", False) for layer in cache.layers) and not in_turn:
        return f"attention has a sliding window of {window}"
    if narrow and config.model_type not in _BY_LAYER and not in_turn:
        return f"attention has a sliding window of {window}"
    if getattr(config, "clip_qkv", None) is not None:
        return "clip_qkv is set"
    if not getattr(config, "rope_interleave", True):
        return "rope_interleave is off"
    implementation = getattr(config, "_attn_implementation", None)
    return None if implementation in _ATTENTIONS else f"the attention implementation is {implementation!r}"


def sees_windows(config: Any) -> bool:
    """Tell if the family's forward masks tokens outside a window. A prompt can then be given in chunks."""
    config = config.get_text_config()
    # transformers' cache keeps everything for a window of 1
    return config.model_type in _WINDOWED and (getattr(config, "sliding_window", None) or 2) > 1
