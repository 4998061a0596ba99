"""Quantize a model layer by layer, each layer calibrated on the output of the quantized ones."""

from __future__ import annotations

import time

from torch import Tensor

from gemq import distributed
from gemq.algorithms.gptq import GptqConfig, GptqReport
from gemq.algorithms.layer_report import layer_report
from gemq.engine.ends import round_ends
from gemq.engine.journal import Stage
from gemq.engine.layer_records import LayerRecord, record_from, record_of
from gemq.engine.layers import Weights
from gemq.engine.quantize_layer import quantize_layer
from gemq.engine.source import OUTSIDE, Source
from gemq.engine.walk import Sweep, Walk
from gemq.errors import CheckpointError
from gemq.format import UNQUANTIZED
from gemq.widths import Widths


class Quantized:
    """The quantized layers of a stage."""

    def __init__(self, source: Source, stage: Stage, widths: Widths, group_size: int):
        self.source, self.stage, self.widths, self.group_size = source, stage, widths, group_size
        self.layers = len(source.moe.layers)
        self._whole: set[int] = set()

    def find(self, index: int) -> LayerRecord | None:
        """Return layer ``index`` (or embedding and head: :data:`OUTSIDE`), or None if it is not finished. Its file is
        checked in full the first time only."""
        if index == OUTSIDE and self.widths.head == self.widths.embedding == UNQUANTIZED:
            return LayerRecord({})
        contents = self.stage.layer(_file(index), index in self._whole)
        found = record_from(contents, self.source.moe, index, self.widths, self.group_size)
        if found is not None:
            self._whole.add(index)
        return found

    def record(self, index: int) -> LayerRecord:
        """Layer ``index``, which is finished. Raises :class:`CheckpointError` where it cannot be read."""
        found = self.find(index)
        if found is None:
            raise CheckpointError(
                f"{self.stage.place(_file(index))} cannot be read, or was changed while the run goes on; several "
                f"processes must all see the run directory; the same command continues"
            )
        return found

    def weights(self, routers: dict[int, Tensor] | None = None) -> Weights:
        """The quantized model with ``routers`` in it, by decoder layer, instead of the original ones."""
        return Weights(self.source, self.record, {} if routers is None else routers)

    def reports(self) -> dict[str, GptqReport]:
        """Collect all reports, in layer order."""
        found: dict[str, GptqReport] = {}
        for index in range(self.layers):
            found |= self.record(index).reports
        return found


def _file(unit: int) -> str:
    return "outside" if unit == OUTSIDE else f"layer-{unit}"


def quantize(
    source: Source, sweep: Sweep, widths: Widths, config: GptqConfig, affinity: float = 0.0
) -> Quantized:
    """GPTQ layer by layer on the output of the quantized layers, each packed and written as it is done.

    ``affinity`` weights a token in its experts' Hessians by its routing weight to that power: 1 is the affinity-guided
    quantization of MoEQuant (arXiv 2505.03804), 2 the error of the block's output.
    """
    quantized = Quantized(source, sweep.stage, widths, config.group_size)
    if not distributed.on_first(lambda: quantized.find(OUTSIDE) is not None):
        sweep.stage.keep_layer(_file(OUTSIDE), lambda: round_ends(source, widths, config.group_size).contents())
    done = distributed.on_first(lambda: [quantized.find(index) is not None for index in range(quantized.layers)])
    if all(done):
        return quantized
    walk = Walk(quantized.weights(), sweep)
    start = next(i for i in range(quantized.layers - 1, -1, -1) if all(done[:i]) and walk.sound(i))
    for index in range(start, quantized.layers):
        began = time.perf_counter()
        if not done[index]:
            reports = _quantize_layer(quantized, walk, sweep, index, config, affinity)
            if sweep.on_layer:
                seconds = time.perf_counter() - began
                sweep.on_layer(layer_report(index, widths.mean(index), reports.items(), seconds))
        if index + 1 < quantized.layers:
            with walk.weights.loaded(index):
                walk.forward(index)
        walk.scratch.drop(walk.name(index))
        sweep.log(layer=index, seconds=round(time.perf_counter() - began, 3), again=done[index])
        sweep.progress(index + 1, quantized.layers)
    return quantized


def _quantize_layer(
    quantized: Quantized, walk: Walk, sweep: Sweep, index: int, config: GptqConfig, affinity: float
) -> dict[str, GptqReport]:
    source = quantized.source
    with Weights(source).loaded(index):
        result = quantize_layer(source, walk, index, quantized.widths, config, sweep, affinity)
        sweep.stage.keep_layer(_file(index), lambda: record_of(source.moe, result).contents())
    return result.reports
