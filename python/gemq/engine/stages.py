"""The streamed stages: coefficients, quantization, rounding of routers. Each continues where its files end.

A stage walks the decoder layers with one of them in memory. What a layer's work gave is a sealed file; activations
between layers are scratch arrays. Where a file or an array is missing or torn, the walk starts at the last sound
array before it and runs finished layers again without repeating their work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from gemq import durable
from gemq.algorithms.gptq import GptqConfig, GptqReport
from gemq.algorithms.importance import ExpertStatistics, Perturbation, statistics_of
from gemq.algorithms.layer_report import layer_report
from gemq.algorithms.sequential import BitPlan, OnLayer
from gemq.engine.costs import LayerCosts, layer_costs
from gemq.engine.journal import Stage
from gemq.engine.layers import Calls, Trace, Weights, backward, embed, forward, head_gradients, recording
from gemq.engine.quantize import quantize_layer, quantize_router
from gemq.engine.records import LayerRecord, lay_over, read_record, record_of
from gemq.engine.scratch import Scratch
from gemq.engine.source import Source
from gemq.models import MoeLayer

Progress = Callable[[int, int], None]
Log = Callable[..., None]


@dataclass(frozen=True)
class Sweep:
    """What a walk over the layers needs: token windows ``[N, T]``, windows per batch, the stage's files, where to
    report, and the bytes that a group of experts may take beside its layer; ``on_layer`` hears of each quantized
    one."""

    windows: Tensor
    batch_size: int
    stage: Stage
    progress: Progress
    log: Log
    budget: int
    on_layer: OnLayer | None = None

    def scratch(self) -> Scratch:
        """The stage's arrays."""
        return Scratch(self.stage.scratch)


def group_budget(source: Source) -> int:
    """Bytes for a group of experts' Hessians and copies: half the largest layer in 16 bits."""
    return source.layer_bytes() // 2


class _Walk:
    """Inputs of decoder layers as arrays ``inputs-0 ...``, made as they are needed."""

    def __init__(self, weights: Weights, sweep: Sweep):
        self.weights, self.scratch = weights, sweep.scratch()
        self.calls: Calls = embed(weights, sweep.windows, sweep.batch_size, self.scratch, self.name(0))

    @staticmethod
    def name(index: int) -> str:
        return f"inputs-{index}"

    def sound(self, index: int) -> bool:
        return self.scratch.sound(self.name(index))

    def forward(self, index: int) -> None:
        """Run loaded layer ``index`` for the next one's inputs."""
        forward(self.weights, self.calls, index, self.scratch, self.name(index), self.name(index + 1))

    def need(self, index: int, done: Progress | None = None) -> None:
        """Make ``inputs-<index>``, from the last sound array before it."""
        have = next(i for i in range(index, -1, -1) if self.sound(i))
        for layer in range(have, index):
            with self.weights.loaded(layer):
                self.forward(layer)
            if done:
                done(layer + 1, index)


# coefficients

def measure(
    weights: Weights, sweep: Sweep, candidates: tuple[int, ...], perturbation: Perturbation
) -> ExpertStatistics:
    """Eq. 6 by one forward and one reverse sweep: what :func:`gemq.algorithms.importance.measure` gives.

    The forward sweep keeps each layer's inputs; the reverse sweep recomputes a layer from them, carries the gradient
    through it, and evaluates its experts' perturbations, against the full-precision experts, at that gradient.
    """
    moe, stage = weights.source.moe, sweep.stage
    found = {}
    for layer in moe.moe:
        data = durable.unseal_json(stage.file(f"costs-{layer.index}"))
        if data is not None:
            found[layer.index] = LayerCosts.from_json(data)
    if len(found) < len(moe.moe):
        _Measuring(weights, sweep, candidates, perturbation, found).run()
    return statistics_of(moe, [found[layer.index] for layer in moe.moe], candidates)


