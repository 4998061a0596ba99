"""One MoE block, packed, beside the same block in 16 and 32 bits with ``torch.compile`` and eager.

``pytest --benchmark-only benchmarks/bench_moe.py``. Several layers' weights are rotated so that caches do not
answer. On CUDA the baselines are float16; there the whole grid of shapes runs, on the CPU a smaller one.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gemq import format as fmt
from gemq import ops

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# hidden, ffn, experts, top-k
SHAPES = {
    "mixtral-8x7b": (4096, 14336, 8, 2),
    "deepseek-v2-lite": (2048, 1408, 64, 6),
    "qwen1.5-moe": (2048, 1408, 60, 4),
    "qwen3-30b-a3b": (2048, 768, 128, 8),
} if CUDA else {"small-mixtral": (1024, 3584, 8, 2), "qwen3-30b-a3b": (2048, 768, 32, 8)}
TOKENS = [1, 4, 16, 64, 512] if CUDA else [1, 16, 128]
BUDGETS = {1.5: (1, 2, 1, 2), 2.0: (1, 2, 3, 2), 2.5: (2, 3, 2, 3), 3.0: (3,), 4.0: (4,)}
COPIES = 4 if CUDA else 3


def random_stack(bits: list[int], n: int, k: int, layout: str) -> tuple[Tensor, ...]:
    """Random codes straight in the kernels' layout; only speed is measured."""
    plan = fmt.expert_layout(bits, n, k, 128, layout)
    meta = torch.rand(plan.meta_elements, device=DEVICE).mul_(0.02).half()
    return (
        torch.randint(0, 256, (plan.code_bytes,), dtype=torch.uint8, device=DEVICE), meta,
        torch.tensor(plan.bits, dtype=torch.int32, device=DEVICE),
        torch.tensor(plan.code_offsets, device=DEVICE), torch.tensor(plan.meta_offsets, device=DEVICE),
    )


def routing(tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).to(DEVICE)
    return ids, torch.softmax(torch.randn(tokens, top_k), -1).to(DEVICE)


def measure(benchmark, call, weight_bytes: int) -> None:
    def timed():
        call()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.extra_info["device"] = torch.cuda.get_device_name() if CUDA else "cpu"
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(timed, rounds=30 if CUDA else 8, warmup_rounds=3)
    benchmark.extra_info["weight_bytes"] = weight_bytes
    benchmark.extra_info["GB/s"] = weight_bytes / benchmark.stats.stats.median / 1e9


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_block(benchmark, shape: str, budget: float, tokens: int) -> None:
    hidden, ffn, experts, top_k = SHAPES[shape]
    layout = ops.layout_for(DEVICE)
    bits = list(itertools.islice(itertools.cycle(BUDGETS[budget]), experts))
    layers = [
        (random_stack(bits, 2 * ffn, hidden, layout), random_stack(bits, hidden, ffn, layout)) for _ in range(COPIES)
    ]
    x = torch.randn(tokens, hidden, dtype=torch.float16 if CUDA else torch.float32, device=DEVICE)
    ids, weights = routing(tokens, experts, top_k)
    turn = itertools.cycle(layers)

    def call() -> None:
        gate_up, down = next(turn)
        ops.moe_lowbit_ffn(x, gate_up, down, ids, weights, intermediate=ffn, layout=layout)

    used = ids.unique().tolist()
    mean = sum(bits[e] for e in used) / len(used)
    measure(benchmark, call, int(len(used) * 3 * hidden * ffn * (mean + 0.25) / 8))


def dense_block(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Gather the experts' weights and multiply: what a compiled 16-bit decode step does."""
    gate, up = torch.einsum("th,tknh->tkn", x, gate_up[ids]).chunk(2, dim=-1)
    inner = torch.nn.functional.silu(gate) * up
    return torch.einsum("tkn,tkhn,tk->th", inner, down[ids], weights.to(x.dtype))


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("dtype", ["float16"] if CUDA else ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_unquantized_block(benchmark, shape: str, tokens: int, dtype: str, mode: str) -> None:
    hidden, ffn, experts, top_k = SHAPES[shape]
    kind = getattr(torch, dtype)
    layers = [
        (torch.randn(experts, 2 * ffn, hidden, dtype=kind, device=DEVICE).mul_(0.02),
         torch.randn(experts, hidden, ffn, dtype=kind, device=DEVICE).mul_(0.02))
        for _ in range(2)
    ]
    x = torch.randn(tokens, hidden, dtype=kind, device=DEVICE)
    ids, weights = routing(tokens, experts, top_k)
    block = torch.compile(dense_block, dynamic=False) if mode == "compiled" else dense_block
    turn = itertools.cycle(layers)
    used = len(ids.unique())
    measure(benchmark, lambda: block(x, *next(turn), ids, weights), used * 3 * hidden * ffn * kind.itemsize)
