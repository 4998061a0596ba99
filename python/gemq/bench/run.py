"""``gemq bench``: one configuration measured, as numbers and as JSON."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gemq import __version__, durable
from gemq.bench import baseline, random_model
from gemq.bench.architectures import load_config, meta_model
from gemq.bench.measuring import Measurement, measure, reset_peaks
from gemq.bench.random_model import Mix
from gemq.bench.roofline import copy_bandwidth
from gemq.errors import OutOfMemoryError, first_line
from gemq.format import UNQUANTIZED
from gemq.generation import MAX_BATCH, MODES
from gemq.models.ends import check_end_bits
from gemq.packed_config import PackedConfig
from gemq.pipeline import parse_dtype, pick_device
from gemq.plain_json import dumps

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Report = Callable[[str], None]
SHARED_BITS = {"deepseek_v2": 3}


@dataclass(frozen=True)
class BenchConfig:
    """Options of a benchmark.

    ``bits`` is the mean of the routed experts (16: unquantized), ``mix`` shares of widths instead of it.
    ``shared_bits`` None takes 3 for DeepSeek-V2, as in the published allocations, else 4. ``baseline`` is for 16 bits:
    a name of :data:`gemq.bench.baseline.IMPLEMENTATIONS` or "all". Raises ``ValueError`` naming the field.
    """

    model_config: str
    bits: float | None = None
    mix: Mix | None = None
    layers: int | None = None
    attention_bits: int = 4
    shared_bits: int | None = None
    baseline: str = "all"
    tokens: int = 200
    batch: int = 1
    prompt_length: int = 128
    compile: str = "auto"
    device: str | None = None
    dtype: str = "auto"
    seed: int = 0
    profile_steps: int = 4
    prompt_repeats: int = 3
    head_bits: int = UNQUANTIZED
    embedding_bits: int = UNQUANTIZED

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.mix is None):
            raise ValueError("give bits or a mix of widths, one of them")
        if self.bits is not None and not self.unquantized:
            random_model.mix_for(self.bits)
        for name, low, high in (("batch", 1, MAX_BATCH), ("tokens", 2, 1 << 20), ("prompt_length", 1, 1 << 20),
                                ("prompt_repeats", 1, 1000)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be in {low}..{high}, got {getattr(self, name)}")
        for name in ("attention_bits", "shared_bits"):
            value = getattr(self, name)
            if value is not None and not (1 <= value <= 8 or value == UNQUANTIZED):
                raise ValueError(f"{name} must be in 1..8 or {UNQUANTIZED}, got {value}")
        check_end_bits("head_bits", self.head_bits)
        check_end_bits("embedding_bits", self.embedding_bits)
        if self.compile not in MODES:
            raise ValueError(f"compile must be one of {', '.join(MODES)}, got {self.compile!r}")
        if self.baseline != "all" and self.baseline not in baseline.IMPLEMENTATIONS:
            names = ", ".join(baseline.IMPLEMENTATIONS)
            raise ValueError(f"baseline must be one of {names} or all, got {self.baseline!r}")

    @property
    def unquantized(self) -> bool:
        """True if the 16-bit model is measured."""
        return self.bits == UNQUANTIZED


@dataclass(frozen=True)
class BenchResult:
    """Results of a benchmark: ``runs`` by name ("gemq", or the experts implementation of a baseline), ``failures`` with
    the reason for each baseline that could not run, ``strongest`` the fastest run."""

    config: BenchConfig
    model_type: str
    layers: int
    parameters: int
    bits_per_expert: float
    dtype: str
    device: str
    runs: dict[str, Measurement]
    failures: dict[str, str]
    widths: dict[str, float] = field(default_factory=dict)

    @property
    def strongest(self) -> str:
        """The name of the run with the highest median rate."""
        return max(self.runs, key=lambda name: self.runs[name].tokens_per_second["p50"])

    def to_dict(self) -> dict:
        """Convert to JSON values, with the versions of the packages."""
        import transformers

        return {
            "schema": 1,
            "gemq": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(), "threads": torch.get_num_threads(),
            **asdict(self), "strongest": self.strongest,
        }


def run_bench(config: BenchConfig, report: Report = lambda text: None) -> BenchResult:
    """Build the model with random weights and decode with it.

    Raises :class:`OutOfMemoryError` before anything is built where it cannot fit, ``ValueError`` or
    :class:`gemq.GemqError` for options out of range.
    """
    device = pick_device(config.device)
    architecture = load_config(config.model_config, config.layers)
    length = config.prompt_length + config.tokens + config.profile_steps
    positions = architecture.get_text_config().max_position_embeddings
    if length > positions:
        raise ValueError(
            f"prompt_length {config.prompt_length}, tokens {config.tokens} and profile_steps {config.profile_steps} "
            f"must be at most {positions} together, the positions of the model"
        )
    dtype = _dtype(config, architecture)
    reset_peaks(device)
    total = sum(p.numel() for p in meta_model(architecture).parameters())
    layers = architecture.get_text_config().num_hidden_layers
    report(f"{architecture.model_type}, {layers} layers, {total / 1e9:.2f} B parameters")
    if config.unquantized:
        model = random_model.build_unquantized(architecture, dtype, device, config.seed)
        runs, failures = _baselines(config, model, device, report)
        bits, shares = float(UNQUANTIZED), {}
    else:
        plan = _plan(config, architecture)
        model = random_model.build_packed(architecture, plan, dtype, device, config.seed)
        report("decode")
        runs, failures = {"gemq": _measure(config, model, config.compile)}, {}
        bits, shares = plan.widths.bits_per_expert, _shares(plan)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})"
    return BenchResult(
        config, architecture.model_type, layers, total, bits,
        str(dtype).removeprefix("torch."), name, runs, failures, shares,
    )


def _plan(config: BenchConfig, architecture: PreTrainedConfig) -> PackedConfig:
    shared = config.shared_bits or SHARED_BITS.get(architecture.model_type, 4)
    mix = config.mix
    if mix is None:
        assert config.bits is not None
        mix = random_model.mix_for(config.bits)
    return random_model.packed_plan(
        architecture, mix, config.attention_bits, shared, config.head_bits, config.embedding_bits
    )


def _shares(plan: PackedConfig) -> dict[str, float]:
    found = plan.widths.weight_bits
    return {str(b): found.count(b) / len(found) for b in sorted(set(found))}


def _dtype(config: BenchConfig, architecture: PreTrainedConfig) -> torch.dtype:
    """The dtype that was asked for, else the model's own."""
    asked = parse_dtype(config.dtype)
    if isinstance(asked, torch.dtype):
        return asked
    own = getattr(architecture, "dtype", None)
    return own if isinstance(own, torch.dtype) else torch.bfloat16


