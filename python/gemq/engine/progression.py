"""Run Algorithm 1: measure, allocate, quantize, tune the routers, and repeat at the next lower budget.

The model is a :class:`gemq.engine.source.Source`, on disk or in memory; the arithmetic, and so every byte, is the same.
"""

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

from gemq import distributed
from gemq.algorithms.allocation import Allocation
from gemq.algorithms.costs import Costs
from gemq.algorithms.fisher import weight_fisher
from gemq.algorithms.gptq import GptqReport
from gemq.algorithms.importance import ExpertStatistics
from gemq.algorithms.layer_report import LayerReport
from gemq.algorithms.matrices import Quantizer
from gemq.algorithms.method import MethodConfig, allocate, must_measure, one_process_only, overridden
from gemq.algorithms.perturbation import Perturbation
from gemq.engine.align_routers import align_routers
from gemq.engine.assemble import Assembly
from gemq.engine.fingerprint import of_costs, of_windows
from gemq.engine.journal import MemoryRun, Run, Stage
from gemq.engine.layers import Weights
from gemq.engine.measure import measure
from gemq.engine.quantize import Quantized, quantize
from gemq.engine.round_routers import round_routers
from gemq.engine.router_shift import LayerShift, Routers, router_shift, routers_of
from gemq.engine.router_tuning import tune_packed
from gemq.engine.source import Source
from gemq.engine.walk import OnLayer, Sweep, group_budget
from gemq.format import UNQUANTIZED
from gemq.packed_config import PackedConfig
from gemq.widths import Widths

