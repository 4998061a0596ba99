"""Measure how far the routers moved, with one layer of the model at a time in memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor

from gemq.algorithms.layerwise import Routed, capture_layer_calls, run_layer, watch_experts
from gemq.algorithms.router_shift import WINDOWS, LayerShift, shift_of
from gemq.engine.layers import Weights
from gemq.engine.source import OUTSIDE
from gemq.engine.stages import Quantized


@torch.no_grad()
def walk_routers(
    weights: Weights, windows: Tensor, done: Callable[[int], None] = lambda layers: None
) -> dict[int, tuple[Tensor, Tensor]]:
    """Collect by decoder layer the router's weight ``[E, H]`` and the experts ``[tokens, k]`` it selects, on the CPU.

    One sweep over the first windows of int64 ``[N, T]``, one window at a time. ``done`` is called with the number of
    finished layers.
    """
    moe = weights.source.moe
    by_index = {layer.index: layer for layer in moe.moe}
    found = {}
    with weights.loaded(OUTSIDE):
        calls = capture_layer_calls(moe, list(windows[:WINDOWS].split(1)))
    hidden = calls.hidden
    for index, module in enumerate(moe.layers):
        seen: list[Tensor] = []
        with weights.loaded(index):
            with ExitStack() as stack:
                if index in by_index:
                    stack.enter_context(watch_experts(by_index[index], partial(_keep, seen)))
                hidden = [run_layer(module, h, kw[index]) for h, kw in zip(hidden, calls.kwargs, strict=True)]
            if index in by_index:
                found[index] = by_index[index].router.weight.detach().float().cpu().clone(), torch.cat(seen)
        done(index + 1)
    return found


def _keep(seen: list[Tensor], routed: Routed, output: Tensor) -> None:
    seen.append(routed.ids.short().cpu())


def router_shift(
    quantized: Quantized, routers: dict[int, Tensor], windows: Tensor, before: dict[int, tuple[Tensor, Tensor]],
    done: Callable[[int], None] = lambda layers: None,
) -> dict[int, LayerShift]:
    """The shift of a quantized model with ``routers`` in it against what :func:`walk_routers` gave ``before``."""
    after = walk_routers(Weights(quantized.source, quantized.record, routers), windows, done)
    return {index: shift_of(before[index], after[index]) for index in after}
