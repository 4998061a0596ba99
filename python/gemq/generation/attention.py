"""Attention of one new token over a static cache, from the projections of transformers' own modules.

The same arithmetic as the modules' ``forward``, with what a single token does not need left out: mask building,
repeated key and value heads, and for latent attention (MLA) the expansion of the whole cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gemq.generation.known import GATED, HALF_TABLES, edited
from gemq.generation.norms import rms_norm
from gemq.generation.states import KeyValues
from gemq.models.ends import embedding_device
from gemq.nn import LowBitLinear


class Place(NamedTuple):
    """Position of the new token in the cache, and the mask of what it attends to.

    ``slot`` int64 ``[1]`` is its index in the cache. ``end`` is a Python number, the length of the cache that is read,
    or None for all of it. ``mask`` ``[B or 1, 1, 1, end]`` is added to the scores, 0 or minus infinity, in the dtype of
    the keys; None where every slot up to ``end`` is seen. ``windows`` maps the slots of a window to the slot of the new
    token ``[B, 1, 1, 1]`` and the mask ``[B, 1, 1, slots]`` of a layer with that window. ``rotary`` maps a kind of
    layer to ``(cos, signed sin)``, each ``[B, 1, D]``.
    """

    slot: Tensor
    end: int | None
    mask: Tensor | None
    rotary: dict[str | None, tuple[Tensor, Tensor]]
    windows: dict[int, tuple[Tensor, Tensor]]


def _store(buffer: Tensor, place: Place, new: Tensor) -> Tensor:
    """Write ``new [B, heads, D]`` at the slot and return the cache entries to read."""
    if place.end is None:
        buffer.index_copy_(2, place.slot, new[:, :, None].to(buffer.dtype))
        return buffer
    buffer[:, :, place.end - 1] = new
    return buffer[:, :, : place.end]


def attention_unfit(module: nn.Module, keys: Tensor, values: Tensor) -> str | None:
    """Reason for which attention of a compared class (:mod:`gemq.generation.known`) does not run on a cache of these
    tensors; None if it does."""
    return (LatentAttention if is_latent(module) else GroupedAttention).unfit(module, keys, values)


def is_latent(module: nn.Module) -> bool:
    """Tell latent attention (MLA) from grouped heads."""
    return hasattr(module, "kv_lora_rank")


class GroupedAttention:
    """Grouped heads, with what families have of: rotary halves (of the whole head or, with GLM4-MoE, its first part),
    norms of query and key (over a head or, with OLMoE, over all heads) and of values (Gemma 4, whose values may be the
    keys), gates beside the queries (Qwen3-Next, Qwen3.5), sinks (gpt-oss) and windows."""

    def __init__(self, module: Any, state: KeyValues):
        self.module, (self.keys, self.values, self.window) = module, state
        self.head_dim, self.groups, self.scale = module.head_dim, state.keys.shape[1], module.scaling
        self.q_norm: Any = getattr(module, "q_norm", None)
        self.k_norm: Any = getattr(module, "k_norm", None)
        self.v_norm: Any = getattr(module, "v_norm", None)
        self.norm_all = self.q_norm is not None and self.q_norm.weight.shape != (self.head_dim,)
        self.gated = has_gates(module)
        self.sinks: Tensor | None = getattr(module, "sinks", None)
        self.kind: str | None = getattr(module, "layer_type", None)

    @staticmethod
    def unfit(module: Any, keys: Tensor, values: Tensor) -> str | None:
        """Tell why this is not the attention that ``module`` computes on a cache of these tensors; None if it is."""
        if module.q_proj.out_features != (2 if has_gates(module) else 1) * module.o_proj.in_features:
            return "the query's projection is wider than the heads"
        fits = keys.shape == values.shape and keys.shape[-1] == module.head_dim
        return None if fits else f"the cache holds keys {list(keys.shape)} and values {list(values.shape)}"

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        """``[B, 1, H] -> [B, 1, H]``."""
        module, batch, size = self.module, x.shape[0], self.head_dim
        query, key, gate = module.q_proj(x), module.k_proj(x), None
        value = key if getattr(module, "v_proj", None) is None else module.v_proj(x)
        if self.norm_all:
            query, key = rms_norm(query, self.q_norm), rms_norm(key, self.k_norm)
        if self.gated:
            query, gate = query.view(batch, -1, 2 * size).chunk(2, -1)
        query, key = query.reshape(batch, -1, size), key.view(batch, self.groups, size)
        value = value.view(batch, self.groups, size)
        if self.q_norm is not None and not self.norm_all:
            query, key = rms_norm(query, self.q_norm), rms_norm(key, self.k_norm)
        if self.v_norm is not None:
            value = rms_norm(value, self.v_norm)
        if place.rotary:
            # query and key turn together
            turn = place.rotary[self.kind if self.kind in place.rotary else None]
            both = _rotate_halves(torch.cat((query, key), 1), *turn)
            query, key = both[:, : -self.groups], both[:, -self.groups :]
        keys, values, mask = self._cached(place, key, value)
        # the heads that share a key are rows of one query matrix, so keys are read once
        query = query.reshape(batch, self.groups, -1, size)
        mask = None if mask is None else mask.expand(batch, self.groups, query.shape[2], -1)
        if self.sinks is None:
            out = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self.scale)
        else:
            out = self._beside_sinks(query, keys, values, mask)
        out = out.reshape(batch, 1, -1)
        return module.o_proj(out if gate is None else out * gate.reshape(batch, 1, -1).sigmoid())

    def _cached(self, place: Place, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write the new entries; returns keys, values and mask of what is seen."""
        if not self.window:
            return _store(self.keys, place, key), _store(self.values, place, value), place.mask
        slot, mask = place.windows[self.keys.shape[2]]
        for buffer, new in ((self.keys, key), (self.values, value)):
            buffer.scatter_(2, slot.expand(-1, self.groups, 1, self.head_dim), new[:, :, None].to(buffer.dtype))
        return self.keys, self.values, mask

    def _beside_sinks(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        scores = query @ keys.transpose(2, 3) * self.scale
        if mask is not None:
            scores = scores + mask
        sinks = cast(Tensor, self.sinks).view(1, self.groups, -1, 1).expand(query.shape[0], -1, -1, -1)
        weights = torch.cat((scores, sinks.to(scores.dtype)), -1).softmax(-1)[..., :-1]
        return weights @ values


def has_gates(module: Any) -> bool:
    """Tell if the query's projection has a gate beside each head's query."""
    return type(module).__name__ in GATED


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``cos.shape[-1]`` dimensions; rolling by half and a signed sine are ``rotate_half``."""
    size = cos.shape[-1]
    turned, rest = (x, None) if size == x.shape[-1] else (x[..., :size], x[..., size:])
    turned = turned * cos + turned.roll(size // 2, -1) * sin
    return turned if rest is None else torch.cat((turned, rest), -1)


class LatentAttention:
    """DeepSeek-V2's and V3's attention on the compressed cache: the expansion of keys and values is folded into the
    query and the output, so a step reads ``rank + rope`` numbers a cached token instead of expanding all of them again.

    ``kv_b_proj`` is held dequantized in the model's dtype for this, ``heads * (nope + v) * rank`` elements a layer.
    """

    def __init__(self, module: Any, state: KeyValues):
        keys = state.keys
        self.module, self.latents, self.ropes = module, keys, state.values
        self.nope, self.rope, self.v_dim = module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim
        self.rank, self.scale = module.kv_lora_rank, module.scaling
        # V3 leaves neighbours that turned together half the vector apart, V2 side by side; the cache holds them so
        self.apart = hasattr(module.config, "rope_interleave")
        dense = module.kv_b_proj.weight
        dense = dense.detach() if isinstance(dense, Tensor) else dense(keys.dtype)
        expand = dense.view(-1, self.nope + self.v_dim, self.rank)
        self.into_latent = expand[:, : self.nope].contiguous()
        self.from_latent = expand[:, self.nope :].transpose(1, 2).contiguous()

    @staticmethod
    def unfit(module: Any, keys: Tensor, values: Tensor) -> str | None:
        """Tell why the cache does not hold the latents of ``module``, or they cannot be folded; None if they can."""
        expand = module.kv_b_proj
        if type(expand) not in (nn.Linear, LowBitLinear) or getattr(expand, "bias", None) is not None:
            return f"kv_b_proj is a {type(expand).__name__}" + (" with a bias" if hasattr(expand, "bias") else "")
        if reason := edited(expand):
            return reason
        ranks = (1, module.kv_lora_rank, module.qk_rope_head_dim)
        fits = (keys.shape[1], keys.shape[-1], values.shape[-1]) == ranks
        return None if fits else f"the cache holds keys {list(keys.shape)} and values {list(values.shape)}"

    def _query(self, x: Tensor) -> Tensor:
        module = self.module
        if module.q_lora_rank is None:
            return module.q_proj(x)
        return module.q_b_proj(rms_norm(module.q_a_proj(x), module.q_a_layernorm))

    def __call__(self, x: Tensor, place: Place) -> Tensor:
        """``[B, 1, H] -> [B, 1, H]``; the rotary ``(cos, sin)`` are ``[B, 1, rope / 2]``, or with V3 twice that with
        the sine's first half negated."""
        module, batch = self.module, x.shape[0]
        query = self._query(x).view(batch, -1, self.nope + self.rope)
        latent, key = module.kv_a_proj_with_mqa(x).view(batch, 1, -1).split((self.rank, self.rope), -1)
        latent = rms_norm(latent, module.kv_a_layernorm)
        both = _rotate_pairs(torch.cat((query[..., self.nope :], key), 1), *place.rotary[None], self.apart)
        latents = _store(self.latents, place, latent)[:, 0]
        ropes = _store(self.ropes, place, both[:, -1:])[:, 0]
        # [heads, B, nope] x [heads, nope, rank]
        folded = torch.bmm(query[..., : self.nope].transpose(0, 1), self.into_latent).transpose(0, 1)
        scores = torch.baddbmm(both[:, :-1] @ ropes.transpose(1, 2), folded, latents.transpose(1, 2))
        scores = scores.float() * self.scale
        if place.mask is not None:
            scores = scores + place.mask[:, 0]
        context = scores.softmax(-1).to(latents.dtype) @ latents
        out = torch.bmm(context.transpose(0, 1), self.from_latent).transpose(0, 1)
        return module.o_proj(out.reshape(batch, 1, -1))


def _rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, apart: bool) -> Tensor:
    """Rotate neighbours ``(x[2i], x[2i + 1])`` in float32, as the complex product does; ``apart`` puts the results of
    all pairs' first numbers before the second ones."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., : even.shape[-1]], sin[..., -even.shape[-1] :]
    turned = (even * cos - odd * sin, even * sin + odd * cos)
    return (torch.cat(turned, -1) if apart else torch.stack(turned, -1).flatten(-2)).to(x.dtype)


def rotary_tables(decoder: Any, length: int, dtype: torch.dtype) -> dict[str | None, tuple[Tensor, Tensor]]:
    """``(cos, signed sin)`` of positions ``0 .. length - 1``, each ``[length, D]``, from the model's own rotary module;
    by kind of layer where kinds turn differently (Gemma 4), else under None. Empty for a model that turns nothing."""
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        return {}
    kinds = getattr(rotary, "layer_types", None) or [None]
    return {kind: _tables(rotary, kind, length, dtype, embedding_device(decoder)) for kind in kinds}


def _tables(
    rotary: Any, kind: str | None, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    x = torch.empty(1, 1, dtype=dtype, device=device)
    found = rotary(x, torch.arange(length, device=device)[None], *(() if kind is None else (kind,)))
    if isinstance(found, Tensor):
        return found[0].real.contiguous(), found[0].imag.contiguous()
    cos, sin = (t[0] for t in found)
    if type(rotary).__name__ in HALF_TABLES:
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    half = sin.shape[-1] // 2
    return cos.contiguous(), torch.cat((-sin[:, :half], sin[:, half:]), -1)
