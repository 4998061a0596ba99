"""Predict sizes, memory, disk and time of quantizing and of running a model, and whether they fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemq.algorithms.method import MethodConfig
from gemq.choices import Keep
from gemq.errors import ResourceError
from gemq.planning import memory
from gemq.planning.ahead import ahead_tensors
from gemq.planning.machine import Machine
from gemq.planning.memory import Need, Work
from gemq.planning.model_parts import ModelParts, count_parts, located
from gemq.planning.output import OutputSize, output_size
from gemq.planning.running import Inference, bits_that_run, inference_of
from gemq.planning.seconds import stage_operations
from gemq.planning.widths import budget_range, planned_widths

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class PlanConfig:
    """Options of a plan: calibration ``samples`` of ``length`` tokens, the method, what stays in memory (``keep``, see
    :class:`gemq.QuantizeConfig`), and the ``dtype`` that is computed in (None: float32 on a CPU, the model's on a GPU).
    The result runs with ``rows`` sequences of ``context`` tokens. Memory is that of one of ``ranks`` processes.
    """

    method: MethodConfig = field(default_factory=MethodConfig)
    samples: int = 128
    length: int = 2048
    keep: str = "layer"
    dtype: torch.dtype | None = None
    context: int = 4096
    rows: int = 1
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.keep not in set(Keep):
            raise ValueError(f"keep must be one of {', '.join(Keep)}, got {self.keep!r}")
        for name, least in (("samples", 1), ("length", 2), ("context", 1), ("rows", 1), ("ranks", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Shortage:
    """Description of a lack of space: ``place`` (device memory, memory, disk), the stage that needs most of it, bytes
    needed by part, and bytes free."""

    place: str
    stage: str
    parts: dict[str, int]
    free: int

    @property
    def needed(self) -> int:
        """Bytes needed in all."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """The predictions. ``outputs`` and ``inference`` are by budget; ``stages`` and ``seconds`` by stage, seconds of
    one budget; None where the machine's rates are not known. ``runnable_bits`` is the highest budget whose result
    would run on the machine; None where all of ``outputs`` do, or no budget would."""

    config: PlanConfig
    machine: Machine
    model_type: str
    parts: ModelParts
    outputs: dict[float, OutputSize]
    inference: dict[float, Inference]
    stages: dict[str, Need]
    seconds: dict[str, float] | None
    dtype: str
    runnable_bits: float | None = None

    @property
    def runs(self) -> bool:
        """Tell if every budget's result runs on the machine with the requested context, as far as free bytes are known.
        """
        return all(run.fits for run in self.inference.values())

    @property
    def disk(self) -> dict[str, int]:
        """Peak bytes on the output's disk by part: all checkpoints, and with a run directory its activations and the
        quantized layers once more."""
        written = sum(o.files for o in self.outputs.values())
        scratch = memory.peak(self.stages)["scratch"]
        found = {"checkpoints": written, "quantized layers": 0 if self.config.keep == "model" else written,
                 "scratch": scratch}
        return {name: size for name, size in found.items() if size}

    def shortages(self) -> list[Shortage]:
        """List every shortage of quantizing, as far as the machine's free bytes are known."""
        free = {"device": self.machine.device_free, "host": self.machine.host_free}
        found = []
        for place, label in (("device", "device memory"), ("host", "memory")):
            stage, need = max(self.stages.items(), key=lambda item: sum(getattr(item[1], place).values()))
            needed = getattr(need, place)
            room = free[place]
            if room is not None and sum(needed.values()) > room:
                found.append(Shortage(label, stage, needed, room))
        if self.machine.disk_free is not None and sum(self.disk.values()) > self.machine.disk_free:
            found.append(Shortage("disk", "save", self.disk, self.machine.disk_free))
        return found

    def to_dict(self) -> dict:
        """Convert to JSON values; budgets are strings there, sizes bytes."""
        return {
            "schema": 1,
            "model_type": self.model_type,
            "parameters": self.parts.parameters,
            "options": asdict(replace(self.config, dtype=None)) | {"dtype": self.dtype},
            "machine": asdict(self.machine),
            "outputs": {f"{b:g}": asdict(o) for b, o in self.outputs.items()},
            "inference": {f"{b:g}": asdict(i) | {"total": i.total, "fits": i.fits} for b, i in self.inference.items()},
            "stages": {name: asdict(need) for name, need in self.stages.items()},
            "peak": memory.peak(self.stages) | {"disk": sum(self.disk.values())},
            "seconds": self.seconds,
            "fits": self.runs and not self.shortages(),
            "fits_quantizing": not self.shortages(),
            "fits_running": self.runs,
            "runnable_bits": self.runnable_bits,
        }


def computed_dtype(config: PreTrainedConfig, dtype: torch.dtype | None, on_cpu: bool) -> torch.dtype:
    """The dtype that quantizing computes in: ``dtype``, else float32 on a CPU and the model's own on a GPU."""
    if dtype is not None:
        return dtype
    declared = getattr(config, "dtype", None)
    return torch.float32 if on_cpu else declared if isinstance(declared, torch.dtype) else torch.bfloat16


def _stored_dtype(config: PreTrainedConfig) -> torch.dtype:
    declared = getattr(config, "dtype", None)
    return declared if declared in (torch.float16, torch.bfloat16) else torch.bfloat16


def make_plan(
    config: PreTrainedConfig, options: PlanConfig, machine: Machine, folder: str | None = None
) -> Plan:
    """Predict everything for the model of a transformers ``config``; no weight is read.

    ``folder`` is the model's, where there is one: it says which layers of multi-token prediction are there, which the
    config may not (:func:`gemq.planning.ahead.ahead_tensors`).

    Raises :class:`gemq.errors.UnsupportedModelError` for a model that gemq does not know, ``ValueError`` for a budget
    that no allocation meets.
    """
    moe = located(config)
    parts, stored = count_parts(moe), _stored_dtype(config)
    ahead = ahead_tensors(moe, stored, folder)
    dtype = computed_dtype(config, options.dtype, machine.on_cpu)
    work = Work(options.samples, options.length, options.method, dtype.itemsize, machine.on_cpu, options.ranks)
    packed = partial(_packed, config, options, machine, stored, ahead)
    outputs, inference = {}, {}
    for budget in sorted(options.method.budgets, reverse=True):
        outputs[budget], inference[budget] = packed(budget)
    largest = max(o.files for o in outputs.values())
    stages = _needs(options, parts, work, largest)
    seconds = None
    if machine.rates is not None:
        operations = stage_operations(parts, work, options.keep, largest, stored.itemsize)
        seconds = {name: found.seconds(machine.rates) for name, found in operations.items()}
    runnable = None
    if not all(run.fits for run in inference.values()):
        low, high = budget_range(moe, options.method)
        runnable = bits_that_run(low, min(high, max(outputs)), lambda budget: packed(budget)[1].fits)
    name = str(dtype).removeprefix("torch.")
    return Plan(options, machine, config.model_type, parts, outputs, inference, stages, seconds, name, runnable)


def _needs(options: PlanConfig, parts: ModelParts, work: Work, output: int) -> dict[str, Need]:
    stages = memory.layerwise(parts, work, output)
    if options.keep == "model":
        stages = memory.resident(stages, parts, work, output)
    if options.keep != "layer":
        stages = {name: Need(need.device, need.host | need.scratch) for name, need in stages.items()}
    return stages


def _packed(
    config: PreTrainedConfig, options: PlanConfig, machine: Machine, stored: torch.dtype, ahead: dict[str, Tensor],
    budget: float,
) -> tuple[OutputSize, Inference]:
    """Sizes of one budget's checkpoint, on disk and running."""
    moe = located(config)
    parts = count_parts(moe)
    widths = planned_widths(moe, options.method, budget)
    size = output_size(moe, widths, stored, ahead=ahead)
    model = moe.model.to(stored)
    return size, inference_of(model, parts, machine, options.rows, options.context, stored)


def check(plan: Plan, config: PreTrainedConfig) -> None:
    """Raise :class:`gemq.errors.ResourceError` if something does not fit. The message lists what takes how much, and a
    change that would fit."""
    found = plan.shortages()
    if not found:
        return
    what = "; ".join(_sentence(shortage) for shortage in found)
    ways = [text for text in _what_would_fit(plan, config) if text]
    fits = " or ".join(ways) + " would fit" if ways else "no smaller calibration would fit"
    raise ResourceError(f"{what}. {fits[0].upper()}{fits[1:]}; --no-check goes on all the same")


def _sentence(shortage: Shortage) -> str:
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sorted(shortage.parts.items(), key=lambda i: -i[1]))
    return (f"{shortage.stage} needs {shortage.needed / 1e9:.2f} GB of {shortage.place} ({parts}), "
            f"{shortage.free / 1e9:.2f} GB are free")


def _what_would_fit(plan: Plan, config: PreTrainedConfig) -> Iterator[str]:
    """List smaller calibrations that fit, each by one change."""
    options = plan.config

    def fits(**changes: Any) -> bool:
        changed = replace(options, **changes)
        work = Work(changed.samples, changed.length, changed.method,
                    computed_dtype(config, options.dtype, plan.machine.on_cpu).itemsize, plan.machine.on_cpu,
                    options.ranks)
        largest = max(o.files for o in plan.outputs.values())
        stages = _needs(changed, plan.parts, work, largest)
        return not replace(plan, config=changed, stages=stages).shortages()

    low, high = 0, options.samples
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(samples=middle) else (low, middle)
    yield f"--samples {low} instead of {options.samples}" if low else ""
    small = replace(options.method, batch_size=1)
    yield "--batch-size 1" if options.method.batch_size > 1 and fits(method=small) else ""
