"""Throughput of packing, unpacking, dequantizing and repacking beside a plain copy of as many bytes.

``pytest --benchmark-only benchmarks/bench_core.py``; runs on the CPU, and on CUDA where there is one, with inputs
larger than its L2 cache, timed by events. ``extra_info`` holds the bytes read plus written, GB/s of the median, GB/s of
a copy of the same number of bytes measured right after, and their ratio in percent.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch

from gemq import format as fmt
from gemq import ops

WIDTHS = range(1, 9)
# rows, columns; on CUDA 512 million codes, of which one bit each is already more than an L2 cache of 50 MB
SHAPES = {"cpu": (4096, 4096), "cuda": (65536, 8192)}
GROUP = 128
ROUNDS = 15
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
OUTPUTS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
OPS = ["pack", "unpack", *(f"dequantize_{name}" for name in OUTPUTS)]
OPS += [f"repack_{way}_{tile}" for tile in ("cpu_tile", "gpu_tile") for way in ("to", "from")]


def seconds(device: str, call: Callable[[], object], rounds: int = ROUNDS) -> list[float]:
    """Seconds of every round after two to warm up; on CUDA by events, which leave out the launch's time in Python."""
    found = []
    for _ in range(rounds + 2):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return found[2:]


def copy_of(moved: int, device: str) -> Callable[[], object]:
    """Return a copy that reads and writes ``moved`` bytes in all, into memory that is allocated already."""
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def run(benchmark, device: str, moved: int, call: Callable[[], object]) -> None:
    """Time ``call`` and a copy of as many bytes in turn, and note both."""
    info = benchmark.extra_info
    info["device"] = device if device == "cpu" else torch.cuda.get_device_name()
    info["threads"] = torch.get_num_threads()
    copy = copy_of(moved, device)
    ours, copies = seconds(device, call), seconds(device, copy)
    # pytest-benchmark's own table: wall time of the same call
    benchmark.pedantic(lambda: (call(), torch.cuda.synchronize() if device == "cuda" else None), rounds=3)
    rate, best = (moved / statistics.median(times) / 1e9 for times in (ours, copies))
    info.update({"bytes": moved, "GB/s": rate, "copy GB/s": best, "% of copy": 100 * rate / best})


def matrix(bits: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = SHAPES[device]
    generator = torch.Generator(device).manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8, generator=generator, device=device)
    meta = torch.rand(rows, columns // GROUP, 2, generator=generator, device=device).half()
    return codes, ops.pack(codes, bits), meta


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("op", OPS)
def test_throughput(benchmark, op: str, bits: int, device: str) -> None:
    """Outputs are new tensors each time: on a CPU their pages may be fresh ones, which a copy's target are not."""
    (rows, columns), (codes, packed, meta) = SHAPES[device], matrix(bits, device)
    plain, small, pairs = codes.numel(), packed.numel(), 2 * meta.numel()
    if op == "pack":
        run(benchmark, device, plain + small, lambda: ops.pack(codes, bits))
    elif op == "unpack":
        run(benchmark, device, plain + small, lambda: ops.unpack(packed, bits, columns))
    elif op.startswith("dequantize"):
        dtype = OUTPUTS[op.removeprefix("dequantize_")]
        moved = dtype.itemsize * plain + small + pairs
        run(benchmark, device, moved, lambda: ops.dequantize(packed, meta, bits, columns, GROUP, dtype))
    else:
        _, way, layout = op.split("_", 2)
        source = (packed.flatten(), meta.flatten())
        moved = small + 2 * pairs + fmt.codes_bytes(rows, columns, bits, layout)
        ends = {"source": "canonical", "target": layout}
        if way == "from":
            source = ops.repack(*source, bits, rows, columns, GROUP, **ends)
            ends = {"source": layout, "target": "canonical"}
        run(benchmark, device, moved, lambda: ops.repack(*source, bits, rows, columns, GROUP, **ends))
