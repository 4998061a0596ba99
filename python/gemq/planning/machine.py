"""Describe the machine that work is planned for: free memory and disk, and speeds measured here or from a data sheet.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gemq.algorithms.gptq import GptqConfig, factorise, quantize_columns
from gemq.generation.memory import free_bytes

# Bytes per second of reading and writing weights: assumed, not measured.
DISK_RATE = 1e9
# Shares of a data sheet's peak and bandwidth that large products and copies reach.
_SHARE, _BANDWIDTH_SHARE = 0.5, 0.8
# of the vendors' data sheets: memory (bytes), dense 16-bit and float32 rates (operations/s), bandwidth (bytes/s)
_SHEETS = {
    "h100": (80e9, 989e12, 67e12, 3.35e12),
    "h200": (141e9, 989e12, 67e12, 4.8e12),
    "a100-80gb": (80e9, 312e12, 19.5e12, 2.04e12),
    "a100-40gb": (40e9, 312e12, 19.5e12, 1.56e12),
    "l40s": (48e9, 362e12, 91.6e12, 0.864e12),
    "rtx4090": (24e9, 165e12, 82.6e12, 1.008e12),
}


@dataclass(frozen=True)
class Rates:
    """Operations per second of large products in the dtype computed in (``matmul``) and of float32 factorisations
    (``factor``), weights per second that GPTQ's column loop rounds (``rounding``), bytes per second of memory
    (``bandwidth``) and disk. ``source`` says where they come from; the disk's is always assumed."""

    matmul: float
    factor: float
    rounding: float
    bandwidth: float
    source: str
    disk: float = DISK_RATE


@dataclass(frozen=True)
class Machine:
    """Free bytes of the device (None: not known, or the CPU), of the host's memory (None: not known) and of the disk
    of the output, and the rates."""

    name: str
    on_cpu: bool
    device_free: int | None
    host_free: int | None
    disk_free: int | None
    rates: Rates | None


def _best(work: Callable[[], object], device: torch.device, least: float = 0.1) -> float:
    """Seconds of the fastest of several runs that together take ``least`` seconds; one run warms up."""
    best, spent = float("inf"), 0.0
    work()
    while spent < least:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        best, spent = min(best, seconds), spent + max(seconds, 1e-6)
    return best


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The rates of this machine, in about a second: a product, a factorisation, a column loop and a copy."""
    generator = torch.Generator().manual_seed(0)
    size, k = (4096, 1024) if device.type == "cuda" else (1024, 512)
    a = torch.randn(size, size, generator=generator).to(device, dtype)
    matmul = 2 * size**3 / _best(lambda: a @ a, device)
    x = torch.randn(2 * k, k, generator=generator).to(device)
    hessian = (x.T @ x)[None]
    config = GptqConfig()
    # counted as the plan counts: as a factorisation, an inverse and a factorisation, k^3 / 3, 2 k^3 / 3 and k^3 / 3
    # multiply-adds, of which the blocked one needs the first
    factor = 8 / 3 * k**3 / _best(lambda: factorise(hessian, config.damping, config.group_size), device)
    known = factorise(hessian, config.damping, config.group_size)
    weight, bits = torch.randn(1, 512, k, generator=generator).to(device), torch.tensor([2], device=device)
    rounding = weight.numel() / _best(lambda: quantize_columns(weight, known, bits, config), device)
    source = torch.empty(64 << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # a copy reads and writes every byte
    bandwidth = 2 * source.numel() / _best(lambda: target.copy_(source), device)
    return Rates(matmul, factor, rounding, bandwidth, "measured on this machine")


def data_sheet(name: str, dtype: torch.dtype) -> tuple[int, Rates]:
    """``(memory in bytes, rates)`` of a GPU by name; ``ValueError`` names those that are known."""
    if name not in _SHEETS:
        raise ValueError(f"device must be cpu, cuda, cuda:N or one of {', '.join(_SHEETS)}, got {name!r}")
    memory, half, single, bandwidth = _SHEETS[name]
    peak = single if dtype == torch.float32 else half
    # GPTQ runs in float32; its loop reads and writes a group's columns about a hundred times
    rates = Rates(
        _SHARE * peak, 0.2 * _SHARE * single, bandwidth / 1000, _BANDWIDTH_SHARE * bandwidth,
        f"estimated: {100 * _SHARE:.0f}% of the data sheet's rates of {name}",
    )
    return int(memory), rates


def _limit(file: str) -> int | None:
    try:
        text = Path(file).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def free_host_bytes() -> int | None:
    """Memory that this process could still take: what the machine has available, within its control group."""
    available = free_bytes(torch.device("cpu"))
    limit, used = _limit("/sys/fs/cgroup/memory.max"), _limit("/sys/fs/cgroup/memory.current")
    if limit is None or used is None:
        return available
    # the group's page cache is freed when memory is needed
    stat = Path("/sys/fs/cgroup/memory.stat")
    files = 0
    if stat.is_file():
        files = sum(int(line.split()[1]) for line in stat.read_text().splitlines() if line.startswith("inactive_file "))
    left = max(0, limit - used + files)
    return left if available is None else min(available, left)


def free_disk_bytes(path: str | os.PathLike) -> int | None:
    """Free bytes of the file system that ``path`` will be on; None if unknown."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def this_machine(
    device: torch.device, output: str | os.PathLike, dtype: torch.dtype, rates: bool, processes: int = 1
) -> Machine:
    """Measure this machine: the free memory for each of several ``processes`` and the free disk, in bytes, and with
    ``rates`` how fast it computes."""
    on_cpu, host = device.type == "cpu", free_host_bytes()
    return Machine(
        str(device), on_cpu, None if on_cpu else free_bytes(device), None if host is None else host // processes,
        free_disk_bytes(output),
        measure_rates(device, dtype) if rates else None,
    )


def other_machine(name: str, dtype: torch.dtype) -> Machine:
    """Describe a GPU of another machine by its data sheet; its host and disk are unknown."""
    memory, rates = data_sheet(name, dtype)
    return Machine(name, False, memory, None, None, rates)
