"""Throughput of packing, unpacking, dequantizing and repacking beside a plain copy of the same bytes.

``pytest --benchmark-only benchmarks/bench_core.py``; runs on the CPU, and on CUDA where there is one. ``extra_info``
holds bytes read plus written and GB/s of the median.
"""

from __future__ import annotations

import pytest
import torch

from gemq import format as fmt
from gemq import ops

ROWS, COLUMNS, GROUP = 4096, 4096, 128
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def run(benchmark, device: str, moved: int, call) -> None:
    """Time ``call`` (synchronised on CUDA) and note the bandwidth."""

    def timed():
        out = call()
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    benchmark.extra_info["device"] = device if device == "cpu" else torch.cuda.get_device_name()
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(timed, rounds=15, warmup_rounds=2)
    benchmark.extra_info["bytes"] = moved
    benchmark.extra_info["GB/s"] = moved / benchmark.stats.stats.median / 1e9


def matrix(bits: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (ROWS, COLUMNS), dtype=torch.uint8, generator=generator).to(device)
    meta = torch.rand(ROWS, COLUMNS // GROUP, 2, generator=generator).half().to(device)
    return codes, ops.pack(codes, bits), meta


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("op", ["pack", "unpack", "dequantize", "repack_cpu_tile", "repack_gpu_tile"])
def test_throughput(benchmark, op: str, bits: int, device: str) -> None:
    codes, packed, meta = matrix(bits, device)
    plain, small, pairs = codes.numel(), packed.numel(), 2 * meta.numel()
    if op == "pack":
        run(benchmark, device, plain + small, lambda: ops.pack(codes, bits))
    elif op == "unpack":
        run(benchmark, device, plain + small, lambda: ops.unpack(packed, bits, COLUMNS))
    elif op == "dequantize":
        run(benchmark, device, 2 * plain + small + pairs,
            lambda: ops.dequantize(packed, meta, bits, COLUMNS, GROUP, torch.float16))
    else:
        target = op.removeprefix("repack_")
        flat, flat_meta = packed.flatten(), meta.flatten()
        moved = small + 2 * pairs + fmt.codes_bytes(ROWS, COLUMNS, bits, target)
        run(benchmark, device, moved,
            lambda: ops.repack(flat, flat_meta, bits, ROWS, COLUMNS, GROUP, target=target))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("megabytes", [4, 16, 48])
def test_copy(benchmark, megabytes: int, device: str) -> None:
    """The yardstick: a copy into existing memory."""
    source = torch.randint(0, 256, (megabytes << 20,), dtype=torch.uint8).to(device)
    target = torch.empty_like(source)
    run(benchmark, device, 2 * source.numel(), lambda: target.copy_(source))
