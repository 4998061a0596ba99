"""Check an assumption of the kernels: tensor cores keep fp16 subnormals. Also measure the GPU's copy bandwidth.

    python benchmarks/gpu_subnormals.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import torch
import triton
import triton.language as tl


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr):
    i = tl.arange(0, 64)
    k = tl.arange(0, 32)
    n = tl.arange(0, 8)
    a = tl.load(a_ptr + i[:, None] * 32 + k[None, :])
    b = tl.load(b_ptr + k[:, None] * 8 + n[None, :])
    tl.store(out_ptr + i[:, None] * 8 + n[None, :], tl.dot(a, b, out_dtype=tl.float32))


def subnormals_are_kept() -> tuple[bool, float]:
    """Every subnormal ``q * 2**-24``, q in 0..1023, times large powers of two, against float64: exact or not."""
    worst = 0.0
    for start in range(0, 1024, 64):
        q = torch.arange(start, start + 64, dtype=torch.int16, device="cuda")
        a = q.view(torch.float16)[:, None].expand(64, 32).contiguous()
        b = torch.exp2(torch.randint(-8, 15, (32, 8), device="cuda").double()).half()
        out = torch.empty(64, 8, dtype=torch.float32, device="cuda")
        dot_kernel[(1,)](a, b, out, num_warps=1)
        expected = a.double() @ b.double()
        worst = max(worst, float(((out.double() - expected).abs() / expected.abs().clamp_min(1e-30)).max()))
    # sums of 32 exact products, rounded to float32 at most 32 times
    return worst < 1e-5, worst


def copy_bandwidth(megabytes: int = 1024, repeats: int = 20) -> float:
    """Bytes read and written a second, in GB/s, median of copies far larger than the L2."""
    source = torch.empty(megabytes << 20, dtype=torch.uint8, device="cuda").random_(0, 255)
    target = torch.empty_like(source)
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return 2 * source.numel() / sorted(times[3:])[repeats // 2] / 1e9


def facts() -> dict:
    """Device and versions, to stand beside every figure."""
    p = torch.cuda.get_device_properties(0)
    return {
        "device": p.name, "sms": p.multi_processor_count, "memory_gib": round(p.total_memory / 2**30, 1),
        "capability": f"{p.major}.{p.minor}", "torch": torch.__version__, "triton": triton.__version__,
        "cuda": torch.version.cuda, "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    kept, worst = subnormals_are_kept()
    row = facts() | {"subnormals_kept": kept, "worst_relative_error": worst, "copy_gb_s": round(copy_bandwidth(), 1)}
    print(json.dumps(row, indent=1))
    if args.json:
        args.json.write_text(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
