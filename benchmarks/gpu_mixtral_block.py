"""One Mixtral-8x7B expert block at a few tokens: packed kernels against fp16 torch, in CUDA graphs.

    python benchmarks/gpu_mixtral_block.py [--json FILE] [--copy-gb-s 3000] [--tokens 1 4 16]

Weights rotate through copies that together exceed the L2 several times, as a model's layers do; a graph holds one
pass over all copies. GB/s counts the bytes of the experts that the tokens were routed to, codes and metadata; the
ideal is those bytes at the measured copy bandwidth. Weights are random bits: the time does not depend on them, and
correctness is checked against the dequantized product here, and in tests/.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from gpu_subnormals import copy_bandwidth, facts

from gemq import format as fmt
from gemq import triton_kernels as tk
from gemq.ops import measuring

HIDDEN, FFN, EXPERTS, TOP_K, GROUP = 4096, 14336, 8, 2, 128
COPIES = 6
MIXES = {
    "1.0": [1] * 8, "1.5": [1, 2] * 4, "2.0": [1, 3, 2, 2, 1, 3, 2, 2], "2.0 uniform": [2] * 8,
    "2.5": [2, 3] * 4, "3.0": [3] * 8, "4.0": [4] * 8,
}


def expert_bytes(bits: int) -> int:
    """Bytes that one expert of ``bits`` reads."""
    total = 0
    for n, k in ((2 * FFN, HIDDEN), (HIDDEN, FFN)):
        total += fmt.codes_bytes(n, k, bits, "gpu_tile") + 2 * fmt.meta_elements(n, k, bits, GROUP, "gpu_tile")
    return total


def routing(tokens: int, copy: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbouring experts, shifted from copy to copy, so that all widths of a mix take their turn."""
    first = torch.arange(tokens) * TOP_K + copy * TOP_K
    ids = torch.stack([(first + j) % EXPERTS for j in range(TOP_K)], 1)
    return ids.cuda(), torch.full((tokens, TOP_K), 1 / TOP_K, device="cuda")


def timed(run, repeats: int = 60) -> dict[str, float]:
    """Microseconds for one of the ``COPIES`` calls that ``run`` makes, replayed from a CUDA graph."""
    graph = measuring.graph_of(run)
    times = []
    for _ in range(repeats + 5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / COPIES)
    times = sorted(times[5:])
    return {f"p{q}_us": round(times[int(q / 100 * (repeats - 1))], 2) for q in (20, 50, 80)}


def packed(bits: list[int], tokens: int, copy_gb_s: float, dtype: torch.dtype) -> dict:
    stacks = [
        [measuring.random_stack(bits, n, k, GROUP, "gpu_tile", "cuda") for n, k in ((2 * FFN, HIDDEN), (HIDDEN, FFN))]
        for _ in range(COPIES)
    ]
    routes = [routing(tokens, c) for c in range(COPIES)]
    x = torch.randn(tokens, HIDDEN, device="cuda").to(dtype)

    def run():
        for (gate_up, down), (ids, weights) in zip(stacks, routes, strict=True):
            tk.moe_ffn(x, gate_up, down, ids, weights, intermediate=FFN, group_size=GROUP)

    # the plain-arithmetic path shares no bit trick with the fast one
    out, plain = (
        tk.moe_ffn(x, *stacks[0], *routes[0], intermediate=FFN, group_size=GROUP, fast=f) for f in (True, False)
    )
    agreement = float((out.double() - plain.double()).norm() / plain.double().norm())
    row = timed(run)
    moved = sum(sum(expert_bytes(bits[e]) for e in set(ids.flatten().tolist())) for ids, _ in routes) / COPIES
    gb_s = moved / row["p50_us"] / 1e3
    ideal = moved / copy_gb_s / 1e3
    return row | {
        "megabytes": round(moved / 1e6, 2), "gb_s": round(gb_s, 1), "percent_of_copy": round(100 * gb_s / copy_gb_s, 1),
        "ideal_us": round(ideal, 2), "fast_against_plain": agreement,
    }


def dense(tokens: int, copy_gb_s: float, dtype: torch.dtype) -> dict:
    """fp16 experts in torch: one matrix product per routed expert, the routing known beforehand."""
    gate_up = torch.randn(EXPERTS, 2 * FFN, HIDDEN, device="cuda", dtype=dtype) * HIDDEN**-0.5
    down = torch.randn(EXPERTS, HIDDEN, FFN, device="cuda", dtype=dtype) * FFN**-0.5
    x = torch.randn(tokens, HIDDEN, device="cuda").to(dtype)
    plans, moved = [], 0
    for c in range(COPIES):
        ids, _ = routing(tokens, c)
        chosen = sorted(set(ids.flatten().tolist()))
        plans.append([(e, torch.where((ids == e).any(1))[0]) for e in chosen])
        moved += len(chosen) * 3 * HIDDEN * FFN * 2 / COPIES

    def run():
        for plan in plans:
            out = torch.zeros_like(x)
            for e, rows in plan:
                gate, up = (x[rows] @ gate_up[e].T).chunk(2, dim=-1)
                out.index_add_(0, rows, (torch.nn.functional.silu(gate) * up) @ down[e].T / TOP_K)

    row = timed(run)
    gb_s = moved / row["p50_us"] / 1e3
    return row | {
        "megabytes": round(moved / 1e6, 2), "gb_s": round(gb_s, 1), "percent_of_copy": round(100 * gb_s / copy_gb_s, 1),
        "ideal_us": round(moved / copy_gb_s / 1e3, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--copy-gb-s", type=float)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--mixes", nargs="+", default=["2.0", "2.5", "1.5", "1.0", "2.0 uniform", "3.0", "4.0"])
    args = parser.parse_args()
    copy = args.copy_gb_s or copy_bandwidth()
    result = {"facts": facts(), "copy_gb_s": round(copy, 1), "rows": []}

    def save(row: dict) -> None:
        print(json.dumps(row), flush=True)
        result["rows"].append(row)
        if args.json:
            args.json.write_text(json.dumps(result, indent=1))
        torch.cuda.empty_cache()

    for tokens in args.tokens:
        save({"tokens": tokens, "bits": "fp16 torch"} | dense(tokens, copy, torch.float16))
        for name in args.mixes:
            save({"tokens": tokens, "bits": name} | packed(MIXES[name], tokens, copy, torch.float16))


if __name__ == "__main__":
    main()
