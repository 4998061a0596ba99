"""Rows of a batch that come and go: each at a place of its own in buffers of fixed address, decoded together.

The rows in use are the first ones. A row that leaves is filled by the last, so a step for ``n`` rows reads the first
``n`` rows of every buffer. Steps for each ``n`` are made when they are first needed, and share the buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from gemq.errors import UnsupportedModelError
from gemq.generation.memory import check_cache_fits
from gemq.generation.native import NativeStep
from gemq.generation.states import KeyValues, Numbers, Recurrent, State, newest_in_turn, numbers, recurrent_of
from gemq.generation.step import LeanStep, Progress
from gemq.models.forward import call, decoder_of


def empty_cache(model: Any) -> Any:
    """A growing cache for one prompt."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def feed(model: Any, tokens: list[int], start: int, cache: Any) -> Tensor:
    """Run tokens at positions from ``start`` through the decoder; returns the last hidden state ``[1, H]``."""
    device = model.get_input_embeddings().weight.device
    positions = torch.arange(start, start + len(tokens), device=device)[None]
    ids = torch.tensor([tokens], device=device)
    out = call(decoder_of(model), input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    return out.last_hidden_state[:, -1]


class Rows:
    """Buffers for ``rows`` texts of up to ``slots`` tokens each, and the steps over them.

    ``kind`` is "native" or "lean", ``reason`` why it is not native. Raises :class:`UnsupportedModelError` for a model
    whose step is transformers', and :class:`gemq.OutOfMemoryError` if the buffers take more than is free.
    """

    def __init__(self, model: Any, rows: int, slots: int):
        self.model, self.rows, self.slots = model, rows, slots
        self.device = model.get_input_embeddings().weight.device
        cache = empty_cache(model)
        feed(model, [0], 0, cache)
        self.kind, self.reason = _kind(model, cache, rows)
        check_cache_fits(model, rows, slots, self.device)
        self.states = [self._state(layer) for layer in cache.layers]
        self._steps: dict[int, Callable[[Tensor, Progress], Tensor]] = {}
        self._kept: dict[Any, Any] = {}

    def _state(self, layer: Any) -> State:
        """Zeros for all rows, in the form of a layer's cache of one."""
        if hasattr(layer, "recurrent_states"):
            one = recurrent_of(layer)
            if one is None:
                return None
            parts = numbers(one) if self.kind == "native" else one
            return type(parts)(*(part.new_zeros(self.rows, *part.shape[1:]) for part in parts))
        if getattr(layer, "keys", None) is None:
            return None
        slots = min(self.slots, layer.sliding_window) if getattr(layer, "is_sliding", False) else self.slots
        keys, values = (
            part.new_zeros(self.rows, part.shape[1], slots, part.shape[3]) for part in (layer.keys, layer.values)
        )
        return KeyValues(keys, values, True)

    def fill(self, row: int, cache: Any) -> None:
        """Copy the filled cache of one text into a row."""
        for state, layer in zip(self.states, cache.layers, strict=True):
            if isinstance(state, KeyValues):
                length = int(layer.get_seq_length())
                newest_in_turn(state.keys[row], layer.keys[0], length)
                newest_in_turn(state.values[row], layer.values[0], length)
            elif state is not None:
                one = cast(Recurrent, recurrent_of(layer))
                for held, new in zip(state, numbers(one) if isinstance(state, Numbers) else one, strict=True):
                    held[row] = new[0]

    def move(self, source: int, row: int, length: int) -> None:
        """Copy a row of ``length`` tokens over another."""
        for state in self.states:
            if isinstance(state, KeyValues):
                for held in (state.keys, state.values):
                    held[row, :, :length] = held[source, :, :length]
            elif state is not None:
                for held in state:
                    held[row] = held[source]

    def step(self, tokens: list[int], positions: list[int]) -> Tensor:
        """Logits float32 ``[n, V]`` after the newest tokens of the first ``n`` rows, at their positions; the next call
        may overwrite them."""
        count = len(tokens)
        if count not in self._steps:
            self._steps[count] = self._made(count)
        places = torch.tensor(positions, device=self.device)
        progress = Progress(torch.zeros(1, dtype=torch.int64, device=self.device), places, None, 1)
        return self._steps[count](torch.tensor(tokens, device=self.device), progress).float()

    def _made(self, count: int) -> Callable[[Tensor, Progress], Tensor]:
        states = [None if state is None else _first(state, count) for state in self.states]
        if self.kind == "native":
            return NativeStep(self.model, states, self.slots, count, self._kept)
        return LeanStep(self.model, states, self.slots, dynamic=True)


def _first(state: Any, count: int) -> Any:
    """The first rows of a state."""
    parts = [part[:count] for part in state[:2]]
    return type(state)(*parts, *state[2:])


def _kind(model: Any, cache: Any, rows: int) -> tuple[str, str | None]:
    if reason := LeanStep.unfit(model, cache):
        raise UnsupportedModelError(
            f"gemq serve decodes rows of their own length, which this model's step does not ({reason}); use vLLM or "
            f"SGLang with gemq's plug-in, or gemq generate"
        )
    if model.get_input_embeddings().weight.device.type != "cpu":
        return "lean", "the model is not on the CPU"
    native = NativeStep.unfit(model, cache, rows)
    return ("lean", native) if native else ("native", None)
