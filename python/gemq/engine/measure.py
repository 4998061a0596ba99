"""Measure the coefficients of Eq. 6 with one decoder layer at a time in memory."""

from __future__ import annotations

import time
from typing import cast

from gemq.algorithms.importance import ExpertStatistics, statistics_of
from gemq.algorithms.layer_costs import LayerCosts
from gemq.algorithms.perturbation import Perturbation
from gemq.engine.layer_importance import layer_costs
from gemq.engine.layers import Trace, Weights, backward, head_gradients, recording
from gemq.engine.stored_experts import StoredStack
from gemq.engine.walk import Sweep, Walk
from gemq.models import MoeLayer


def measure(
    weights: Weights, sweep: Sweep, candidates: tuple[int, ...], perturbation: Perturbation, matrices: bool = False
) -> ExpertStatistics:
    """Measure Eq. 6 by one forward and one reverse sweep.

    The forward sweep keeps each layer's inputs; the reverse sweep recomputes a layer from them, carries the gradient
    through it, and evaluates its experts' perturbations, against the full-precision experts, at that gradient.
    """
    moe, stage = weights.source.moe, sweep.stage
    found = {}
    for layer in moe.moe:
        data = stage.json(f"costs-{layer.index}")
        if data is not None:
            found[layer.index] = LayerCosts.from_json(data)
    if len(found) < len(moe.moe):
        _Measuring(weights, sweep, candidates, perturbation, matrices, found).run()
    return statistics_of(moe, [found[layer.index] for layer in moe.moe], candidates)


class _Measuring:
    def __init__(
        self, weights: Weights, sweep: Sweep, candidates: tuple[int, ...], perturbation: Perturbation, matrices: bool,
        found: dict[int, LayerCosts],
    ):
        self.weights, self.sweep, self.found = weights, sweep, found
        self.candidates, self.perturbation, self.matrices = candidates, perturbation, matrices
        self.by_index = {layer.index: layer for layer in weights.source.moe.moe}
        self.layers = len(weights.source.moe.layers)
        self.steps = self.layers + 1 + self.layers - min(self.by_index)

    def run(self) -> None:
        walk = Walk(self.weights, self.sweep)
        scratch, first = walk.scratch, min(self.by_index)
        start = next((
            i for i in range(first, self.layers + 1)
            if all(n in self.found for n in self.by_index if n >= i) and walk.everywhere(f"gradient-{i}")
        ), None)
        if start is None:
            walk.need(self.layers, lambda done, total: self.sweep.progress(done, self.steps))
            head_gradients(self.weights, walk.calls, scratch, walk.name(self.layers), f"gradient-{self.layers}")
            start = self.layers
        for index in range(start - 1, first - 1, -1):
            self.sweep.progress(self.steps - (index - first) - 1, self.steps)
            walk.need(index)
            self._layer(walk, index)
            scratch.drop(f"gradient-{index + 1}")
            scratch.drop(walk.name(index + 1))

    def _layer(self, walk: Walk, index: int) -> None:
        began, layer, scratch = time.perf_counter(), self.by_index.get(index), walk.scratch
        arrays = (walk.name(index), f"gradient-{index + 1}", f"gradient-{index}")
        if layer is None or index in self.found:
            with self.weights.loaded(index):
                backward(self.weights, walk.calls, index, scratch, *arrays)
            return
        with self.weights.loaded(index):
            with recording(layer, scratch, self.weights.source.device, walk.calls, True) as trace:
                backward(self.weights, walk.calls, index, scratch, *arrays)
            if self.weights.quantized is None:
                self.found[index] = self._costs(layer, trace)
        if self.weights.quantized is not None:
            with Weights(self.weights.source).loaded(index):
                self.found[index] = self._costs(layer, trace)
        trace.drop()
        self.found[index].check(index)
        self.sweep.stage.keep_json(f"costs-{index}", self.found[index].to_json())
        self.sweep.log(layer=index, seconds=round(time.perf_counter() - began, 3))

    def _costs(self, layer: MoeLayer, trace: Trace) -> LayerCosts:
        shared = tuple(linear.weight for linear in layer.shared_linears().values()) or None
        # of the full-precision model, as they are stored
        experts = cast(tuple[StoredStack, StoredStack], self.weights.source.experts[layer.index])
        return layer_costs(
            experts, shared, layer.shared_gate, trace, self.candidates,
            self.perturbation, self.sweep.windows.shape[1], self.sweep.budget, self.matrices,
            layer.form.between(layer.experts, self.weights.source.dtype), layer.shared_activation,
        )
