"""Compare the routers of a quantized model with the original's: their weights, and the experts they select."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gemq.algorithms.layerwise import Routed, capture_layer_calls, run_layer, watch_experts
from gemq.engine.layers import Weights
from gemq.engine.source import OUTSIDE

# windows that selections are compared on: 8 x 2048 tokens tell shares apart to a tenth of a percent
WINDOWS = 8
Routers = dict[int, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LayerShift:
    """One layer: relative change of the router's ``weights`` (Frobenius norm) and the share of ``selected`` experts
    that the original model does not select for the same token."""

    weights: float
    selected: float


def shift_of(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> LayerShift:
    """Compute the shift from a router's ``(weight [E, H], selected experts [tokens, k])`` before and after."""
    moved = float((after[0] - before[0]).norm() / before[0].norm().clamp(min=1e-30))
    same = (after[1][:, :, None] == before[1][:, None, :]).any(-1)
    return LayerShift(moved, 1.0 - float(same.float().mean()))


@torch.no_grad()
def routers_of(weights: Weights, windows: Tensor, done: Callable[[int], None] = lambda layers: None) -> Routers:
    """Collect by decoder layer the router's weight ``[E, H]`` and the experts ``[tokens, k]`` it selects, on the CPU.

    One sweep over the first windows of int64 ``[N, T]``, one window at a time. ``done`` is called with the number of
    finished layers.
    """
    moe = weights.source.moe
    found = {}
    with weights.loaded(OUTSIDE):
        calls = capture_layer_calls(moe, list(windows[:WINDOWS].split(1)))
    hidden = calls.hidden
    for index, module in enumerate(moe.layers):
        seen: list[Tensor] = []
        layer = moe.moe_at(index)
        with weights.loaded(index):
            with ExitStack() as stack:
                if layer is not None:
                    stack.enter_context(watch_experts(layer, partial(_keep, seen)))
                hidden = [run_layer(module, h, kw[index]) for h, kw in zip(hidden, calls.kwargs, strict=True)]
            if layer is not None:
                router: Any = layer.router
                found[index] = router.weight.detach().float().cpu().clone(), torch.cat(seen)
        done(index + 1)
    return found


def _keep(seen: list[Tensor], routed: Routed, output: Tensor) -> None:
    seen.append(routed.ids.short().cpu())


def router_shift(before: Routers, after: Routers) -> dict[int, LayerShift]:
    """The shift of every MoE layer between two of :func:`routers_of`."""
    return {index: shift_of(before[index], after[index]) for index in after}
