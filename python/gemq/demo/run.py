"""The demo: every method at several budgets on the small model that ships with gemq, on held-out text."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from gemq import __version__
from gemq.algorithms.calibration import calibration_windows, evaluation_windows
from gemq.algorithms.importance import ExpertStatistics
from gemq.algorithms.method import MethodConfig
from gemq.algorithms.perplexity import perplexity
from gemq.algorithms.perturbation import Perturbation
from gemq.algorithms.router_tuning import tune_routers
from gemq.card import write_card
from gemq.checkpoint import from_pretrained
from gemq.continuation import generate
from gemq.demo.picture import Row, draw
from gemq.engine.progression import BudgetResult, measure_importance, quantize_progressively
from gemq.engine.source import ResidentSource
from gemq.errors import CheckpointError
from gemq.evaluations import Score, record
from gemq.generation import Generation
from gemq.loading import load_tokenizer, load_unquantized
from gemq.models import describe
from gemq.pipeline import QuantizeConfig, save_result
from gemq.plain_json import dumps

ASSETS = Path(__file__).parent
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class DemoConfig:
    """Options of the demo: the output folder, the budgets in bits per expert, and how much held-out text (None: all of
    it)."""

    output: Path
    budgets: tuple[float, ...] = (3.0, 2.5, 2.0, 1.5)
    windows: int | None = None
    samples: int = 64
    length: int = 256
    seed: int = 0
    prompt: str = "It was a dark night, and the old man"


@dataclass(frozen=True)
class DemoResult:
    """The table, the bit maps by budget (of experts, or of gate and up and of down), the checkpoints, the picture and a
    generation from the lowest budget."""

    rows: list[Row]
    bit_maps: dict[float, list[dict[int, list[int]]]]
    checkpoints: dict[float, Path]
    packed_perplexity: float
    picture: Path
    generation: Generation
    seconds: float


class _Demo:
    def __init__(self, config: DemoConfig, progress: Progress | None):
        self.config, self.progress = config, progress or (lambda stage, done, total: None)
        model_path = ASSETS / "model"
        if not (model_path / "config.json").is_file():
            raise CheckpointError(f"the demo's model is not installed: {model_path} is missing")
        self.tokenizer = load_tokenizer(str(model_path))
        self.model = load_unquantized(str(model_path), "float32").eval()
        self.source = ResidentSource(copy.deepcopy(self.model))
        text = ASSETS / "text"
        self.windows = calibration_windows(
            self.tokenizer, str(text / "calibration.txt"), config.samples, config.length, config.seed
        )
        self.heldout = evaluation_windows(self.tokenizer, str(text / "heldout.txt"), config.length, config.windows)
        self.rows: list[Row] = []

    def score(self, method: str, bits: float | None, size: int, seconds: float) -> None:
        label = method if bits is None else f"{method}, {bits:g} bits"
        value = perplexity(
            self.model, self.heldout, 16, lambda done, total: self.progress(f"evaluate {label}", done, total)
        )
        self.rows.append(Row(method, bits, value, size, seconds))

    def full_precision(self) -> ExpertStatistics:
        """The two rows without quantization, and the statistics that all methods start from."""
        size = 2 * sum(p.numel() for p in self.model.parameters())
        self.score("FP", None, size, 0.0)
        start = time.perf_counter()
        tune_routers(describe(self.model), self.windows, progress=lambda d, t: self.progress("tune routers, FP", d, t))
        self.score("FP, routers tuned", None, size, time.perf_counter() - start)
        return self.measure("gptq")

    def measure(self, perturbation: str) -> ExpertStatistics:
        return measure_importance(
            self.source, self.windows, (1, 2, 3), perturbation=Perturbation(perturbation), matrices=True,
            progress=lambda d, t: self.progress(f"measure experts ({perturbation})", d, t),
        )

    def run_method(self, name: str, method: MethodConfig, statistics: ExpertStatistics) -> list[BudgetResult]:
        stages = []
        runs = quantize_progressively(
            self.source, self.windows, method, first=statistics,
            progress=lambda stage, d, t: self.progress(f"{name}: {stage}", d, t),
        )
        for stage in runs:
            stages.append(replace(stage, statistics=None))
            stage.weights.write_to(self.model)
            self.score(name, stage.budget, stage.bytes, sum(stage.seconds.values()))
            if name == "GEMQ + routers":
                self.save(stage)
        return stages

    def checkpoint(self, budget: float) -> Path:
        return self.config.output / f"{budget:g}"

    def save(self, stage: BudgetResult) -> None:
        config = QuantizeConfig(
            str(ASSETS / "model"), str(self.config.output), str(ASSETS / "text" / "calibration.txt"),
            self.config.samples, self.config.length, self.config.seed, overwrite=True,
        )
        assembly = stage.assembly(config.method.name)
        save_result(config, stage, assembly, assembly.write, self.tokenizer, self.checkpoint(stage.budget))


def run_demo(config: DemoConfig, progress: Progress | None = None) -> DemoResult:
    """Quantize by every method at every budget, evaluate on held-out text, save, draw, and generate.

    All methods share the calibration windows and the first statistics. ``FP, routers tuned`` is the control for
    router tuning: what the same tuning does to the full-precision model. ``GEMQ, paper`` measures costs by rounding to
    nearest and keeps the paper's per-layer constraints; ``GEMQ`` measures with GPTQ and has none. The packed
    checkpoint of the lowest budget is reloaded, evaluated and generated from.
    """
    started = time.perf_counter()
    config.output.mkdir(parents=True, exist_ok=True)
    demo = _Demo(config, progress)
    statistics = demo.full_precision()
    # With 8 experts a layer the paper's constraints take 1.375 bits of every budget: one row shows what that costs.
    base = MethodConfig(budgets=config.budgets, tune=False)
    demo.run_method("uniform", replace(base, method="uniform"), statistics)
    demo.run_method("PMQ", replace(base, method="pmq", estimate="fp"), statistics)
    constrained = replace(base, granularity="expert", per_layer="c2c3", perturbation="rtn", estimate="quantized")
    demo.run_method("GEMQ, paper", constrained, demo.measure("rtn"))
    demo.run_method("GEMQ", replace(base, estimate="quantized"), statistics)
    stages = demo.run_method("GEMQ + routers", replace(base, tune=True), statistics)
    lowest = min(config.budgets)
    packed = from_pretrained(demo.checkpoint(lowest), dtype=torch.float32)
    again = perplexity(packed, demo.heldout, 16, lambda d, t: demo.progress("evaluate the packed checkpoint", d, t))
    # with the checkpoint, for `gemq report` and its card
    record(demo.checkpoint(lowest), Score("heldout.txt", config.length, again, demo.heldout[:, 1:].numel(),
                                          gemq=__version__))
    write_card(demo.checkpoint(lowest))
    generation = generate(
        packed, config.prompt, tokenizer=demo.tokenizer, max_new_tokens=60, temperature=0.7, top_p=0.9
    )
    assert not isinstance(generation, list)
    apart = any(stage.widths.down for stage in stages)
    maps = {
        s.budget: [s.widths.experts, s.widths.down or s.widths.experts] if apart else [s.widths.experts] for s in stages
    }
    picture = config.output / "demo.png"
    draw(demo.rows, maps, picture)
    result = DemoResult(
        demo.rows, maps, {s.budget: demo.checkpoint(s.budget) for s in stages}, again, picture, generation,
        time.perf_counter() - started,
    )
    (config.output / "table.json").write_text(dumps([asdict(r) for r in demo.rows], indent=1) + "\n")
    return result
