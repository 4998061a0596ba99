"""Decode a random prompt: time of every step, time to the first token, peak memory, and which kernels take it."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemq.bench.roofline import Roofline, copy_bandwidth, expert_bytes_per_step, other_bytes
from gemq.generation import Decoding, GenerationOptions
from gemq.generation.memory import cache_bytes_per_token
from gemq.generation.text import peak_resident_bytes
from gemq.models.ends import embedding_device

_SETTLING = 3
_COUNTED_STEPS = 8


@dataclass(frozen=True)
class Kernel:
    """A kernel (on the CPU: an operation without those it calls), microseconds a step, calls a step, share of all."""

    name: str
    microseconds: float
    calls: float
    share: float


@dataclass(frozen=True)
class Memory:
    """Bytes. On CUDA the most that torch ``reserved`` (the paper's measure) and ``allocated`` since before the model
    was built, on the CPU the most ``resident`` of the process. ``weights`` is the model's tensors, ``cache`` the keys
    and values of the run."""

    weights: int
    cache: int
    reserved: int | None = None
    allocated: int | None = None
    resident: int | None = None


@dataclass(frozen=True)
class Measurement:
    """Decoding of one model. ``tokens_per_second`` is of the whole batch, by the median, 20% and 80% step times
    (``p20`` of the rate goes with the slow steps). Times are in seconds; ``first_token`` is over the repeats of the
    prompt and ``first_token_seconds`` its median."""

    mode: str
    step: str
    batch: int
    prompt_length: int
    tokens: int
    tokens_per_second: dict[str, float]
    step_seconds: dict[str, float]
    first_token_seconds: float
    setup_seconds: float
    memory: Memory
    roofline: Roofline
    kernels: list[Kernel]
    first_token: dict[str, float]

    def to_dict(self) -> dict:
        """Convert to JSON values."""
        return asdict(self)


def reset_peaks(device: torch.device) -> None:
    """Reset the recorded peaks of memory. Call it before the model is built."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def measure(
    model: Any, *, tokens: int = 200, batch: int = 1, prompt_length: int = 128, compile: str = "auto",
    profile_steps: int = 4, seed: int = 0, bandwidth: float | None = None, prompt_repeats: int = 1,
    phase: Callable[[str], None] = lambda name: None,
) -> Measurement:
    """Decode ``tokens`` tokens for each of ``batch`` random prompts of ``prompt_length`` tokens, greedily.

    The first run of the prompt only warms up; ``prompt_repeats`` more, and that before the decoding among them, time
    the first token. ``profile_steps`` 0 leaves the breakdown out. ``bandwidth`` is that of
    :func:`copy_bandwidth` if it is known already. ``phase`` is called with "prefill" and "decode" before each.
    """
    device = embedding_device(model)
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(0, vocabulary, (batch, prompt_length), generator=generator).to(device)
    phase("prefill")
    for _ in Decoding(model, prompt, None, _options(1), compile=compile):
        pass
    first = []
    for _ in range(prompt_repeats - 1):
        again = Decoding(model, prompt, None, _options(1), compile=compile)
        for _ in again:
            pass
        first.append(again.timing.prefill)
    decoding = Decoding(model, prompt, None, _options(tokens + profile_steps), compile=compile)
    stream, times = iter(decoding), []
    previous = None
    for _ in range(tokens):
        next(stream)
        now = time.perf_counter()
        if previous is None:
            phase("decode")
        else:
            times.append(now - previous)
        previous = now
    memory = _memory(model, decoding, device)
    kernels = _profile(stream, decoding, profile_steps, device) if profile_steps else []
    stream.close()
    # the first steps compile, capture and fill caches
    steady = times[_SETTLING:] or times[1:] or times or [decoding.timing.prefill]
    median = statistics.median(steady)
    phase("prefill")
    experts = expert_bytes_per_step(model, _counting(model, prompt))
    touched = experts + other_bytes(model, batch)
    bandwidth = bandwidth or copy_bandwidth(device)
    first.append(decoding.timing.prefill)
    low, high = _quantile(steady, 0.2), _quantile(steady, 0.8)
    assert decoding.step_kind is not None
    return Measurement(
        decoding.mode, decoding.step_kind, batch, prompt_length, tokens,
        {"p50": batch / median, "p20": batch / high, "p80": batch / low},
        _percentiles(steady), statistics.median(first), decoding.timing.setup, memory,
        Roofline(touched, experts, bandwidth, touched / bandwidth / median), kernels, _percentiles(first),
    )


def _options(tokens: int) -> GenerationOptions:
    return GenerationOptions(max_new_tokens=tokens, ignore_eos=True)


def _counting(model: nn.Module, prompt: Tensor) -> Decoding:
    return Decoding(model, prompt, None, _options(_COUNTED_STEPS + 1), compile="none")


def _percentiles(values: list[float]) -> dict[str, float]:
    """The median and the percentiles that a table or a service level asks for."""
    return {"p50": statistics.median(values)} | {f"p{q}": _quantile(values, q / 100) for q in (20, 80, 95, 99)}


def _quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _memory(model: nn.Module, decoding: Decoding, device: torch.device) -> Memory:
    held = {id(t): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    cache = cache_bytes_per_token(model) * decoding.limit * decoding.prompt.shape[0]
    if device.type == "cuda":
        reserved, allocated = torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device)
        return Memory(sum(held.values()), cache, reserved, allocated)
    return Memory(sum(held.values()), cache, resident=peak_resident_bytes())


def _profile(stream: Generator[Tensor], decoding: Decoding, steps: int, device: torch.device) -> list[Kernel]:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda, native = device.type == "cuda", decoding.step_kind == "native"
    if native:
        decoding.step.program.measure()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                next(stream)
        averages = profiler.key_averages()
    if cuda:
        found = [(e.key, e.self_device_time_total, e.count) for e in averages if e.device_type == DeviceType.CUDA]
    else:
        found = [(e.key, e.self_cpu_time_total, e.count) for e in averages]
    if native:
        found = _with_operations(found, decoding.step.program.seconds(), steps)
    total = sum(time for _, time, _ in found) or 1.0
    found.sort(key=lambda item: -item[1])
    return [Kernel(name, time / steps, count / steps, time / total) for name, time, count in found if time > 0]


def _with_operations(
    found: list[tuple[str, float, int]], seconds: list[tuple[str, float]], steps: int
) -> list[tuple[str, float, int]]:
    """Split the compiled step's time by kind of operation; the rest is the cost of entry and exit."""
    kinds: dict[str, list[float]] = {}
    for name, spent in seconds:
        kinds.setdefault(f"gemq::decode_step {name}", []).append(1e6 * spent)
    inside = sum(map(sum, kinds.values()))
    rest = [(n, max(t - inside, 0.0) if n == "gemq::decode_step" else t, c) for n, t, c in found]
    return rest + [(name, sum(times), steps * len(times)) for name, times in kinds.items()]
