"""Find launch parameters of the Triton kernels on the present GPU, and write the table of launches.

``gemq tune`` is this from the command line. What may be varied is data (``triton_kernels/tuned/search_space.json``);
the search times whole expert blocks, one parameter at a time, and writes after every amount of tokens, so a run that
is cut short keeps what it has.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from gemq import durable
from gemq import format as fmt
from gemq.errors import DeviceError
from gemq.ops import measuring
from gemq.triton_kernels import launch_tables

logger = logging.getLogger(__name__)

# parameters by kind of launch: {"decode.ffn": {"warps": 4, ...}, ...}
Parameters = dict[str, dict]
Timer = Callable[["Shape", int, Parameters], float]

DECODE_TOKENS = (1, 4, 8, 16)
PREFILL_TOKENS_PER_EXPERT = (16, 64, 256)
# a change has to gain this much: less is noise
LEAST_GAIN = 0.01


@dataclass(frozen=True)
class Shape:
    """An expert block: ``experts`` of ``hidden`` -> ``ffn`` -> ``hidden``, ``top_k`` of them a token."""

    hidden: int
    ffn: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"{self.hidden}x{self.ffn}x{self.experts}x{self.top_k}"

    def product(self, kind: str) -> dict[str, int]:
        """Key by which the launch of ``kind`` is looked up in a table."""
        n, k = (self.hidden, self.ffn) if kind.endswith(".gemm") else (self.ffn, self.hidden)
        return {"n": n, "k": k, "experts": self.experts, "top_k": self.top_k}


PRESETS = {
    "mixtral-8x7b": Shape(4096, 14336, 8, 2),
    "deepseek-v2-lite": Shape(2048, 1408, 64, 6),
    "qwen1.5-moe": Shape(2048, 1408, 60, 4),
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
}


def parse_shape(text: str) -> Shape:
    """A name of :data:`PRESETS`, or ``HIDDENxFFNxEXPERTSxTOPK``; ``ValueError`` for anything else."""
    if text in PRESETS:
        return PRESETS[text]
    parts = text.lower().split("x")
    if len(parts) == 4 and all(p.isascii() and p.isdigit() and int(p) > 0 for p in parts):
        shape = Shape(*map(int, parts))
        if shape.top_k <= shape.experts and shape.hidden % 32 == 0 and shape.ffn % 32 == 0:
            return shape
    raise ValueError(
        f"--shape must be one of {', '.join(PRESETS)} or HIDDENxFFNxEXPERTSxTOPK with sizes that are multiples of 32 "
        f"and TOPK <= EXPERTS, got {text!r}"
    )


@dataclass(frozen=True)
class Found:
    """Result for one amount of tokens: ``us`` with ``parameters``, and ``default_us`` before the search, in
    microseconds."""

    shape: Shape
    tokens: int
    parameters: Parameters
    us: float
    default_us: float
    trials: int


def descend(space: dict[str, dict[str, list]], measure: Callable[[Parameters], float], rounds: int = 2) -> tuple:
    """Coordinate descent from the tables' own parameters: each parameter in turn, others as best so far.

    ``measure`` returns microseconds, or infinity for parameters that cannot be launched; ``measure({})`` is what the
    tables give. Returns ``(parameters that were changed, microseconds, microseconds of the start, trials)``.
    """
    best: Parameters = {}
    start = fastest = measure(best)
    seen = {json.dumps(best, sort_keys=True): start}
    for _ in range(rounds):
        before = fastest
        for kind, options in space.items():
            for name, values in options.items():
                for value in values:
                    candidate = best | {kind: best.get(kind, {}) | {name: value}}
                    key = json.dumps(candidate, sort_keys=True)
                    if key not in seen:
                        seen[key] = measure(candidate)
                        if seen[key] < fastest * (1 - LEAST_GAIN):
                            best, fastest = candidate, seen[key]
        if fastest >= before:
            break
    return best, fastest, start, len(seen)


def amounts(shape: Shape, decode_tokens: int) -> list[tuple[str, float, int]]:
    """List the measurements ``(phase, up_to, tokens)`` of a shape. Prefill is measured only with more tokens than
    decode takes."""
    found: list[tuple[str, float, int]] = [("decode", t, t) for t in DECODE_TOKENS if t <= decode_tokens]
    for per_expert in PREFILL_TOKENS_PER_EXPERT:
        tokens = math.ceil(per_expert * shape.experts / shape.top_k)
        if tokens > decode_tokens:
            found.append(("prefill", per_expert, tokens))
    return found


class CudaTimer:
    """Median microseconds of a random expert block with given launch parameters, on the current CUDA device.

    Layers and routings are rotated so that together they exceed the L2; one CUDA graph holds a pass over them.
    """

    def __init__(self, bits: Sequence[int] = (1, 2, 3), repeats: int = 15) -> None:
        self.bits, self.repeats = tuple(bits), repeats
        self._held: tuple[Shape, list] | None = None

    def _layers(self, shape: Shape) -> list:
        if self._held is None or self._held[0] != shape:
            self._held = None
            torch.cuda.empty_cache()
            bits = [self.bits[e % len(self.bits)] for e in range(shape.experts)]
            active = 3 * shape.hidden * shape.ffn * shape.top_k * sum(bits) / len(bits) / 8
            cache = torch.cuda.get_device_properties(0).L2_cache_size
            groups = fmt.default_group_size(shape.hidden), fmt.default_group_size(shape.ffn)
            self._held = shape, [
                (measuring.random_stack(bits, 2 * shape.ffn, shape.hidden, groups[0], "gpu_tile", "cuda"),
                 measuring.random_stack(bits, shape.hidden, shape.ffn, groups[1], "gpu_tile", "cuda"), groups)
                for _ in range(max(2, min(24, math.ceil(4 * cache / active))))
            ]  # fmt: skip
        return self._held[1]

    def __call__(self, shape: Shape, tokens: int, parameters: Parameters) -> float:
        from gemq.triton_kernels import moe_ffn

        layers = self._layers(shape)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(tokens, shape.hidden, generator=generator).half().cuda()
        routes = [measuring.random_routing(tokens, shape.experts, shape.top_k, "cuda", generator) for _ in layers]

        def run() -> None:
            for (gate_up, down, groups), (ids, weights) in zip(layers, routes, strict=True):
                moe_ffn(x, gate_up, down, ids, weights, intermediate=shape.ffn, group_size=groups[0],
                        down_group_size=groups[1])  # fmt: skip

        with launch_tables.forced(parameters):
            graph = measuring.graph_of(run)
        times = sorted(measuring.event_time(graph.replay) for _ in range(self.repeats + 3))
        return times[len(times) // 2] / len(layers)


def _measured(timer: Timer, shape: Shape, tokens: int, parameters: Parameters) -> float:
    try:
        return timer(shape, tokens, parameters)
    except (RuntimeError, ValueError, AssertionError) as error:
        if not parameters:
            raise
        # too many registers or too much shared memory, say: not a candidate
        logger.debug("%s with %s tokens cannot run with %s: %s", shape, tokens, parameters, error)
        return math.inf
    except Exception as error:
        # triton's own errors of compilation derive from Exception alone
        if not parameters or not type(error).__module__.startswith("triton"):
            raise
        logger.debug("%s with %s tokens does not compile with %s: %s", shape, tokens, parameters, error)
        return math.inf


def merged(entries: list[dict], new: list[dict]) -> list[dict]:
    """Replace the entries of the same kind, shape and amount by those of ``new``."""

    def key(entry: dict) -> tuple:
        return entry["kind"], *(entry[name] for name in launch_tables.SHAPE), entry["up_to"]

    replaced = {key(e) for e in new}
    return sorted([e for e in entries if key(e) not in replaced] + new, key=key)


def write_table(path: Path, device_name: str, entries: list[dict]) -> None:
    """Write a launch table, atomically: a reader finds the old one or the whole new one."""
    for entry in entries:
        launch_tables.check_entry(entry)
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("  " + json.dumps(entry) for entry in entries)
    text = f'{{"version": {launch_tables.VERSION}, "device": {json.dumps(device_name)}, "entries": [\n{lines}\n]}}\n'
    durable.replace(path, text.encode())


def _entries_of(path: Path) -> list[dict]:
    return launch_tables.read_entries(path) if path.exists() else []


def check_device() -> str:
    """The name of the CUDA device that would be tuned; :class:`DeviceError` if there is none."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise DeviceError("gemq tune times compiled kernels: unset TRITON_INTERPRET")
    if not torch.cuda.is_available():
        raise DeviceError("gemq tune needs a CUDA device, and torch finds none on this machine")
    return torch.cuda.get_device_name()


