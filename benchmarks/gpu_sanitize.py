"""A short run of every kind of kernel, small enough for compute-sanitizer.

    compute-sanitizer --tool memcheck python benchmarks/gpu_sanitize.py

One decode and one prefill expert block with all widths, odd row counts and ids that route nowhere, and pack, unpack,
dequantize and repack where the extension is built; each compared with its reference.
"""

from __future__ import annotations

import torch

from gemq import ops, reference
from gemq.ops import measuring

BITS = [1, 2, 3, 4, 8, 0]


def check(name: str, out: torch.Tensor, expected: torch.Tensor, allowed: float) -> None:
    error = float((out.cpu().double() - expected.double()).norm() / expected.double().norm())
    print(f"{name}: relative error {error:.1e}")
    if not error <= allowed:
        raise SystemExit(f"{name}: relative error {error:.1e} is above {allowed:.0e}")


def block(tokens: int, hidden: int = 256, ffn: int = 192) -> None:
    generator = torch.Generator().manual_seed(tokens)
    gate_up = measuring.random_stack(BITS, 2 * ffn, hidden, 64, "gpu_tile", "cpu", generator)
    down = measuring.random_stack(BITS[::-1], hidden, ffn, 64, "gpu_tile", "cpu", generator)
    x = torch.randn(tokens, hidden, generator=generator).half()
    ids, weights = measuring.random_routing(tokens, len(BITS), 2, "cpu", generator)
    ids[0, 1] = -1
    options = {"intermediate": ffn, "group_size": 64, "layout": "gpu_tile"}
    expected = reference.moe_lowbit_ffn(x, gate_up, down, ids, weights, compute_dtype=torch.float64, **options)
    stacks = [tuple(t.cuda() for t in stack) for stack in (gate_up, down)]
    out = ops.moe_lowbit_ffn(x.cuda(), *stacks, ids.cuda(), weights.cuda(), **options)
    check(f"block, {tokens} tokens", out, expected, 1e-3)


def core(bits: int, n: int = 100, k: int = 384) -> None:
    codes = torch.randint(0, 1 << bits, (n, k), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    meta = torch.rand(n, k // 128, 2).half()
    packed = ops.pack(codes.cuda(), bits)
    assert torch.equal(ops.unpack(packed, bits, k).cpu(), codes)
    dense = ops.dequantize(packed, meta.cuda(), bits, k, 128, torch.float32)
    check(f"dequantize, {bits} bits", dense, reference.dequantize(packed.cpu(), meta, bits, k, 128), 1e-6)
    there = ops.repack(packed.flatten(), meta.cuda().flatten(), bits, n, k, 128, target="gpu_tile")
    back, _ = ops.repack(*there, bits, n, k, 128, source="gpu_tile", target="canonical")
    assert torch.equal(back, packed.flatten())


def main() -> None:
    for tokens in (1, 3, 40):
        block(tokens)
    try:
        from gemq import _C  # noqa: F401
    except ImportError:
        print("no extension: pack, unpack, dequantize and repack were not run")
    else:
        for bits in (1, 3, 8):
            core(bits)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
