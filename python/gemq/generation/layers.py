"""Decoder layers of one new token, as functions from ``x [B, 1, H]`` and a :class:`Place` to the next ``x``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from gemq.generation import known
from gemq.generation.attention import GroupedAttention, LatentAttention, Place
from gemq.generation.norms import rms_norm
from gemq.generation.recurrent import DeltaNet, Mamba
from gemq.generation.states import State

_MIXERS: dict[str, Any] = {"grouped": GroupedAttention, "latent": LatentAttention, "delta": DeltaNet, "mamba": Mamba}


def lean_layer(layer: Any, state: State) -> Callable[[Tensor, Place], Tensor]:
    """The function of a decoder layer that :mod:`gemq.generation.known` knows, over its state."""
    module = known.mixer_of(layer)
    mixer = None if module is None else _MIXERS[cast(str, known.kind_of(module))](module, state)
    return (_Sandwich if known.is_sandwich(layer) else _PreNorm)(layer, mixer)


class _PreNorm:
    """A norm before the mixer, and one before what follows; Nemotron-H's layers have one of the two."""

    def __init__(self, layer: Any, mixer: Any):
        self.mixer, self.feed = mixer, known.feed_of(layer)
        norms = known.layer_norms(layer)
        self.before, self.after = norms[0], norms[-1]

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        if self.mixer is not None:
            x = x + self.mixer(rms_norm(x, self.before), place)
        if self.feed is None:
            return x
        found = self.feed(rms_norm(x, self.after))
        # gpt-oss gives its routing besides
        return x + (found[0] if isinstance(found, tuple) else found)


class _Sandwich:
    """Gemma 4: norms before and behind, experts beside a dense MLP, and a factor of the layer."""

    def __init__(self, layer: Any, mixer: Any):
        self.layer, self.mixer = layer, mixer

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        layer = self.layer
        x = x + rms_norm(self.mixer(rms_norm(x, layer.input_layernorm), place), layer.post_attention_layernorm)
        y = layer.mlp(rms_norm(x, layer.pre_feedforward_layernorm))
        if layer.enable_moe_block:
            flat = x.flatten(0, 1)
            _, weights, ids = layer.router(flat)
            experts = layer.experts(rms_norm(flat, layer.pre_feedforward_layernorm_2), ids, weights)
            experts = rms_norm(experts.view(x.shape), layer.post_feedforward_layernorm_2)
            y = rms_norm(y, layer.post_feedforward_layernorm_1) + experts
        x = x + rms_norm(y, layer.post_feedforward_layernorm)
        return (x * layer.layer_scalar).to(x.dtype)