def _measure(config: BenchConfig, model: nn.Module, compile: str, **options: Any) -> Measurement:
    # every run builds a step of its own: what was compiled for an earlier one is of no use
    torch.compiler.reset()
    return measure(
        model, tokens=config.tokens, batch=config.batch, prompt_length=config.prompt_length, compile=compile,
        profile_steps=config.profile_steps, seed=config.seed, prompt_repeats=config.prompt_repeats, **options,
    )


def _baselines(
    config: BenchConfig, model: nn.Module, device: torch.device, report: Report
) -> tuple[dict[str, Measurement], dict[str, str]]:
    names = list(baseline.IMPLEMENTATIONS) if config.baseline == "all" else [config.baseline]
    compiled = "compile" if config.compile == "auto" and device.type == "cuda" else config.compile
    bandwidth = copy_bandwidth(device)
    runs, failures = {}, {}
    for name in names:
        report(f"decode with {name}")
        reset_peaks(device)
        # the eager loop over experts asks the device which experts are hit, which no graph can hold
        mode = "none" if name == "eager" else compiled
        try:
            runs[name] = _measure(
                config, model, mode, bandwidth=bandwidth,
                phase=lambda phase, name=name: baseline.use_experts(
                    model, baseline.PREFILL if phase == "prefill" else name
                ),
            )
        except (RuntimeError, OutOfMemoryError, NotImplementedError) as error:
            if len(names) == 1:
                raise
            failures[name] = first_line(error)[:300]
    if not runs:
        raise RuntimeError("no baseline could run: " + "; ".join(f"{k}: {v}" for k, v in failures.items()))
    return runs, failures


def write_json(result: BenchResult, path: Path) -> None:
    """Write the result to ``path``, whole or not at all."""
    durable.replace(path, (dumps(result.to_dict(), indent=1) + "\n").encode())
