"""One cell of the study: a model, a calibration seed and one way to quantize, run at falling budgets and evaluated.

A cell's result is a JSON file named by what it was computed from (the model's bytes, the texts, all options), so that a
study that was cut off goes on where it was and a changed option never reuses an old result. What many cells share (the
windows, the statistics of the full-precision model) is computed once for a model and seed.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import eq6
import numpy as np
from balanced_windows import balanced_windows, self_sampled_windows
from outliers import OUTLIER_BITS, quantize_with_outliers
from routing import changed_routes, chosen_experts, replayed_routing
from torch import Tensor

from gemq import durable
from gemq.algorithms.calibration import calibration_windows, evaluation_windows
from gemq.algorithms.costs import Costs
from gemq.algorithms.fisher import weight_fisher
from gemq.algorithms.gptq import GptqConfig
from gemq.algorithms.importance import ExpertStatistics
from gemq.algorithms.method import MethodConfig
from gemq.algorithms.perplexity import perplexity
from gemq.algorithms.perturbation import Perturbation
from gemq.algorithms.router_tuning import RouterTuningConfig, tune_routers
from gemq.engine.progression import BudgetResult, measure_importance, quantize_progressively
from gemq.engine.source import ResidentSource
from gemq.loading import load_tokenizer, load_unquantized
from gemq.models import MoeModel, describe

VERSION = 4
POOL = 8  # balanced windows are chosen out of this many times as many


# ways to quantize matrices, costs included: as gemq does, by GPTQ alone, or as the paper's scripts do
QUANTIZERS = {
    "default": GptqConfig.for_recipe("default"),
    "gptq": GptqConfig.for_recipe("default", refine=0, compensate=False, rescale=False),
    "paper": GptqConfig.for_recipe("paper"),
}


@dataclass(frozen=True)
class Settings:
    """Settings that all cells of a study share. ``calibration`` and ``texts`` are ``(name, source)`` pairs; the first
    calibration text is the default. ``samples`` windows of ``length`` tokens calibrate, ``limit`` windows a text
    evaluate (None: all)."""

    calibration: tuple[tuple[str, str], ...]
    texts: tuple[tuple[str, str], ...]
    samples: int = 32
    length: int = 256
    limit: int | None = 64
    batch_size: int = 8


@dataclass(frozen=True)
class Run:
    """Options of a cell. ``kind``: ``quantize`` by the method, ``spqr`` (uniform with outliers), ``fp`` (nothing),
    ``statistics`` (Eq. 6 of the full-precision model) or ``eq6`` (predicted against true loss). Options as in
    :class:`gemq.algorithms.method.MethodConfig`; ``routers`` is none, loss or alignment, and ``replay`` evaluates
    with the full-precision routers' decisions as well. ``balanced`` calibrates on balanced windows of the text,
    ``self_sampled`` on text that the model itself generates. ``quantizer`` is one of :data:`QUANTIZERS`."""

    kind: str = "quantize"
    method: str = "gemq"
    budgets: tuple[float, ...] = (2.5, 2.0, 1.5)
    routers: str = "none"
    replay: bool = False
    candidates: tuple[int, ...] = (1, 2, 3)
    per_layer: str = "none"
    perturbation: str = "gptq"
    estimate: str = "quantized"
    attention_bits: int = 4
    router_bits: int = 16
    affinity: float = 0.0
    balanced: bool = False
    self_sampled: bool = False
    calibration: str | None = None
    samples: int | None = None
    router_samples: int | None = None
    router_epochs: int = 1
    router_lr: float = 1e-4
    quantizer: str = "default"
    shared_bits: int | None = None
    accounting: str = "exact"
    granularity: str = "auto"

    @property
    def per_matrix(self) -> bool:
        """True if costs of single matrices are needed."""
        method = MethodConfig(method=self.method, candidates=self.candidates, granularity=self.granularity)
        return method.per_matrix


def fingerprint(model: str) -> str:
    """SHA-256 over a model folder's config, weights and tokenizer; of the name if it is not a folder."""
    digest = hashlib.sha256()
    folder = Path(model)
    if not folder.is_dir():
        return hashlib.sha256(model.encode()).hexdigest()
    for path in sorted([*folder.glob("*.safetensors"), folder / "config.json", folder / "tokenizer.json"]):
        if path.is_file():
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()


def label(model: str) -> str:
    """Name of a model in tables: its folder's name, or for a folder called "model" the name of its parent."""
    path = Path(model)
    return path.resolve().parent.name if path.name == "model" else path.name


def text_fingerprint(source: str) -> str:
    """SHA-256 of a source's local files, or of its name."""
    digest = hashlib.sha256()
    for part in source.split(","):
        name, _, options = part.partition("#") if "#" in part else part.partition("@")
        path = Path(name)
        digest.update(path.read_bytes() if path.is_file() else name.encode())
        digest.update(f"{options};".encode())
    return digest.hexdigest()


