"""Tensors of fixed address that a decoding step reads and moves on, a decoder layer each, from a filled cache of
transformers.

Keys and values of whole texts stay in the cache's own buffers. A layer that attends to a window gets a buffer of that
many slots, in which the token at position ``p`` of a row's own text is in slot ``p % slots``: a row's padding is not in
it, and the oldest token makes room for the newest. Linear attention and Mamba keep the cache's two states.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class KeyValues(NamedTuple):
    """``keys`` and ``values [B, groups, slots, dim]`` of an attention, by slot or, with ``window``, in turn."""

    keys: Tensor
    values: Tensor
    window: bool = False


class Recurrent(NamedTuple):
    """``conv [B, channels, taps]``, the newest inputs of a convolution, and ``state [B, heads, ...]``."""

    conv: Tensor
    state: Tensor


class Numbers(NamedTuple):
    """States of linear attention or Mamba as a compiled step moves them on, both float32: ``past [B, taps - 1,
    channels]`` and ``state``."""

    past: Tensor
    state: Tensor


State = KeyValues | Recurrent | Numbers | None


def numbers(state: Recurrent | Numbers) -> Numbers:
    """A recurrent state as float32 numbers, by a copy where it is not."""
    if isinstance(state, Numbers):
        return state
    return Numbers(state.conv[:, :, 1:].transpose(1, 2).float().contiguous(), state.state.float().contiguous())


def cache_unknown(cache: Any, layers: int) -> str | None:
    """Tell why a filled cache is not one that :func:`fixed_states` takes ``layers`` states from; None if it is."""
    from transformers import cache_utils

    known = [
        cache_utils.StaticLayer, cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer,
        cache_utils.LinearAttentionLayer, getattr(cache_utils, "DummyLayer", None),
    ]
    if len(cache.layers) < layers:
        return f"the cache has {len(cache.layers)} layers, the model {layers}"
    other = next((layer for layer in cache.layers if type(layer) not in known), None)
    return None if other is None else f"the cache has a {type(other).__name__}"


def _is_window(layer: Any) -> bool:
    return bool(getattr(layer, "is_sliding", False))


def fixed_states(cache: Any, limit: int, starts: Tensor) -> list[State]:
    """Return a state for each layer of a filled cache, for texts of up to ``limit`` tokens with padding.

    ``starts`` int64 ``[B]`` is each row's first token that is no padding. Growing buffers are given up layer by layer.
    """
    return [_state(layer, limit, starts) for layer in cache.layers]


def _state(layer: Any, limit: int, starts: Tensor) -> State:
    from transformers import cache_utils

    if isinstance(layer, cache_utils.LinearAttentionLayer):
        return recurrent_of(layer)
    if not isinstance(layer, (cache_utils.StaticLayer, cache_utils.DynamicLayer)):
        return None
    keys, values, length = layer.keys, layer.values, int(layer.get_seq_length())
    if _is_window(layer):
        slots = layer.sliding_window
        found = KeyValues(_in_turn(keys, slots, length, starts), _in_turn(values, slots, length, starts), True)
    elif isinstance(layer, cache_utils.DynamicLayer):
        found = KeyValues(_grown(keys, limit), _grown(values, limit))
    else:
        return KeyValues(keys, values)
    layer.keys = layer.values = None
    return found


def recurrent_of(layer: Any) -> Recurrent | None:
    """The states in a layer of a cache; None where nothing was written, as of layers that have no mixer."""
    conv, state = layer.conv_states[0], layer.recurrent_states[0]
    return None if conv is None or state is None else Recurrent(conv, state)


def _grown(buffer: Tensor, limit: int) -> Tensor:
    batch, groups, length, dim = buffer.shape
    out = buffer.new_zeros(batch, groups, limit, dim)
    out[:, :, :length] = buffer
    return out


def _in_turn(newest: Tensor, slots: int, length: int, starts: Tensor) -> Tensor:
    """A window's buffer, from the ``newest`` tokens of texts of ``length`` tokens."""
    batch, groups, _, dim = newest.shape
    out = newest.new_zeros(batch, groups, slots, dim)
    for row, start in enumerate(starts.tolist()):
        own = length - start
        newest_in_turn(out[row], newest[row, :, -min(own, newest.shape[2]) :], own)
    return out


def newest_in_turn(slots: Tensor, newest: Tensor, length: int) -> None:
    """Write the ``newest [groups, count, dim]`` tokens of a text of ``length`` tokens into ``slots [groups, n, dim]``:
    the token at position ``p`` into slot ``p % n``."""
    count = min(newest.shape[1], slots.shape[1])
    places = torch.arange(length - count, length, device=newest.device) % slots.shape[1]
    slots[:, places] = newest[:, newest.shape[1] - count :].to(slots.dtype)
