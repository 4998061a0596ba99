"""The same bits every time: a hundred calls, a replayed CUDA graph, and torch.compile with CUDA graphs of its own."""

from __future__ import annotations

import os

import pytest
import torch
from stacks import random_stack

from gemq import ops, reference

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a CUDA GPU and compiled kernels", allow_module_level=True)

HIDDEN, FFN, BITS = 512, 256, [1, 2, 3, 4, 0, 8]


@pytest.fixture(scope="module")
def stacks():
    gate_up = random_stack(BITS, 2 * FFN, HIDDEN, 128, "gpu_tile", 1)
    down = random_stack(BITS, HIDDEN, FFN, 128, "gpu_tile", 2)
    return gate_up, down, [tuple(t.cuda() for t in stack) for stack in (gate_up, down)]


def inputs(tokens: int, seed: int, dtype: torch.dtype = torch.float16):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    ids = torch.rand(tokens, len(BITS), generator=generator).argsort(-1)[:, :3].contiguous()
    return x, ids, torch.rand(tokens, 3, generator=generator).softmax(-1)


def ffn(x, ids, weights, gate_up, down):
    return ops.moe_lowbit_ffn(x, gate_up, down, ids, weights, intermediate=FFN, layout="gpu_tile")


def error(out, given, stacks) -> float:
    x, ids, weights = given
    expected = reference.moe_lowbit_ffn(
        x, *stacks[:2], ids, weights, intermediate=FFN, layout="gpu_tile", compute_dtype=torch.float64
    )
    return float((out.cpu().double() - expected).norm() / expected.norm())


TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
TOKENS = [1, 5, 16, 17, 200]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp16", "bf16"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_a_hundred_calls_give_the_same_bits(stacks, tokens, dtype):
    given = inputs(tokens, 0, dtype)
    on_gpu = [t.cuda() for t in given]
    first = ffn(*on_gpu, *stacks[2])
    assert error(first, given, stacks) <= TOLERANCE[dtype]
    # other work between the calls, so that memory is not always the same
    noise = []
    for i in range(100):
        noise.append(torch.randn(1000 + 97 * i, device="cuda"))
        assert torch.equal(ffn(*on_gpu, *stacks[2]), first), i


@pytest.mark.parametrize("tokens", TOKENS)
def test_a_replayed_graph_gives_the_bits_of_a_call(stacks, tokens):
    static = [t.cuda() for t in inputs(tokens, 0)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ffn(*static, *stacks[2])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ffn(*static, *stacks[2])
    for seed in range(10):
        given = inputs(tokens, seed)
        for place, value in zip(static, given, strict=True):
            place.copy_(value)
        called = ffn(*[t.cuda() for t in given], *stacks[2])
        for _ in range(10):
            captured.fill_(float("nan"))
            graph.replay()
            assert torch.equal(captured, called), seed
        assert error(captured, given, stacks) <= TOLERANCE[torch.float16]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tokens", [1, 40])
def test_compiled_with_cuda_graphs_gives_the_bits_of_a_call(stacks, tokens):
    torch._dynamo.reset()

    @torch.compile(mode="reduce-overhead", fullgraph=True, dynamic=False)
    def compiled(x, ids, weights, gate_up, down):
        return ffn(x, ids, weights, gate_up, down)

    with torch.inference_mode():
        for seed in range(6):
            given = inputs(tokens, seed)
            on_gpu = [t.cuda() for t in given]
            torch.compiler.cudagraph_mark_step_begin()
            out = compiled(*on_gpu, *stacks[2]).clone()
            assert torch.equal(out, ffn(*on_gpu, *stacks[2])), seed
            assert error(out, given, stacks) <= TOLERANCE[torch.float16]
