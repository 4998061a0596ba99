"""Run the whole method on a model that stays on disk, resumably: as :mod:`gemq.algorithms.progressive` in memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemq.algorithms.allocation import Allocation
from gemq.algorithms.gptq import GptqReport
from gemq.algorithms.importance import ExpertStatistics, Perturbation
from gemq.algorithms.progressive import (
    MethodConfig,
    StageProgress,
    allocate,
    at_budget,
    must_measure,
    overridden,
    plan_of,
)
from gemq.algorithms.router_shift import LayerShift
from gemq.algorithms.sequential import BitPlan, OnLayer
from gemq.engine.fingerprint import of_costs, of_windows
from gemq.engine.journal import RunDirectory, Stage
from gemq.engine.layers import Weights
from gemq.engine.shift import router_shift, walk_routers
from gemq.engine.source import Source
from gemq.engine.stages import Quantized, Sweep, group_budget, measure, quantize, round_routers
from gemq.engine.tuning import tune_packed
from gemq.format import UNQUANTIZED


@dataclass(frozen=True)
class StreamedResult:
    """One budget's outcome; the weights are on disk. ``routers`` are those that changed, by decoder layer."""

    budget: float
    allocation: Allocation
    plan: BitPlan
    quantized: Quantized
    routers: dict[int, Tensor]
    reports: dict[str, GptqReport]
    statistics: ExpertStatistics | None
    router_losses: list[float]
    seconds: dict[str, float]
    key: str
    router_shift: dict[int, LayerShift] = field(default_factory=dict)


