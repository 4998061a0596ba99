"""One decoding step: the newest tokens in, logits of the next ones out, over a static cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemq.generation import known
from gemq.generation.attention import (
    GroupedAttention,
    LatentAttention,
    Place,
    attention_unfit,
    is_latent,
    rms_norm,
    rotary_tables,
)
from gemq.models.forward import call, decoder_of


@dataclass
class Progress:
    """Position of a batch, in tensors of fixed address that a step moves on.

    ``slot`` int64 ``[1]`` is the cache index of the newest token, ``positions`` int64 ``[B]`` its position in each
    row's own text, ``seen`` bool ``[B, L]`` the cached tokens that are no padding (None without padding).
    ``length`` counts the cached tokens, the newest included, on the host.
    """

    slot: Tensor
    positions: Tensor
    seen: Tensor | None
    length: int

    def advance(self) -> None:
        """Advance to the next token."""
        self.slot.add_(1)
        self.positions.add_(1)
        self.length += 1


class LeanStep:
    """Decoding step that runs the decoder's layers without what one token does not need: no mask building and no
    argument capture. Rotary tables are made once, and attention is that of :mod:`gemq.generation.attention`. MoE
    blocks, projections and weights are the model's own."""

    def __init__(self, model: Any, cache: Any, limit: int, dynamic: bool):
        decoder = decoder_of(model)
        self.embed, self.final, self.head = decoder.embed_tokens, decoder.norm, model.lm_head
        self.dynamic = dynamic
        self.rotary = rotary_tables(decoder, limit, self.embed.weight.dtype)
        self.layers = [
            (layer.input_layernorm, _attention(layer.self_attn, state), layer.post_attention_layernorm, layer.mlp)
            for layer, state in zip(decoder.layers, cache.layers, strict=False)
        ]
        self.columns = torch.arange(limit, device=self.embed.weight.device)

    @staticmethod
    def unfit(model: Any, cache: Any) -> str | None:
        """Tell why the model or its filled cache is not of a form that is known here; None if they are."""
        if reason := known.model_unknown(model, cache):
            return reason
        pairs = zip(decoder_of(model).layers, cache.layers, strict=False)
        found = (attention_unfit(layer.self_attn, state.keys, state.values) for layer, state in pairs)
        return next(filter(None, found), None)

    def __call__(self, tokens: Tensor, progress: Progress) -> Tensor:
        """Logits ``[B, V]`` after ``tokens`` int64 ``[B]``."""
        cosines, sines = self.rotary
        rotary = cosines[progress.positions][:, None], sines[progress.positions][:, None]
        place = self._place(progress)
        x = self.embed(tokens[:, None])
        for before, attention, after, mlp in self.layers:
            x = x + attention(rms_norm(x, before), rotary, place)
            x = x + mlp(rms_norm(x, after))
        return self.head(rms_norm(x, self.final))[:, 0]

    def _place(self, progress: Progress) -> Place:
        seen = progress.seen
        if self.dynamic:
            end = progress.length
            return Place(progress.slot, end, None if seen is None else self._added(seen[:, :end]))
        visible = (self.columns <= progress.slot)[None]
        return Place(progress.slot, None, self._added(visible if seen is None else visible & seen))

    def _added(self, visible: Tensor) -> Tensor:
        """Convert the mask to numbers once a step: attention would convert a bool mask in every layer."""
        return torch.where(visible, 0.0, -torch.inf).to(self.embed.weight.dtype)[:, None, None]


def _attention(module: Any, state: Any) -> GroupedAttention | LatentAttention:
    return (LatentAttention if is_latent(module) else GroupedAttention)(module, state.keys, state.values)


class ModelStep:
    """transformers' own forward, for models that :class:`LeanStep` does not know."""

    def __init__(self, model: nn.Module, cache: Any, limit: int):
        self.model, self.cache, self.limit = model, cache, limit

    def __call__(self, tokens: Tensor, progress: Progress) -> Tensor:
        """Logits ``[B, V]`` after ``tokens`` int64 ``[B]``."""
        mask = None if progress.seen is None else progress.seen[:, : progress.length].long()
        out = call(
            self.model, input_ids=tokens[:, None], attention_mask=mask, position_ids=progress.positions[:, None],
            past_key_values=self.cache, use_cache=True,
        )
        return out.logits[:, -1]
