"""The streamed stages: coefficients, quantization, rounding of routers. Each continues where its files end.

A stage walks the decoder layers with one of them in memory. What a layer's work gave is a sealed file; activations
between layers are scratch arrays. Where a file or an array is missing or torn, the walk starts at the last sound
array before it and runs finished layers again without repeating their work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch import Tensor

from gemq import distributed
from gemq.algorithms.gptq import GptqConfig, GptqReport
from gemq.algorithms.importance import ExpertStatistics, Perturbation, statistics_of
from gemq.algorithms.layer_costs import LayerCosts
from gemq.algorithms.layer_report import layer_report
from gemq.algorithms.sequential import BitPlan, OnLayer
from gemq.engine.costs import layer_costs
from gemq.engine.journal import Stage
from gemq.engine.layers import Calls, Trace, Weights, backward, embed, forward, head_gradients, recording
from gemq.engine.quantize import quantize_layer, quantize_router
from gemq.engine.records import LayerRecord, read_record, record_of
from gemq.engine.scratch import Scratch
from gemq.engine.source import Source
from gemq.errors import CheckpointError
from gemq.models import MoeLayer

Progress = Callable[[int, int], None]
Log = Callable[..., None]


@dataclass(frozen=True)
class Sweep:
    """Inputs of a walk over the layers: token windows ``[N, T]``, windows per batch, the stage's files, callbacks for
    progress and log, and the bytes that a group of experts may take beside its layer. ``on_layer`` is called after each
    quantized layer."""

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
        return self.everywhere(self.name(index))

    def everywhere(self, array: str) -> bool:
        """Return True if every process has its part of an array."""
        return all(distributed.gather(self.scratch.sound(array)))

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
    weights: Weights, sweep: Sweep, candidates: tuple[int, ...], perturbation: Perturbation, matrices: bool = False
) -> ExpertStatistics:
    """Measure Eq. 6 by one forward and one reverse sweep; the result is that of
    :func:`gemq.algorithms.importance.measure`.

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
        walk = _Walk(self.weights, self.sweep)
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

    def _layer(self, walk: _Walk, index: int) -> None:
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
        shared = None
        if layer.shared is not None:
            shared = tuple(getattr(layer.shared, n).weight for n in ("gate_proj", "up_proj", "down_proj"))
        return layer_costs(
            self.weights.source.experts[layer.index], shared, layer.shared_gate, trace, self.candidates,
            self.perturbation, self.sweep.windows.shape[1], self.sweep.budget, self.matrices,
        )


# quantization

class Quantized:
    """The quantized layers of a stage, on disk."""

    def __init__(self, source: Source, stage: Stage, plan: BitPlan, group_size: int):
        self.source, self.stage, self.plan, self.group_size = source, stage, plan, group_size
        self.layers = len(source.moe.layers)
        self._whole: set[int] = set()

    def find(self, index: int) -> LayerRecord | None:
        """Return layer ``index``, or None if it is not finished. Its file is checked in full the first time only."""
        file = self.stage.file(f"layer-{index}")
        found = read_record(file, self.source.moe, index, self.plan, self.group_size, index in self._whole)
        if found is not None:
            self._whole.add(index)
        return found

    def record(self, index: int) -> LayerRecord:
        """Layer ``index``, which is finished. Raises :class:`CheckpointError` where it cannot be read."""
        found = self.find(index)
        if found is None:
            raise CheckpointError(
                f"{self.stage.file(f'layer-{index}')} cannot be read, or was changed while the run goes on; several "
                f"processes must all see the run directory; the same command continues"
            )
        return found

    def reports(self) -> dict[str, GptqReport]:
        """Collect all reports, in layer order."""
        found: dict[str, GptqReport] = {}
        for index in range(self.layers):
            found |= self.record(index).reports
        return found


def quantize(source: Source, sweep: Sweep, plan: BitPlan, config: GptqConfig) -> Quantized:
    """GPTQ layer by layer on the output of the quantized layers, each packed and written as it is done."""
    quantized = Quantized(source, sweep.stage, plan, config.group_size)
    done = distributed.on_first(lambda: [quantized.find(index) is not None for index in range(quantized.layers)])
    if all(done):
        return quantized
    walk = _Walk(Weights(source, quantized.record), sweep)
    start = next(i for i in range(quantized.layers - 1, -1, -1) if all(done[:i]) and walk.sound(i))
    for index in range(start, quantized.layers):
        began = time.perf_counter()
        if not done[index]:
            reports = _quantize_layer(quantized, walk, sweep, index, config)
            if sweep.on_layer:
                seconds = time.perf_counter() - began
                sweep.on_layer(layer_report(index, plan.mean(index), reports.items(), seconds))
        if index + 1 < quantized.layers:
            with walk.weights.loaded(index):
                walk.forward(index)
        walk.scratch.drop(walk.name(index))
        sweep.log(layer=index, seconds=round(time.perf_counter() - began, 3), again=done[index])
        sweep.progress(index + 1, quantized.layers)
    return quantized


def _quantize_layer(
    quantized: Quantized, walk: _Walk, sweep: Sweep, index: int, config: GptqConfig
) -> dict[str, GptqReport]:
    source = quantized.source
    with Weights(source).loaded(index):
        result = quantize_layer(
            source, walk.calls, index, walk.scratch, walk.name(index), quantized.plan, config, sweep.budget
        )
        distributed.on_first(lambda: record_of(source.moe, result).save(sweep.stage.file(f"layer-{index}")))
    return result.reports


# routers

def round_routers(
    quantized: Quantized, routers: dict[int, Tensor], sweep: Sweep, bits: int, config: GptqConfig
) -> tuple[dict[int, Tensor], dict[str, GptqReport]]:
    """Round the routers to ``bits`` by GPTQ, layer by layer on the quantized model with ``routers`` in it."""
    source = quantized.source
    found, reports = {}, {}
    for layer in source.moe.moe:
        kept = sweep.stage.tensors(f"router-{layer.index}")
        if kept is None:
            break
        found[layer.index] = kept[0]["weight"]
        reports[layer.router_path] = GptqReport(*kept[1])
    if len(found) == len(source.moe.moe):
        return found, reports

    weights = Weights(source, quantized.record, routers | found)
    walk = _Walk(weights, sweep)
    last = source.moe.moe[-1].index
    for layer in [m for m in source.moe.moe if m.index not in found]:
        walk.need(layer.index)
        with walk.weights.loaded(layer.index):
            value, report = quantize_router(
                source, walk.calls, layer, walk.scratch, walk.name(layer.index), bits, config
            )
            found[layer.index], reports[layer.router_path] = value, report
            weights.routers[layer.index] = value
            sweep.stage.keep_tensors(f"router-{layer.index}", {"weight": value}, list(asdict(report).values()))
            if layer.index < last:
                walk.forward(layer.index)
        walk.scratch.drop(walk.name(layer.index))
        sweep.progress(len(found), len(source.moe.moe))
    return found, reports