# progress(stage, done, total); a stage starts at done = 0
StageProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BudgetResult:
    """One budget's outcome. ``quantized`` finds the packed layers, ``routers`` are those that changed, by decoder
    layer, ``seconds`` are by stage."""

    budget: float
    allocation: Allocation
    widths: Widths
    quantized: Quantized
    routers: dict[int, Tensor]
    reports: dict[str, GptqReport]
    statistics: ExpertStatistics | None
    router_losses: list[float]
    seconds: dict[str, float]
    key: str
    router_shift: dict[int, LayerShift] = field(default_factory=dict)

    @property
    def weights(self) -> Weights:
        """The quantized model, a layer at a time."""
        return self.quantized.weights(self.routers)

    def config(self, method: str) -> PackedConfig:
        """The ``quantization_config`` of this result's checkpoint."""
        return PackedConfig(
            self.widths, self.quantized.group_size, budget=self.allocation.budget, method=method
        )

    @property
    def bytes(self) -> int:
        """Bytes of the checkpoint's tensors."""
        return self.assembly().tensor_bytes()

    def assembly(
        self, method: str = "gemq", progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Assembly:
        """The writer of this result's checkpoint."""
        source = self.quantized.source
        return Assembly(source, self.quantized, self.routers, self.config(method), source.stored, progress)

    def packed(self, method: str = "gemq") -> tuple[torch.nn.Module, PackedConfig]:
        """The packed model in memory, in the canonical layout (:func:`gemq.models.prepare` makes it ready to run)."""
        assembly = self.assembly(method)
        return assembly.in_memory(), assembly.config


def spent(began: float) -> dict[str, float]:
    """Entries of the log for a stage that ends: seconds since ``began``, this process's peak memory in bytes so far,
    and, if a GPU is in use, the most bytes that tensors took of it."""
    # kilobytes on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = {"seconds": round(time.perf_counter() - began, 3), "peak_bytes": peak}
    if torch.cuda.is_initialized():
        found["device_peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def at_budget(budget: float, on_layer: OnLayer | None) -> OnLayer | None:
    """Wrap ``on_layer`` so that each report names the budget."""
    if on_layer is None:
        return None

    def call(report: LayerReport) -> None:
        on_layer(replace(report, budget=budget))

    return call


class Progression:
    """One run of the method over ``source``.

    ``windows`` int64 ``[N, T]`` calibrate coefficients and GPTQ, ``router_windows`` tune the routers. ``identity`` is
    the fingerprint of model and code, ``first`` is used instead of measuring the full-precision model, ``quantizer``
    quantizes experts in place of GPTQ.
    """

    def __init__(
        self, source: Source, run: Run, identity: Any, windows: Tensor, router_windows: Tensor, method: MethodConfig,
        progress: StageProgress | None = None, first: ExpertStatistics | None = None, on_layer: OnLayer | None = None,
        quantizer: Quantizer | None = None,
    ):
        self.source, self.run, self.identity, self.method = source, run, identity, method
        self.windows, self.router_windows = windows, router_windows
        self._first, self._on_layer, self._quantizer = first, on_layer, quantizer
        self._unmoved: Routers | None = None
        self.progress = progress or (lambda stage, done, total: None)
        self._budget = group_budget(self.source)
        self._seconds: dict[str, float] = {}
        if (whole := one_process_only(method)) and distributed.world().size > 1:
            raise ValueError(f"{', '.join(whole)}: not with several processes, got {distributed.world().size}")

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

    def results(self) -> Iterator[BudgetResult]:
        """Run the budgets, from the highest, and yield each one's result; finished work is found in the run.

        Every budget quantizes the original weights and starts from the original routers. What carries over is the
        model on which the next coefficients are measured (``method.estimate``), perturbed against the originals.
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

    def _measure(self, previous: BudgetResult | None) -> tuple[ExpertStatistics, str]:
        method, weights = self.method, Weights(self.source)
        if previous is not None:
            weights = previous.weights if method.estimate == "tuned" else previous.quantized.weights()
        options = [
            method.candidates, method.per_matrix, method.perturbation, asdict(method.gptq), method.batch_size,
            method.estimate, *(["fisher"] if method.method == "fisher" else []),
        ]
        before = previous.key if previous else ""
        if previous is not None and method.estimate == "quantized":
            before = previous.quantized.stage.key
        perturbation = Perturbation(method.perturbation, method.gptq)
        with self._stage("measure", "measure", of_windows(self.windows), options, before) as (stage, sweep):
            if method.method == "fisher":
                found = _fisher(weights, sweep, method.candidates, perturbation)
            else:
                found = measure(weights, sweep, method.candidates, perturbation, method.per_matrix)
        return found, stage.key

    def _allocate(self, budget: float, statistics: ExpertStatistics | None, measured: str) -> Allocation:
        method = self.method
        given = None if method.given is None else asdict(method.given)
        options = [
            budget, method.method, method.granularity, method.candidates, method.per_layer, method.shared_bits,
            method.accounting, given,
        ]
        with self._stage("allocate", "allocate", options, measured) as (stage, _):
            data = stage.made("allocation", lambda: self._solved(budget, statistics))
        arrays: dict[str, Any] = {k: np.array(v) if isinstance(v, list) else v for k, v in data.items()}
        return Allocation(**arrays)

    def _solved(self, budget: float, statistics: ExpertStatistics | None) -> dict[str, Any]:
        found = allocate(self.source.moe, statistics, budget, self.method)
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(found).items()}

    def _budget_of(self, budget: float, statistics: ExpertStatistics | None, measured: str) -> BudgetResult:
        method = self.method
        allocation, widths = overridden(
            self.source.moe, self._allocate(budget, statistics, measured), method
        )
        given: list[Any] = [widths.experts, widths.down, widths.shared, widths.attention, widths.dense, widths.linears]
        ends = [widths.head, widths.embedding]
        given += [ends] if min(ends) < UNQUANTIZED else []
        options: list[Any] = [of_windows(self.windows), given, asdict(method.gptq), method.batch_size]
        if method.affinity:
            options.append(method.affinity)
        with self._stage("quantize", "quantize", options) as (stage, sweep):
            sweep = replace(sweep, on_layer=at_budget(budget, self._on_layer), quantizer=self._quantizer)
            quantized = quantize(self.source, sweep, widths, method.gptq, method.affinity)
            reports = quantized.reports()
        routers, losses, key = self._tune(quantized) if method.tune else ({}, [], stage.key)
        if method.router_bits < UNQUANTIZED:
            options = [of_windows(self.windows), method.router_bits, asdict(method.gptq), method.batch_size]
            with self._stage("quantize routers", "quantize-routers", options, key) as (stage, sweep):
                routers, rounded = round_routers(quantized, routers, sweep, method.router_bits, method.gptq)
            key, reports = stage.key, reports | rounded
        shift = self._router_shift(quantized, routers, key)
        return BudgetResult(
            budget, allocation, widths, quantized, routers, reports, statistics, losses, dict(self._seconds), key, shift
        )

    def _tune(self, quantized: Quantized) -> tuple[dict[int, Tensor], list[float], str]:
        """Tune the routers; returns them, the losses of the steps (or divergences after alignment), and the key."""
        method = self.method
        options: list[Any] = [of_windows(self.router_windows), asdict(method.router)]
        if method.router_method == "alignment":
            options.append([method.router_method, method.batch_size])
        with self._stage("tune routers", "tune-routers", options, quantized.stage.key) as (stage, sweep):
            if method.router_method == "alignment":
                routers, losses = align_routers(quantized, replace(sweep, windows=self.router_windows), method.router)
            else:
                tuned = tune_packed(
                    self.source.again(), quantized, self.router_windows, method.router, stage, sweep.progress,
                    sweep.log,
                )
                routers, losses = tuned.routers, tuned.losses
        return routers, losses, stage.key

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
            self._unmoved = routers_of(Weights(self.source), self.windows, lambda done: progress(done, walks))
        after = routers_of(
            quantized.weights(routers), self.windows, lambda done: progress(walks - layers + done, walks)
        )
        return {str(index): asdict(shift) for index, shift in router_shift(self._unmoved, after).items()}


def _fisher(
    weights: Weights, sweep: Sweep, candidates: tuple[int, ...], perturbation: Perturbation
) -> ExpertStatistics:
    """Costs from the Fisher information of the weights, which needs the whole model in memory."""

    def measured() -> dict[str, Any]:
        model = weights.whole()
        originals = model if weights.quantized is None else Weights(weights.source).whole()
        return weight_fisher(
            model, sweep.windows, candidates, originals, perturbation=perturbation, progress=sweep.progress
        ).to_json()

    return ExpertStatistics(Costs.from_json(sweep.stage.made("costs", measured)))


def quantize_progressively(
    source: Source, windows: Tensor, method: MethodConfig, *, router_windows: Tensor | None = None,
    first: ExpertStatistics | None = None, progress: StageProgress | None = None, on_layer: OnLayer | None = None,
    quantizer: Quantizer | None = None,
) -> Iterator[BudgetResult]:
    """Run the method over ``method.budgets`` with all work in memory, and yield each budget's result.

    Arguments as of :class:`Progression`; ``router_windows`` are ``windows`` unless given.
    """
    router_windows = windows if router_windows is None else router_windows
    run = Progression(
        source, MemoryRun(), None, windows, router_windows, method, progress, first, on_layer, quantizer
    )
    return run.results()


def measure_importance(
    source: Source, windows: Tensor, candidates: tuple[int, ...], *, perturbation: Perturbation | None = None,
    batch_size: int = 4, matrices: bool = False, progress: Callable[[int, int], None] | None = None,
) -> ExpertStatistics:
    """Measure Eq. 6 on a full-precision model with all work in memory.

    ``windows`` is int64 ``[N, T]``. ``matrices`` measures gate and up projections alone and down projections alone,
    too. ``perturbation`` says how an expert is quantized for this (default: by GPTQ).
    """
    sweep = Sweep(
        windows, batch_size, MemoryRun().stage("measure"), progress or (lambda done, total: None),
        lambda **event: None, group_budget(source),
    )
    return measure(Weights(source), sweep, candidates, perturbation or Perturbation(), matrices)