class _Measuring:
    def __init__(
        self, weights: Weights, sweep: Sweep, candidates: tuple[int, ...], perturbation: Perturbation,
        found: dict[int, LayerCosts],
    ):
        self.weights, self.sweep, self.found = weights, sweep, found
        self.candidates, self.perturbation = candidates, perturbation
        self.by_index = {layer.index: layer for layer in weights.source.moe.moe}
        self.layers = len(weights.source.moe.layers)
        self.steps = self.layers + 1 + self.layers - min(self.by_index)

    def run(self) -> None:
        walk = _Walk(self.weights, self.sweep)
        scratch, first = walk.scratch, min(self.by_index)
        start = next((
            i for i in range(first, self.layers + 1)
            if scratch.sound(f"gradient-{i}") and all(n in self.found for n in self.by_index if n >= i)
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

    def _layer(self, walk: _Walk, index: int) -> None:
        began, layer, scratch = time.perf_counter(), self.by_index.get(index), walk.scratch
        arrays = (walk.name(index), f"gradient-{index + 1}", f"gradient-{index}")
        if layer is None or index in self.found:
            with self.weights.loaded(index):
                backward(self.weights, walk.calls, index, scratch, *arrays)
            return
        with self.weights.loaded(index):
            with recording(layer, scratch, self.weights.source.device, len(walk.calls), True) as trace:
                backward(self.weights, walk.calls, index, scratch, *arrays)
            if self.weights.overlay is None:
                self.found[index] = self._costs(layer, trace)
        if self.weights.overlay is not None:
            with self.weights.loaded(index, original=True):
                self.found[index] = self._costs(layer, trace)
        trace.drop()
        durable.seal_json(self.sweep.stage.file(f"costs-{index}"), self.found[index].to_json())
        self.sweep.log(layer=index, seconds=round(time.perf_counter() - began, 3))

    def _costs(self, layer: MoeLayer, trace: Trace) -> LayerCosts:
        shared = None
        if layer.shared is not None:
            shared = tuple(getattr(layer.shared, n).weight for n in ("gate_proj", "up_proj", "down_proj"))
        return layer_costs(
            (layer.experts.gate_up_proj, layer.experts.down_proj), shared, layer.shared_gate, trace, self.candidates,
            self.perturbation, self.sweep.windows.shape[1], self.sweep.budget,
        )


# quantization

class Quantized:
    """The quantized layers of a stage, on disk."""

    def __init__(self, source: Source, stage: Stage, plan: BitPlan, group_size: int):
        self.source, self.stage, self.plan, self.group_size = source, stage, plan, group_size
        self.layers = len(source.moe.layers)

    def record(self, index: int) -> LayerRecord | None:
        """Layer ``index``, or None if it is not finished."""
        file = self.stage.file(f"layer-{index}")
        return read_record(file, self.source.moe, index, self.plan, self.group_size)

    def lay_over(self, index: int) -> None:
        """Put the dequantized weights into the loaded layer."""
        lay_over(self.record(index), self.source)

    def reports(self) -> dict[str, GptqReport]:
        """All reports, in layer order."""
        found: dict[str, GptqReport] = {}
        for index in range(self.layers):
            found |= self.record(index).reports
        return found


def quantize(source: Source, sweep: Sweep, plan: BitPlan, config: GptqConfig) -> Quantized:
    """GPTQ layer by layer on the output of the quantized layers, each packed and written as it is done."""
    quantized = Quantized(source, sweep.stage, plan, config.group_size)
    done = [quantized.record(index) is not None for index in range(quantized.layers)]
    if all(done):
        return quantized
    weights = Weights(source)
    walk = _Walk(weights, sweep)
    start = next(i for i in range(quantized.layers - 1, -1, -1) if all(done[:i]) and walk.sound(i))
    for index in range(start, quantized.layers):
        began = time.perf_counter()
        with weights.loaded(index):
            if done[index]:
                quantized.lay_over(index)
            else:
                result = quantize_layer(
                    source, walk.calls, index, walk.scratch, walk.name(index), plan, config, sweep.budget
                )
                record = record_of(source.moe, result)
                # the codes, a byte each, are packed now
                del result
                record.save(sweep.stage.file(f"layer-{index}"))
                if sweep.on_layer:
                    seconds = time.perf_counter() - began
                    sweep.on_layer(layer_report(index, plan.experts.get(index), record.reports.items(), seconds))
            if index + 1 < quantized.layers:
                walk.forward(index)
        walk.scratch.drop(walk.name(index))
        sweep.log(layer=index, seconds=round(time.perf_counter() - began, 3), again=done[index])
        sweep.progress(index + 1, quantized.layers)
    return quantized


# routers

@torch.no_grad()
def put_routers(source: Source, routers: dict[int, Tensor], index: int) -> None:
    """Put the router of a loaded layer in, where ``routers`` has one."""
    for layer in source.moe.moe:
        if layer.index == index and index in routers:
            layer.router.weight.copy_(routers[index])


def round_routers(
    quantized: Quantized, routers: dict[int, Tensor], sweep: Sweep, bits: int, config: GptqConfig
) -> tuple[dict[int, Tensor], dict[str, GptqReport]]:
    """Routers rounded to ``bits`` by GPTQ, layer by layer on the quantized model with ``routers`` in it."""
    source = quantized.source
    found, reports = {}, {}
    for layer in source.moe.moe:
        kept = durable.unseal_tensors(sweep.stage.file(f"router-{layer.index}"))
        if kept is None:
            break
        found[layer.index] = kept[0]["weight"]
        reports[layer.router_path] = GptqReport(*kept[1])
    if len(found) == len(source.moe.moe):
        return found, reports

    def overlay(index: int) -> None:
        quantized.lay_over(index)
        put_routers(source, routers | found, index)

    walk = _Walk(Weights(source, overlay), sweep)
    last = source.moe.moe[-1].index
    for layer in [m for m in source.moe.moe if m.index not in found]:
        walk.need(layer.index)
        with walk.weights.loaded(layer.index):
            value, report = quantize_router(
                source, walk.calls, layer, walk.scratch, walk.name(layer.index), bits, config
            )
            found[layer.index], reports[layer.router_path] = value.cpu(), report
            durable.seal_tensors(
                sweep.stage.file(f"router-{layer.index}"), {"weight": found[layer.index]},
                list(asdict(report).values()),
            )
            if layer.index < last:
                walk.forward(layer.index)
        walk.scratch.drop(walk.name(layer.index))
        sweep.progress(len(found), len(source.moe.moe))
    return found, reports