def spent(began: float) -> dict[str, float]:
    """Entries of the log for a stage that ends: seconds since ``began``, this process's peak memory in bytes so far,
    and, if a GPU is in use, the most bytes that tensors took of it."""
    # kilobytes on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"seconds": round(time.perf_counter() - began, 3), "peak_bytes": peak}
    if torch.cuda.is_initialized():
        found["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


class Engine:
    """One run: ``open_source`` makes a fresh skeleton of the model, ``identity`` is the fingerprint of model and code.
    """

    def __init__(
        self, open_source: Callable[[], Source], run: RunDirectory, identity: Any, windows: Tensor,
        router_windows: Tensor, method: MethodConfig, progress: StageProgress | None = None,
        source: Source | None = None, first: ExpertStatistics | None = None, on_layer: OnLayer | None = None,
    ):
        self.open_source, self.run, self.identity, self.method = open_source, run, identity, method
        self.windows, self.router_windows = windows, router_windows
        self.source = source or open_source()
        self._first, self._on_layer = first, on_layer
        self._unmoved: dict[int, tuple[Tensor, Tensor]] | None = None
        self.progress = progress or (lambda stage, done, total: None)
        self._budget = group_budget(self.source)
        self._seconds: dict[str, float] = {}

    @contextmanager
    def _stage(self, name: str, label: str, *depends: Any) -> Iterator[tuple[Stage, Sweep]]:
        """The files of a stage, timed and logged; ``label`` is unique within the run, ``name`` for people."""
        stage = self.run.stage(label, self.identity, *depends)
        start = time.perf_counter()
        self.progress(name, 0, 1)
        self.run.log(stage=label, event="start")
        yield stage, Sweep(
            self.windows, self.method.batch_size, stage, lambda done, total: self.progress(name, done, total),
            lambda **event: self.run.log(stage=label, **event), self._budget,
        )
        self._seconds[name] = time.perf_counter() - start
        self.run.log(stage=label, event="end", **spent(start))
        self.run.finished(stage)
        self.progress(name, 1, 1)

    def results(self) -> Iterator[StreamedResult]:
        """Run Algorithm 1 over the budgets, from the highest, and yield each one's result.

        As :func:`gemq.algorithms.progressive.quantize_progressively`; finished work is found in the run directory.
        """
        method, statistics, previous = self.method, self._first, None
        measured_key = "" if self._first is None else of_costs(self._first.costs)
        for step, budget in enumerate(sorted(method.budgets, reverse=True)):
            self._seconds = {}
            if must_measure(method, step, statistics):
                statistics, measured_key = self._measure(previous if method.estimate != "fp" else None)
            result = self._budget_of(budget, statistics, measured_key)
            yield result
            previous = result

    def _measure(self, previous: StreamedResult | None) -> tuple[ExpertStatistics, str]:
        method, weights = self.method, Weights(self.source)
        if previous is not None:
            routers = previous.routers if method.estimate == "tuned" else {}
            weights = Weights(self.source, previous.quantized.record, routers)
        options = [
            method.candidates, method.per_matrix, method.perturbation, asdict(method.gptq), method.batch_size,
            method.estimate,
        ]
        before = previous.key if previous else ""
        if previous is not None and method.estimate == "quantized":
            before = previous.quantized.stage.key
        with self._stage("measure", "measure", of_windows(self.windows), options, before) as (stage, sweep):
            perturbation = Perturbation(method.perturbation, method.gptq)
            found = measure(weights, sweep, method.candidates, perturbation, method.per_matrix)
        return found, stage.key

    def _allocate(self, budget: float, statistics: ExpertStatistics | None, measured: str) -> tuple[Allocation, str]:
        method = self.method
        given = None if method.given is None else asdict(method.given)
        options = [
            budget, method.method, method.granularity, method.candidates, method.per_layer, method.shared_bits,
            method.accounting, given,
        ]
        with self._stage("allocate", "allocate", options, measured) as (stage, _):
            data = stage.made("allocation", lambda: self._solved(budget, statistics))
        arrays = {k: np.array(v) if isinstance(v, list) else v for k, v in data.items()}
        return Allocation(**arrays), stage.key

    def _solved(self, budget: float, statistics: ExpertStatistics | None) -> dict[str, Any]:
        found = allocate(self.source.moe, statistics, budget, self.method)
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(found).items()}

    def _budget_of(self, budget: float, statistics: ExpertStatistics | None, measured: str) -> StreamedResult:
        method = self.method
        allocation, _ = self._allocate(budget, statistics, measured)
        allocation, plan = overridden(
            self.source.moe, allocation, plan_of(self.source.moe, allocation, method), method
        )
        widths = [plan.experts, plan.down, plan.shared, plan.attention, plan.dense, plan.linears]
        options = [of_windows(self.windows), widths, asdict(method.gptq), method.batch_size]
        with self._stage("quantize", "quantize", options) as (stage, sweep):
            sweep = replace(sweep, on_layer=at_budget(budget, self._on_layer))
            quantized = quantize(self.source, sweep, plan, method.gptq)
            reports = quantized.reports()
        key, routers, losses = stage.key, {}, []
        if method.tune:
            options = [of_windows(self.router_windows), asdict(method.router)]
            with self._stage("tune routers", "tune-routers", options, key) as (stage, sweep):
                tuned = tune_packed(
                    self.open_source(), quantized, self.router_windows, method.router, stage, sweep.progress,
                    sweep.log,
                )
            key, routers, losses = stage.key, tuned.routers, tuned.losses
        if method.router_bits < UNQUANTIZED:
            options = [of_windows(self.windows), method.router_bits, asdict(method.gptq), method.batch_size]
            with self._stage("quantize routers", "quantize-routers", options, key) as (stage, sweep):
                routers, rounded = round_routers(quantized, routers, sweep, method.router_bits, method.gptq)
            key, reports = stage.key, reports | rounded
        shift = self._router_shift(quantized, routers, key)
        return StreamedResult(
            budget, allocation, plan, quantized, routers, reports, statistics, losses, dict(self._seconds), key, shift
        )

    def _router_shift(self, quantized: Quantized, routers: dict[int, Tensor], key: str) -> dict[int, LayerShift]:
        """Compare routers and selected experts with the original model's, per decoder layer."""
        with self._stage("compare routers", "router-shift", of_windows(self.windows), key) as (stage, sweep):
            data = stage.made("shift", lambda: self._shifted(quantized, routers, sweep.progress))
        return {int(index): LayerShift(**shift) for index, shift in data.items()}

    def _shifted(
        self, quantized: Quantized, routers: dict[int, Tensor], progress: Callable[[int, int], None]
    ) -> dict[str, dict]:
        # a few windows: rank 0's work
        layers = quantized.layers
        walks = layers if self._unmoved else 2 * layers
        if self._unmoved is None:
            self._unmoved = walk_routers(Weights(self.source), self.windows, lambda done: progress(done, walks))
        found = router_shift(
            quantized, routers, self.windows, self._unmoved, lambda done: progress(walks - layers + done, walks)
        )
        return {str(index): asdict(shift) for index, shift in found.items()}
