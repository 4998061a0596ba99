"""Packed expert blocks beside the same blocks unquantized, dequantized first, and other people's kernels.

    pytest --benchmark-only benchmarks/bench_moe.py --rows-json rows.json [--budget 300] [--peer module:function]

One test a row. Times are medians over rotated layers and inputs, on CUDA from events around a CUDA graph where one can
be captured (the row's ``graph`` says so); pytest-benchmark's own column is the wall clock around the same calls. Every
result is compared with a float32 product of the same weights first: a wrong one fails instead of giving a figure.
``shapes.py`` has the cases, ``layers.py`` and ``baselines.py`` what runs.
"""

from __future__ import annotations

import time

import pytest
import torch
from baselines import Unquantized, Weights, forget_compiled
from layers import Unsupported, packed_layer
from measure import TOLERANCE, Rows, Step, Stopwatch, copies, limits, relative_error
from record import conditions
from shapes import Case, cpu_cases, gpu_cases

from gemq.ops import measuring

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# seconds of samples a row on the CPU, and up to how many tokens results are checked
ENOUGH, CHECKED = 0.8, 512 if CUDA else 16

pytestmark = pytest.mark.filterwarnings("ignore")  # other people's warnings are not what is tested here


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    options = metafunc.config.option
    peers = tuple(options.peer)
    cases = gpu_cases(peers, options.budget is not None) if CUDA else cpu_cases(peers)
    metafunc.parametrize("case", cases, ids=str)


@pytest.fixture(scope="module")
def started() -> float:
    """Time at which the first case began, in seconds of the monotonic clock."""
    return time.monotonic()


@pytest.fixture(scope="module")
def board(request: pytest.FixtureRequest) -> Rows:
    """The rows of this run."""
    path = request.config.option.rows_json
    return Rows(conditions(request.config.option.recorded_command), limits(DEVICE), path)


class Layers:
    """The layers of the case before, kept while the next one needs the same."""

    def __init__(self) -> None:
        self.key: tuple | None = None
        self.made: list = []

    def of(self, case: Case, make, count: int) -> list:
        if self.key != case.layer_key:
            self.made.clear()
            if CUDA:
                torch.cuda.empty_cache()
            self.key = case.layer_key
        while len(self.made) < count:
            self.made.append(make(len(self.made)))
        return self.made[:count]


@pytest.fixture(scope="module")
def layers() -> Layers:
    return Layers()


def prepare(case: Case, layers: Layers) -> list[Step]:
    """The steps to rotate; raises :class:`Unsupported`."""
    block, generator = case.block, torch.Generator().manual_seed(case.tokens)
    dtype = getattr(torch, case.dtype or ("float16" if CUDA else "float32"))

    def make(seed: int):
        return packed_layer(case, seed, DEVICE) if case.mix else Weights(block, seed, DEVICE, dtype)

    [first] = layers.of(case, make, 1)
    active = min(case.tokens * block.top_k, block.experts)
    count = copies(first.bytes_of(list(range(active))), first.bytes_of(list(range(block.experts))), DEVICE)
    steps = []
    for held in layers.of(case, make, count):
        layer = held if case.mix else Unquantized(held, case.provider, case.tokens, case.compiled)
        x = torch.randn(case.tokens, block.hidden, generator=generator).to(DEVICE, dtype)
        routing = measuring.random_routing(case.tokens, block.experts, block.top_k, DEVICE, generator)
        steps.append(Step(layer, x, *routing))
    return steps


def checked_error(step: Step) -> float | None:
    """The relative error of a step; None where the extension, which unpacks the weights to compare with, is missing."""
    try:
        return relative_error(step)
    except ImportError:
        return None


def sampled(benchmark, watch: Stopwatch) -> None:
    """Warm up, then as many samples as fit in the time, through pytest-benchmark."""
    begin = time.perf_counter()
    watch.sample()
    watch.sample()
    rounds = 30 if CUDA else max(4, min(40, int(ENOUGH / ((time.perf_counter() - begin) / 2))))
    watch.samples.clear()
    benchmark.pedantic(watch.sample, rounds=rounds, iterations=1)


@torch.inference_mode()
def test_block(benchmark, case: Case, started: float, layers: Layers, request: pytest.FixtureRequest) -> None:
    budget = request.config.option.budget
    if budget is not None and time.monotonic() - started > budget:
        pytest.skip(f"the budget of {budget:g} s is spent")
    board: Rows = request.getfixturevalue("board")
    if case.compiled:
        forget_compiled()
    try:
        steps = prepare(case, layers)
        error = checked_error(steps[0]) if case.tokens <= CHECKED else None
        watch = Stopwatch(steps, DEVICE)
    except (Unsupported, torch.OutOfMemoryError, ImportError, NotImplementedError) as why:
        board.add(case, unsupported=f"{type(why).__name__}: {str(why).splitlines()[0][:200]}")
        pytest.skip(str(why).splitlines()[0][:200])
    except RuntimeError as why:
        # an unquantized way that torch does not have for this device, type or shape
        if case.mix is not None:
            raise
        board.add(case, unsupported=f"{type(why).__name__}: {str(why).splitlines()[0][:200]}")
        pytest.skip(str(why).splitlines()[0][:200])
    if error is not None and not error < TOLERANCE[steps[0].x.dtype]:
        board.add(case, unsupported=f"wrong result, relative error {error:.1e}")
        pytest.fail(f"{case}: relative error {error:.1e}")
    sampled(benchmark, watch)
    bits = getattr(steps[0].layer, "bits", None)
    row = board.add(
        case, **watch.percentiles(), bytes=int(sum(s.bytes() for s in steps) / len(steps)),
        flops=case.block.flops(case.tokens), bits=None if bits is None else sum(bits) / len(bits),
        rotated=len(steps), samples=len(watch.samples), graph=watch.graph is not None, no_graph=watch.no_graph,
        relative_error=error,
    )
    benchmark.extra_info.update(row | board.limits)