def tune(
    shapes: Sequence[Shape], output: Path | None = None, *, bits: Sequence[int] = (1, 2, 3),
    budget: float | None = None, timer: Timer | None = None, device_name: str | None = None,
    report: Callable[[str, int, int], None] | None = None,
) -> tuple[Path, list[Found]]:
    """Search launch parameters for ``shapes`` and merge them into the device's table.

    Args:
        shapes: expert blocks.
        output: the table's file (default: :func:`gemq.triton_kernels.launch_tables.user_table`, where launches look
            first).
        bits: widths of the random experts, repeated over a layer.
        budget: seconds after which no further amount of tokens is started.
        timer: ``(shape, tokens, parameters) -> microseconds`` (default: :class:`CudaTimer`).
        device_name: of the table (default: the present CUDA device).
        report: called with ``(stage, done, total)``.

    Returns the table's path and what was found, in order. Raises :class:`gemq.errors.DeviceError` without a CUDA
    device (if ``timer`` and ``device_name`` are not given) or without a place for the table.
    """
    device_name = device_name or check_device()
    path = output or launch_tables.user_table(device_name)
    if path is None:
        raise DeviceError("there is no home directory for the table: give --output FILE")
    timer = timer or CudaTimer(bits)
    plan = [(s, *a) for s in shapes for a in amounts(s, launch_tables.sections(device_name)["decode_tokens"])]
    space, entries, found = launch_tables.search_space(), _entries_of(path), []
    begin = time.monotonic()
    for done, (shape, phase, up_to, tokens) in enumerate(plan):
        if report:
            report("tune", done, len(plan))
        if budget is not None and time.monotonic() - begin > budget:
            break
        options = {kind: values for kind, values in space.items() if kind.startswith(phase)}
        best, us, default_us, count = descend(options, partial(_measured, timer, shape, tokens))
        found.append(Found(shape, tokens, best, us, default_us, count))
        new = [
            {"kind": kind, **shape.product(kind), "up_to": up_to, "parameters": best.get(kind, {}), "us": round(us, 2)}
            for kind in options
        ]
        entries = merged(entries, new)
        write_table(path, device_name, entries)
    launch_tables.forget()
    return path, found
