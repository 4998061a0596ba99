"""Write the files that a finished budget leaves beside its weights, and build its outcome.

A *stage* is a budget's result, of :mod:`gemq.engine.progression`; ``matrices`` are its
reports by module path, ``config`` is the :class:`gemq.QuantizeConfig`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gemq import durable
from gemq.algorithms.layer_report import starved_experts
from gemq.card import write_card
from gemq.generation.memory import peak_bytes
from gemq.integrity import RUN_FILE
from gemq.models import MoeModel
from gemq.plain_json import dumps

COSTS_FILE = "gemq_costs.json"
REPORT_FILE = "gemq_report.json"
# fields of the config that say how a run works and change nothing of what comes out
RUN_OPTIONS = ("keep", "run_dir", "changed", "keep_run", "log", "check")


@dataclass(frozen=True)
class QuantizeOutcome:
    """One finished budget: its checkpoint, the bits reached, the solver's gap, and seconds by stage.

    ``fallbacks`` matrices were rounded only; ``starved`` are the experts with fewer calibration tokens than columns.
    """

    budget: float
    path: Path
    bits_per_expert: float
    gap: float
    bytes: int
    seconds: dict[str, float]
    fallbacks: int
    starved: dict[str, int] = field(default_factory=dict)


def extra_files(
    config: Any, stage: Any, matrices: dict, run: str | None, moe: MoeModel
) -> dict[str, Callable[[Path], Any]]:
    """Writers of the files beside the weights of ``stage``: the report, and the costs if they were measured."""
    parameters = sum(p.numel() for p in moe.model.parameters())
    extra = {REPORT_FILE: lambda path: _write_report(path, config, stage, matrices, run, parameters)}
    if stage.statistics is not None:
        extra[COSTS_FILE] = stage.statistics.costs.save
    return extra


def write_run(target: Path, seconds: dict[str, float]) -> None:
    """Write the files that the manifest leaves out: the model card, then the seconds by stage and the peak memory in
    bytes. These differ from run to run.

    The second file is written after the first. A run that was interrupted between the two therefore writes both when it
    continues.
    """
    write_card(target)
    content = {"seconds": seconds, "peak_bytes": peak_bytes()}
    durable.write_atomic(target / RUN_FILE, (dumps(content, indent=1) + "\n").encode())


def outcome_of(stage: Any, target: Path, matrices: dict, moe: MoeModel) -> QuantizeOutcome:
    """The outcome of a budget whose checkpoint is in ``target``."""
    fallbacks = sum(r.fallback != "" for r in matrices.values())
    size = sum(f.stat().st_size for f in target.glob("*.safetensors"))
    return QuantizeOutcome(
        stage.budget, target, stage.allocation.bits_per_expert, stage.allocation.gap, size, stage.seconds, fallbacks,
        starved_experts(matrices, moe.hidden),
    )


def _write_report(
    path: Path, config: Any, stage: Any, matrices: dict, run: str | None, parameters: int
) -> None:
    """Write the report, readable by people and scripts: options, allocation, per-matrix GPTQ reports. It is the same
    for an interrupted run and an uninterrupted one: times are in the log and in ``gemq_run.json``."""
    report = {
        "options": {k: v for k, v in asdict(config).items() if k not in RUN_OPTIONS},
        "budget": stage.allocation.budget,
        "bits_per_expert": stage.allocation.bits_per_expert,
        "objective": _finite(stage.allocation.objective),
        "gap": _finite(stage.allocation.gap),
        "solver": stage.allocation.solver,
        "parameters": parameters,
        "router_losses": stage.router_losses,
        "router_shift": {"layers": {str(n): asdict(shift) for n, shift in stage.router_shift.items()}},
        "matrices": {name: asdict(r) for name, r in matrices.items()},
        "run": run,
    }
    path.write_text(dumps(report, indent=1) + "\n", encoding="utf-8")


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