def _used(run: Run, settings: Settings) -> dict:
    """The settings that a run's result depends on; texts by content."""
    chosen = dict(settings.calibration)[run.calibration or settings.calibration[0][0]]
    texts = {name: text_fingerprint(source) for name, source in settings.texts}
    return {
        "calibration": text_fingerprint(chosen), "texts": {} if run.kind in ("statistics", "eq6") else texts,
        "samples": run.samples or settings.samples, "length": settings.length, "limit": settings.limit,
    }


def cell_name(model: str, model_print: str, seed: int, run: Run, settings: Settings) -> str:
    """The file name of a cell's result."""
    # an option that is added later, at a default that does what was done before, leaves old results valid
    options = {k: v for k, v in asdict(run).items() if v != getattr(Run, k) and k not in ("calibration", "samples")}
    key = json.dumps([VERSION, model_print, seed, options, _used(run, settings)], sort_keys=True)
    return f"{label(model)}-{run.kind}-s{seed}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def write_json(path: Path, content: object) -> None:
    """Write under a temporary name, flush to disk, rename."""
    durable.replace(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


class Session:
    """A loaded model and one seed: what its cells share.

    ``original`` is the full-precision model, which no cell changes, ``source`` the same for the engine, and ``moe`` a
    copy that holds what was last quantized.
    """

    def __init__(self, model: str, seed: int, settings: Settings, cache: Path, device: str = "cpu"):
        self.name, self.seed, self.settings, self.cache = model, seed, settings, cache
        self.print = fingerprint(model)
        self.tokenizer = load_tokenizer(model)
        dtype = "float32" if device == "cpu" else "auto"
        self.original = describe(load_unquantized(model, dtype).to(device).eval())
        self.source = ResidentSource(self.original.model)
        self.moe = describe(copy.deepcopy(self.original.model))
        length, limit = settings.length, settings.limit
        self.texts = {n: evaluation_windows(self.tokenizer, s, length, limit) for n, s in settings.texts}

    @functools.lru_cache(maxsize=8)  # noqa: B019  (a session lives as long as its cells)
    def windows(self, calibration: str | None, samples: int, balanced: bool, self_sampled: bool = False) -> Tensor:
        """Calibration windows of this seed."""
        if self_sampled:
            return self_sampled_windows(self.original, samples, self.settings.length, seed=self.seed)
        source = dict(self.settings.calibration)[calibration or self.settings.calibration[0][0]]
        count = samples * (POOL if balanced else 1)
        found = calibration_windows(self.tokenizer, source, count, self.settings.length, self.seed)
        if balanced:
            found = balanced_windows(self.original, found, samples, self.settings.batch_size)
        return found

    @functools.cached_property
    def fp_routes(self) -> list[Tensor]:
        """The experts of every token of 16 windows of the first text in full precision."""
        return chosen_experts(self.original, self._route_windows)

    @property
    def _route_windows(self) -> Tensor:
        return next(iter(self.texts.values()))[:16]

    def restored(self) -> MoeModel:
        """Put the full-precision weights back into ``moe``, and return it."""
        self.moe.model.load_state_dict(self.original.model.state_dict())
        return self.moe

    def calibrating(self, run: Run) -> Tensor:
        """The run's calibration windows."""
        count = run.samples or self.settings.samples
        return self.windows(run.calibration, count, run.balanced, run.self_sampled)

    def router_windows(self, run: Run) -> Tensor:
        """Windows that tune the run's routers."""
        if run.router_samples is None:
            return self.calibrating(run)
        return self.windows(run.calibration, run.router_samples, run.balanced, run.self_sampled)

    def scores(self) -> dict[str, float]:
        """Perplexity by text of the model in its current state."""
        return {name: perplexity(self.moe.model, w, self.settings.batch_size) for name, w in self.texts.items()}

    def statistics(self, run: Run) -> ExpertStatistics:
        """Statistics of the full-precision model, from the cache if they were measured before."""
        what = asdict(run)
        names = ("candidates", "perturbation", "balanced", "self_sampled", "quantizer")
        key = [VERSION, self.print, self.seed, run.method == "fisher", *(what[n] for n in names),
               _used(run, self.settings) | {"texts": None, "limit": None}, run.per_matrix]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        path = self.cache / f"statistics-{digest}.npz"
        if path.is_file():
            return _load_statistics(path, self.moe, run.candidates)
        perturbation = Perturbation(run.perturbation, QUANTIZERS[run.quantizer])
        if run.method == "fisher":
            costs = weight_fisher(self.original, self.calibrating(run), run.candidates, perturbation=perturbation)
            found = ExpertStatistics(costs)
        else:
            found = measure_importance(
                self.source, self.calibrating(run), run.candidates, perturbation=perturbation,
                batch_size=self.settings.batch_size, matrices=run.per_matrix,
            )
        _save_statistics(path, found)
        return found


def _save_statistics(path: Path, found: ExpertStatistics) -> None:
    arrays = {"routed": found.costs.routed, "shared": found.costs.shared, "matrices": found.costs.matrices,
              "frequency": found.frequency, "weight": found.weight, "error": found.error}
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.npz")
    np.savez(temporary, **{k: v for k, v in arrays.items() if v is not None})
    os.replace(temporary, path)


def _load_statistics(path: Path, moe, candidates: tuple[int, ...]) -> ExpertStatistics:
    with np.load(path, allow_pickle=False) as held:
        given = dict(held)
    layers = tuple(layer.index for layer in moe.moe)
    costs = Costs(candidates, given["routed"], layers, given.get("shared"), moe.shared_multiple, given.get("matrices"))
    return ExpertStatistics(costs, *(given.get(name) for name in ("frequency", "weight", "error")))


def _stage_result(session: Session, run: Run, stage: BudgetResult) -> dict:
    stage.weights.write_to(session.moe.model)
    found = {
        "budget": stage.budget, "bits_per_expert": stage.allocation.bits_per_expert,
        "bytes": stage.bytes, "perplexity": session.scores(),
        "bits": [stage.widths.experts[layer.index] for layer in session.moe.moe],
        "changed_routes": changed_routes(session.fp_routes, chosen_experts(session.moe, session._route_windows)),
        "seconds": stage.seconds,
    }
    if stage.widths.down:
        found["down_bits"] = [stage.widths.down[layer.index] for layer in session.moe.moe]
    if stage.widths.shared:
        found["shared_bits"] = [stage.widths.shared[layer.index] for layer in session.moe.moe]
    if run.replay:
        with replayed_routing(session.moe, session.original):
            found["replayed"] = session.scores()
    return found


def _quantize(session: Session, run: Run) -> list[dict]:
    names = {f.name for f in fields(MethodConfig)} & {f.name for f in fields(Run)}
    options = {name: getattr(run, name) for name in names}
    config = MethodConfig(
        **options, tune=run.routers != "none", router_method="alignment" if run.routers == "alignment" else "loss",
        batch_size=session.settings.batch_size, gptq=QUANTIZERS[run.quantizer],
        router=RouterTuningConfig(learning_rate=run.router_lr, epochs=run.router_epochs),
    )
    statistics = None if run.method == "uniform" else session.statistics(run)
    windows, router = session.calibrating(run), session.router_windows(run)
    stages = quantize_progressively(session.source, windows, config, router_windows=router, first=statistics)
    return [_stage_result(session, run, stage) for stage in stages]


def _outliers(session: Session, run: Run) -> list[dict]:
    found = []
    for budget in run.budgets:
        start = time.perf_counter()
        bits = quantize_with_outliers(
            session.restored(), session.calibrating(run), budget, attention=run.attention_bits,
            batch_size=session.settings.batch_size,
        )
        found.append({
            "budget": budget, "bits_per_expert": bits, "perplexity": session.scores(),
            "outlier_bits": OUTLIER_BITS, "seconds": {"quantize": time.perf_counter() - start},
        })
    return found


def _full_precision(session: Session, run: Run) -> list[dict]:
    """Evaluate in full precision. With ``routers`` "loss" it is the control: its routers are tuned as a quantized
    model's are."""
    before, size = session.fp_routes, 2 * sum(p.numel() for p in session.original.model.parameters())
    session.restored()
    start = time.perf_counter()
    if run.routers == "loss":
        config = RouterTuningConfig(learning_rate=run.router_lr, epochs=run.router_epochs)
        tune_routers(session.moe, session.router_windows(run), config)
    routes = changed_routes(before, chosen_experts(session.moe, session._route_windows))
    return [{"budget": 16.0, "bytes": size, "perplexity": session.scores(), "changed_routes": routes,
             "seconds": {"tune routers": time.perf_counter() - start}}]


def _statistics(session: Session, run: Run) -> list[dict]:
    found = session.statistics(run)
    return [{"budget": 16.0, "routed": found.costs.routed.tolist(),
             "frequency": None if found.frequency is None else found.frequency.tolist()}]


def _eq6(session: Session, run: Run) -> list[dict]:
    predicted = session.statistics(run).costs.routed
    how = (session.restored(), session.calibrating(run), run.candidates, Perturbation(run.perturbation),
           session.settings.batch_size)
    first, true = eq6.first_order(*how), eq6.true_increases(*how)
    return [{"budget": 16.0, "candidates": list(run.candidates), "predicted": predicted.tolist(),
             "first_order": first.tolist(), "true": true.tolist(), "length": session.settings.length}]


KINDS: dict[str, Callable[[Session, Run], list[dict]]] = {
    "quantize": _quantize, "spqr": _outliers, "fp": _full_precision, "statistics": _statistics, "eq6": _eq6,
}


def run_cell(session: Session, run: Run, conditions: dict) -> dict:
    """Compute a cell and return its content; the session's model is left in any state."""
    start, busy = time.perf_counter(), time.process_time()
    stages = KINDS[run.kind](session, run)
    return {
        "model": label(session.name), "seed": session.seed, "run": asdict(run),
        "settings": asdict(session.settings) | {
            "calibration": [Path(s).name for _, s in session.settings.calibration],
            "texts": [n for n, _ in session.settings.texts],
        },
        "parameters": sum(p.numel() for p in session.original.model.parameters()),
        "layers": len(session.moe.moe), "experts": session.moe.num_experts,
        "stages": stages, "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy,
        "conditions": conditions,
    }
