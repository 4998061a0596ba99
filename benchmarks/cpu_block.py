"""Compare the CPU kernels with the limits of the machine and with torch in one run, and check the targets.

``python benchmarks/cpu_block.py`` prints a table and writes ``benchmarks/results/cpu-<date>.json``. Every figure is the
median over pairs: the two things compared alternate, so that other load on the machine meets both, and pairs in which
the yardstick itself ran slowly do not count. ``--only decode``
(``torch``, ``prefill``, ``gptq``, ``overhead``) runs a part; ``--threads`` and ``--pairs`` as they say.

* decode: one token through a MoE block; bytes of the packed experts used over time, as a share of the bandwidth of a
  plain threaded sum over 1 GiB. Experts rotate through enough layers that caches hold none.
* torch: the same block at 2 bits beside eager bf16 and fp32.
* prefill: 512 tokens through the block beside torch's bf16 products of the dequantized weights.
* gptq: the column loop of a 4096 x 4096 matrix at 2 bits beside the same loop in plain torch; ``whole`` adds the
  updates of later columns, matrix products that both leave to torch.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from record import ROOT, conditions
from torch import Tensor

from gemq import format as fmt
from gemq import ops
from gemq._core import core
from gemq.ops import cpu
from gemq.ops.packed_stack import Stack

# hidden, ffn, experts, top-k
SHAPES = {
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "small-mixtral": (1024, 3584, 8, 2),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
}
DECODE_TARGETS = {1: 0.65, 2: 0.78, 3: 0.70, 4: 0.85}
BEYOND_CACHES = 320 << 20
CLOCK = [time.perf_counter]


def seconds(call: Callable[[], object], least: float = 0.02) -> float:
    """Time of one call, over as many as fill ``least`` seconds."""
    calls, start = 0, CLOCK[0]()
    while True:
        call()
        calls += 1
        spent = CLOCK[0]() - start
        if spent >= least:
            return spent / calls


def pairs(first: Callable[[], object], second: Callable[[], object], count: int, least: float = 0.02) -> dict:
    """Run both in turns: medians of each, and the median of first / second pair by pair, over the quiet pairs.

    Quiet are those whose ``first``, the yardstick, took at most a quarter longer than the fastest: in the others
    somebody else had the machine.
    """
    first(), second()
    times = [(seconds(first, least), seconds(second, least)) for _ in range(count)]
    fastest = min(x for x, _ in times)
    quiet = [(x, y) for x, y in times if x <= 1.25 * fastest]
    a, b = (statistics.median(t) for t in zip(*quiet, strict=True))
    ratio = statistics.median(x / y for x, y in quiet)
    return {"first": a, "second": b, "ratio": ratio, "quiet": len(quiet), "of": count}


def filled(size: int) -> Tensor:
    """Fill a tensor with random bytes, one chunk over and over: only speed is measured."""
    chunk = torch.randint(0, 256, (1 << 22,), dtype=torch.uint8)
    out = cpu.empty(size, torch.uint8)
    for part in out.split(chunk.numel()):
        part.copy_(chunk[: part.numel()])
    return out


def stack_on_large_pages(bits: list[int], n: int, k: int) -> Stack:
    """Random experts where :func:`filled` puts their codes: modules hold theirs on large pages too."""
    plan = fmt.expert_layout(bits, n, k, 128, "cpu_tile")
    meta = cpu.empty(plan.meta_elements, torch.float16).copy_(torch.rand(plan.meta_elements) * 0.02)
    return filled(plan.code_bytes), meta, *ops.expert_tables(bits, n, k, 128, "cpu_tile")


class Block:
    """Layers of one shape and width, called in turn with ids that move through the experts."""

    def __init__(self, shape: str, bits: int, tokens: int = 1, layers: int | None = None):
        self.hidden, self.ffn, self.experts, self.top_k = SHAPES[shape]
        weights = 3 * self.hidden * self.ffn
        self.expert_bytes = weights * bits // 8 + weights // 128 * 4
        layers = layers or -(-BEYOND_CACHES // (self.experts * self.expert_bytes))
        widths = [bits] * self.experts
        self.stacks = [
            (
                stack_on_large_pages(widths, 2 * self.ffn, self.hidden),
                stack_on_large_pages(widths, self.hidden, self.ffn),
            )
            for _ in range(layers)
        ]
        self.turn = itertools.cycle(itertools.product(range(self.experts // self.top_k), range(layers)))
        self.x = torch.randn(tokens, self.hidden)
        self.weights = torch.full((tokens, self.top_k), 1 / self.top_k)
        first = torch.arange(tokens)[:, None] * self.top_k + torch.arange(self.top_k)
        self.ids = [(first + i * self.top_k) % self.experts for i in range(self.experts // self.top_k)]

    def __call__(self) -> Tensor:
        i, layer = next(self.turn)
        return ops.moe_lowbit_ffn(
            self.x, *self.stacks[layer], self.ids[i], self.weights, intermediate=self.ffn, layout="cpu_tile"
        )


def decode(options: argparse.Namespace) -> list[dict]:
    gibibyte = torch.ones(1 << 27, dtype=torch.int64)
    # an eighth at a time: the shorter a pair, the more of them meet a quiet machine
    parts = itertools.cycle(gibibyte.chunk(8))
    rows = []
    for shape, bits in itertools.product(SHAPES, DECODE_TARGETS):
        block = Block(shape, bits)
        moved = block.top_k * block.expert_bytes
        for setting in options.activations:
            ops.set_cpu_activations(setting)
            found = pairs(lambda: next(parts).sum(), block, 8 * options.pairs, 0.003)
            rows.append({
                "what": f"decode {shape} {bits} bits {setting}", "ms": 1e3 * found["second"],
                "GB/s": moved / found["second"] / 1e9, "read GB/s": gibibyte.nbytes / 8 / found["first"] / 1e9,
                "quiet pairs": float(found["quiet"]),
                "value": found["ratio"] * moved / (gibibyte.nbytes / 8), "target": DECODE_TARGETS[bits],
                "unit": "of the read bandwidth",
            })
            show(rows[-1])
        ops.set_cpu_activations("int16")
    return rows


def dense_call(shape: str, dtype: torch.dtype, tokens: int, experts: int, top_k: int, x: Tensor) -> Callable:
    """The block on dense weights, expert after expert, as an eager model runs it."""
    hidden, ffn = SHAPES[shape][:2]
    gate_up = torch.randn(2 * ffn, hidden).mul_(0.02).to(dtype).repeat(experts, 1, 1)
    down = torch.randn(hidden, ffn).mul_(0.02).to(dtype).repeat(experts, 1, 1)
    x = x.to(dtype)
    turn = itertools.cycle(range(experts // top_k))

    def call() -> Tensor:
        first = next(turn) * top_k
        share = tokens if tokens == 1 else tokens * top_k // experts
        out = torch.zeros_like(x)
        for e in range(first, first + top_k) if tokens == 1 else range(experts):
            at = slice(0, share) if tokens == 1 else torch.arange(e * share, (e + 1) * share) % tokens
            gate, up = torch.nn.functional.linear(x[at], gate_up[e]).chunk(2, dim=-1)
            out[at] += torch.nn.functional.linear(torch.nn.functional.silu(gate) * up, down[e]) / top_k
        return out

    return call


def beside_torch(options: argparse.Namespace) -> list[dict]:
    rows = []
    for shape, experts in (("mixtral-8x7b", 4), ("small-mixtral", 32), ("qwen3-30b-a3b", 128)):
        block = Block(shape, 2)
        for dtype, target in ((torch.bfloat16, 8), (torch.float32, 6)):
            dense = dense_call(shape, dtype, 1, experts, block.top_k, block.x)
            found = pairs(dense, block, options.pairs)
            rows.append({
                "what": f"decode {shape} 2 bits, torch {str(dtype)[6:]}", "ms": 1e3 * found["second"],
                "torch ms": 1e3 * found["first"], "value": found["ratio"], "target": target, "unit": "times torch",
            })
            show(rows[-1])
            del dense
    return rows


def prefill(options: argparse.Namespace) -> list[dict]:
    rows = []
    for shape, bits in itertools.product(("small-mixtral", "mixtral-8x7b"), (2, 3, 4)):
        block = Block(shape, bits, tokens=512, layers=1)
        dense = dense_call(shape, torch.bfloat16, 512, block.experts, block.top_k, block.x)
        for setting in ("int16", "int8"):
            ops.set_cpu_activations(setting)
            found = pairs(dense, block, max(3, options.pairs // 5))
            flops = 2 * 512 * block.top_k * 3 * block.hidden * block.ffn
            rows.append({
                "what": f"prefill 512 {shape} {bits} bits {setting}", "ms": 1e3 * found["second"],
                "torch ms": 1e3 * found["first"], "GFLOP/s": flops / found["second"] / 1e9, "value": found["ratio"],
                "target": 1 if setting == "int16" else None, "unit": "times torch bf16",
            })
            show(rows[-1])
        ops.set_cpu_activations("int16")
    return rows


def gptq(options: argparse.Namespace) -> list[dict]:
    from gemq.algorithms import gptq as algorithm
    from gemq.ops.gptq import gptq_group
    from gemq.reference import gptq_group as torch_group
    from gemq.reference.grid import dequantize_codes

    size = 4096
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, size, size, generator=generator) * 0.02
    x = torch.randn(2 * size, size, generator=generator) * torch.logspace(-1, 0, size)
    hessian = (x.T @ x)[None]
    factor, _ = algorithm.inverse_factor(hessian, 0.01)
    bits, rows = torch.tensor([2]), []
    for clip in ("none", "mse", "paper"):
        loop, whole, losses = {}, {}, {}
        for step in (torch_group, gptq_group):
            start, inside, columns = CLOCK[0](), 0.0, weight.clone()
            codes, metas = torch.empty_like(weight, dtype=torch.uint8), []
            for at in range(0, size, 128):
                here, later = slice(at, at + 128), slice(at + 128, size)
                before = CLOCK[0]()
                codes[..., here], meta, errors = step(columns[..., here], factor[:, here, here], bits, clip)
                inside += CLOCK[0]() - before
                columns[..., later] -= errors @ factor[:, here, later]
                metas.append(meta)
            loop[step], whole[step] = inside, CLOCK[0]() - start
            lost = (dequantize_codes(codes, torch.stack(metas, 2)) - weight)[0]
            losses[step] = float(((lost @ hessian[0]) * lost).sum())
        rows.append({
            "what": f"gptq 4096 x 4096 2 bits, clip {clip}", "ms": 1e3 * loop[gptq_group],
            "torch ms": 1e3 * loop[torch_group], "whole ms": 1e3 * whole[gptq_group],
            "whole torch ms": 1e3 * whole[torch_group], "loss / torch": losses[gptq_group] / losses[torch_group],
            "value": loop[torch_group] / loop[gptq_group], "target": 10, "unit": "times torch's column loop",
        })
        show(rows[-1])
    return rows


def overhead(options: argparse.Namespace) -> list[dict]:
    """Measure the cost of a call around the kernels, in microseconds: a block of one group."""
    stack = stack_on_large_pages([2] * 8, 256, 128), stack_on_large_pages([2] * 8, 128, 128)
    x, ids, weights = torch.randn(1, 128), torch.tensor([[0, 1]]), torch.ones(1, 2)

    def call() -> Tensor:
        return ops.moe_lowbit_ffn(x, *stack, ids, weights, intermediate=128, layout="cpu_tile")

    with torch.no_grad():
        call()
        each = statistics.median(seconds(call, 0.01) for _ in range(4 * options.pairs))
    row = {"what": "one call of a tiny block", "value": 1e6 * each, "target": None, "unit": "microseconds"}
    show(row)
    return [row]


def show(row: dict) -> None:
    """Print one line of the table."""
    rest = " ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float) and k not in ("value", "target"))
    met = "" if row["target"] is None else f"(target {row['target']}: {'met' if met_by(row) else 'MISSED'})"
    print(f"{row['what']:45} {row['value']:7.2f} {row['unit']} {met} {rest}", flush=True)


def met_by(row: dict) -> bool:
    """Return True if a row reaches its target, or has none."""
    return row["target"] is None or row["value"] >= row["target"]


PARTS = {"decode": decode, "torch": beside_torch, "prefill": prefill, "gptq": gptq, "overhead": overhead}


def main() -> None:
    """Run the parts, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), action="append", help="run this part (may be repeated)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="count the thread's own time (one thread, on a busy machine)"
    )
    parser.add_argument("--pairs", type=int, default=15, help="pairs of measurements a figure")
    parser.add_argument("--activations", nargs="+", default=["int16", "int8"], help="for decode")
    parser.add_argument("--output", type=Path, help="where to write (default: benchmarks/results/cpu-<date>.json)")
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time sees the calling thread alone: add --threads 1")
    CLOCK[0] = time.thread_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows = []
    with torch.no_grad():
        for name in options.only or PARTS:
            rows += PARTS[name](options)
    found = conditions(" ".join(["python benchmarks/cpu_block.py", *sys.argv[1:]]))
    found |= {"threads": options.threads, "clock": CLOCK[0].__name__, "isa": core().cpu_isa()}
    found["load"] = Path("/proc/loadavg").read_text().split()[0]
    output = options.output or ROOT / "benchmarks" / "results" / f"cpu-{datetime.date.today().isoformat()}.json"
    output.parent.mkdir(exist_ok=True)
    output.write_text(json.dumps({"conditions": found, "rows": rows}, indent=1) + "\n")
    missed = [row["what"] for row in rows if not met_by(row)]
    print(f"{output}; missed: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
