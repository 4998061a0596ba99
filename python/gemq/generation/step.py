"""One decoding step: the newest tokens in, logits of the next ones out, over states of fixed address."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemq.generation import known
from gemq.generation.attention import Place, attention_unfit, rotary_tables
from gemq.generation.layers import lean_layer
from gemq.generation.norms import rms_norm
from gemq.generation.states import KeyValues, State
from gemq.models.ends import embedding_device, embedding_dtype
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

    def starts(self) -> Tensor:
        """First token of each row that is no padding, int64 ``[B]``; padding is on the left."""
        return torch.zeros_like(self.positions) if self.seen is None else (~self.seen).sum(1)

    def advance(self) -> None:
        """Advance to the next token."""
        self.slot.add_(1)
        self.positions.add_(1)
        self.length += 1


class LeanStep:
    """Decoding step that runs the decoder's layers without what one token does not need: no mask building and no
    argument capture. Rotary tables are made once, and attention and recurrent layers are those of
    :mod:`gemq.generation.attention` and :mod:`gemq.generation.recurrent`. MoE blocks, projections and weights are the
    model's own."""

    def __init__(self, model: Any, states: list[State], limit: int, dynamic: bool):
        decoder = decoder_of(model)
        self.embed, self.head = model.get_input_embeddings(), model.get_output_embeddings()
        self.final, self.cap = known.final_norm(decoder), known.softcap(model)
        self.dynamic, self.dtype = dynamic, embedding_dtype(decoder)
        self.rotary = rotary_tables(decoder, limit, self.dtype)
        self.layers = [lean_layer(layer, state) for layer, state in zip(decoder.layers, states, strict=False)]
        held = [state for state in states if isinstance(state, KeyValues)]
        device = embedding_device(decoder)
        self.columns = torch.arange(max((s.keys.shape[2] for s in held if not s.window), default=1), device=device)
        self.windows = {n: torch.arange(n, device=device) for n in sorted({s.keys.shape[2] for s in held if s.window})}

    @staticmethod
    def unfit(model: Any, cache: Any) -> str | None:
        """Tell why the model or its filled cache is not of a form that is known here; None if they are."""
        if reason := known.model_unknown(model, cache):
            return reason
        pairs = zip(map(known.mixer_of, decoder_of(model).layers), cache.layers, strict=False)
        found = (
            attention_unfit(mixer, state.keys, state.values) for mixer, state in pairs
            if known.kind_of(mixer) in ("grouped", "latent")
        )
        return next(filter(None, found), None)

    def __call__(self, tokens: Tensor, progress: Progress) -> Tensor:
        """Logits ``[B, V]`` after ``tokens`` int64 ``[B]``."""
        place = self._place(progress)
        x = self.embed(tokens[:, None])
        for layer in self.layers:
            x = layer(x, place)
        return capped(self.head(rms_norm(x, self.final))[:, 0], self.cap)

    def _place(self, progress: Progress) -> Place:
        seen, positions = progress.seen, progress.positions
        rotary = {
            kind: (cosines[positions][:, None], sines[positions][:, None])
            for kind, (cosines, sines) in self.rotary.items()
        }
        windows = {
            slots: ((positions % slots)[:, None, None, None], self._added(columns <= positions[:, None]))
            for slots, columns in self.windows.items()
        }
        if self.dynamic:
            end = progress.length
            return Place(progress.slot, end, None if seen is None else self._added(seen[:, :end]), rotary, windows)
        visible = (self.columns <= progress.slot)[None]
        mask = self._added(visible if seen is None else visible & seen[:, : len(self.columns)])
        return Place(progress.slot, None, mask, rotary, windows)

    def _added(self, visible: Tensor) -> Tensor:
        """Convert the mask to numbers once a step: attention would convert a bool mask in every layer."""
        return torch.where(visible, 0.0, -torch.inf).to(self.dtype)[:, None, None]


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Logits brought under ``cap`` by a tangent, where there is one."""
    return logits if cap is None else torch.tanh(logits / cap) * cap


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
