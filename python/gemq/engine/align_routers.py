"""Align the routers of a quantized model with the full-precision ones, one decoder layer at a time in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gemq.algorithms.router_alignment import aligned, router_bias, router_inputs, router_logits, routing_divergence
from gemq.algorithms.router_tuning import RouterTuningConfig
from gemq.engine.layers import Weights, put_routers
from gemq.engine.quantize import Quantized
from gemq.engine.walk import Sweep, Walk
from gemq.models import MoeLayer


@torch.no_grad()
def align_routers(
    quantized: Quantized, sweep: Sweep, config: RouterTuningConfig
) -> tuple[dict[int, Tensor], list[float]]:
    """Train every router towards the distribution over experts that the full-precision one has for the same token.

    A router's inputs are those that the layers before it give with their routers aligned already. A step is
    ``config.batch_size`` of the sweep's windows. Returns the routers by decoder layer, on the CPU, and each one's
    divergence (:func:`gemq.algorithms.router_alignment.routing_divergence`) on its inputs afterwards.
    """
    kept = sweep.stage.tensors("routers")
    if kept is None:
        targets = dict(_targets(Weights(quantized.source), sweep))
        routers: dict[int, Tensor] = {}
        divergences: list[float] = []
        weights = quantized.weights(routers)
        walk, moe = Walk(weights, sweep), quantized.source.moe
        for layer in moe.moe:
            walk.need(layer.index)
            with weights.loaded(layer.index):
                router: Any = layer.router
                x, weight = _inputs(walk, layer), router.weight
                routers[layer.index] = aligned(
                    weight, x, targets[layer.index], config, config.batch_size * sweep.windows.shape[1],
                    router_bias(router),
                ).cpu()
                put_routers(quantized.source, routers, layer.index)
                divergences.append(float(routing_divergence(targets[layer.index], router_logits(layer.router, x))))
                if layer is not moe.moe[-1]:
                    walk.forward(layer.index)
            walk.scratch.drop(walk.name(layer.index))
            sweep.progress(layer.index + 1, len(moe.layers))
        kept = {str(index): router for index, router in routers.items()}, divergences
        sweep.stage.keep_tensors("routers", *kept)
    return {int(index): router.clone() for index, router in kept[0].items()}, kept[1]


def _inputs(walk: Walk, layer: MoeLayer) -> Tensor:
    """Run a loaded layer and return its router's inputs ``[N * T, H]``."""
    seen: list[Tensor] = []
    source = walk.weights.source
    with router_inputs(layer, seen):
        for batch in range(len(walk.calls)):
            hidden = walk.scratch.batch(walk.name(layer.index), batch).to(source.device)
            walk.calls.run(source, layer.index, hidden)
    return torch.cat(seen)


def _targets(weights: Weights, sweep: Sweep) -> Iterator[tuple[int, Tensor]]:
    """Logits ``[N * T, E]``, float32, of the routers of ``weights``, by decoder layer."""
    walk = Walk(weights, sweep, "original-")
    for layer in weights.source.moe.moe:
        walk.need(layer.index)
        with weights.loaded(layer.index):
            yield layer.index, router_logits(layer.router, _inputs(walk, layer))
            if layer is not weights.source.moe.moe[-1]:
                walk.forward(layer.index)
        walk.scratch.drop(walk.name(layer.index))
