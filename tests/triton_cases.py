"""The cases of the Triton kernels, on whatever device triton runs on: test_triton_kernels.py runs them in the
interpreter, in a process of its own, and test_triton_gpu.py natively."""

from __future__ import annotations

import os

import pytest
import torch
from stacks import random_stack

from gemq import reference
from gemq import triton_kernels as tk
from gemq.activation import Activation, Between
from gemq.ops.backends import _for_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# ||out - reference|| / ||reference|| allowed, by dtype of x. float16: x is exact after normalisation, the output is
# rounded to 11 bits (at most 2**-11 = 4.9e-4 an element). bfloat16: 8 bits, 2**-8 = 3.9e-3. float32: x is rounded to
# the 11 bits of float16 going in, the output is not rounded.
TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 5e-4}


def on_device(stack):
    return tuple(t.to(DEVICE) for t in stack)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    out = out.to("cpu", torch.float64)
    assert out.shape == expected.shape
    assert torch.isfinite(out).all(), "an element was not written, or is not finite"
    scale = expected.norm()
    return float((out - expected).norm() / scale) if scale > 0 else float(out.abs().max())


def check(x, stack, ids, weights, n, group_size, op=tk.moe_gemm, **options):
    """``op`` into a NaN-filled output against the float64 reference."""
    shape = (*ids.shape, n) if weights is None else (ids.shape[0], n)
    out = torch.full(shape, float("nan"), dtype=x.dtype, device=DEVICE)
    scale = None if weights is None else weights.to(DEVICE)
    result = op(
        x.to(DEVICE), *on_device(stack), ids.to(DEVICE), scale, n=n, group_size=group_size, out=out, **options
    )
    assert result.data_ptr() == out.data_ptr()
    expected = reference.moe_lowbit_gemm(
        x, *stack, ids, weights, n=n, group_size=group_size, layout="gpu_tile", compute_dtype=torch.float64
    )
    measured = error(out, expected)
    assert measured <= TOLERANCE[x.dtype], f"relative error {measured:.2e}"
    return out


def routing(tokens: int, top_k: int, experts: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts a token, weights that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    return ids, torch.rand(tokens, top_k, generator=generator).softmax(-1)


def slow(*values) -> object:
    """Mark a case that the quick run leaves out: `make slow`, and every run on a GPU, has it."""
    return pytest.param(*values, marks=[pytest.mark.slow] * INTERPRETED)


# under the interpreter both ways to read codes run, and the launcher's own choice on a GPU
both_ways = pytest.mark.parametrize("fast", [slow(False), True] if INTERPRETED else [None], ids=lambda f: f"fast={f}")


def fresh(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@both_ways
def test_single_width(bits, dtype, fast):
    stack = random_stack([bits], 64, 512, 128, "gpu_tile", bits)
    check(fresh(3, 512, dtype=dtype), stack, torch.zeros(3, 1, dtype=torch.int64), None, 64, 128, fast=fast)


@pytest.mark.parametrize("k, group_size", [
    (192, 64), slow(384, 128), (96, 32), slow(768, 128), slow(64, 64), (32, 32)
])
@both_ways
def test_padded_columns(k, group_size, fast):
    bits = [1, 2, 3, 4, 8]
    stack = random_stack(bits, 64, k, group_size, "gpu_tile", k)
    ids, _ = routing(2, 5, 5)
    check(fresh(2, k), stack, ids, None, 64, group_size, fast=fast)


def test_padded_columns_of_a_real_model():
    stack = random_stack([1, 2, 3], 72, 1408, 128, "gpu_tile", 0)
    check(fresh(1, 3, 1408), stack, torch.tensor([[0, 1, 2]]), torch.rand(1, 3), 72, 128)


@pytest.mark.parametrize("n", [slow(1), 40, 100, slow(192)])
def test_rows_that_are_no_multiple_of_the_tile(n):
    stack = random_stack([2, 0, 3], n, 256, 64, "gpu_tile", n)
    ids, weights = routing(4, 2, 3)
    check(fresh(4, 256), stack, ids, weights, n, 64)


@pytest.mark.parametrize("tokens", [1, slow(2), 7, slow(16), 17, slow(40)])
@pytest.mark.parametrize("per_slot", [False, True], ids=["per-token", "per-slot"])
def test_mixed_widths(tokens, per_slot):
    bits = [3, 0, 1, 4, 2, 8]
    stack = random_stack(bits, 64, 128, 64, "gpu_tile", tokens)
    ids, weights = routing(tokens, 2, 6, tokens)
    x = fresh(tokens, 2, 128) if per_slot else fresh(tokens, 128)
    check(x, stack, ids, weights if tokens % 2 else None, 64, 64)


@pytest.mark.parametrize("op", [tk.moe_decode, tk.moe_prefill])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_invalid_ids_give_zero(op, dtype):
    stack = random_stack([2, 1], 64, 128, 128, "gpu_tile", 1)
    ids = torch.tensor([[-1, 0], [2, 1], [5, -7]], dtype=dtype)
    out = check(fresh(3, 128), stack, ids, None, 64, 128, op=op)
    assert not out[0, 0].any() and not out[1, 0].any() and not out[2].any()
    check(fresh(3, 128), stack, ids, torch.rand(3, 2), 64, 128, op=op)


@pytest.mark.parametrize("tokens", [slow(5), 30, slow(70)])
def test_all_tokens_on_one_expert(tokens):
    stack = random_stack([1, 2, 3, 4], 64, 128, 64, "gpu_tile", 2)
    check(fresh(tokens, 128), stack, torch.full((tokens, 2), 2), torch.rand(tokens, 2), 64, 64)


def test_all_experts_of_width_zero():
    stack = random_stack([0, 0], 64, 128, 64, "gpu_tile", 2)
    assert not check(fresh(2, 128), stack, torch.tensor([[0, 1], [1, 0]]), torch.rand(2, 2), 64, 64).any()


@both_ways
def test_outliers_beside_small_values(fast):
    stack = random_stack([1, 3, 4], 64, 256, 64, "gpu_tile", 3)
    ids = torch.tensor([[0, 1, 2], [2, 1, 0]])
    x = fresh(2, 256, dtype=torch.bfloat16)
    x[0, 7], x[1, 200] = 40000.0, -3.0e30
    check(x, stack, ids, None, 64, 64, fast=fast)
    check(fresh(2, 256) * 0.01, stack, ids, None, 64, 64, fast=fast)
    check(fresh(2, 256, dtype=torch.float32) * 1e-30, stack, ids, None, 64, 64, fast=fast)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_bad_row_stays_alone():
    stack = random_stack([2, 1], 64, 128, 64, "gpu_tile", 4)
    x = fresh(4, 128)
    ids = torch.zeros(4, 1, dtype=torch.int64)
    clean = tk.moe_gemm(x.to(DEVICE), *on_device(stack), ids.to(DEVICE), n=64, group_size=64).cpu()
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), 0.0
    out = tk.moe_gemm(x.to(DEVICE), *on_device(stack), ids.to(DEVICE), n=64, group_size=64).cpu()
    assert torch.equal(out[0], clean[0])
    assert out[1].isnan().all()
    assert not out[2].isfinite().any()
    assert not out[3].any()


def test_no_tokens():
    stack = on_device(random_stack([2, 1], 64, 128, 64, "gpu_tile", 4))
    ids = torch.zeros(0, 2, dtype=torch.int64, device=DEVICE)
    x = torch.zeros(0, 128, dtype=torch.float16, device=DEVICE)
    assert tk.moe_gemm(x, *stack, ids, n=64, group_size=64).shape == (0, 2, 64)
    assert tk.moe_gemm(x, *stack, ids, torch.zeros(0, 2, device=DEVICE), n=64, group_size=64).shape == (0, 64)


@pytest.mark.parametrize("tokens", [2, slow(18)])
def test_deterministic(tokens):
    stack = on_device(random_stack([2, 1, 4], 64, 1536, 64, "gpu_tile", 4))
    ids, weights = (t.to(DEVICE) for t in routing(tokens, 2, 3))
    x = fresh(tokens, 1536).to(DEVICE)
    results = [tk.moe_gemm(x, *stack, ids, weights, n=64, group_size=64) for _ in range(2)]
    assert torch.equal(*results)


def test_split_k():
    """Long enough for the launcher to split K; the parts are summed in order."""
    stack = random_stack([1, 2, 3], 64, 4224, 128, "gpu_tile", 5)
    check(fresh(1, 4224), stack, torch.tensor([[0, 1, 2]]), None, 64, 128)
    check(fresh(1, 4224), stack, torch.tensor([[2, 1, 0]]), torch.rand(1, 3), 64, 128)


@pytest.mark.parametrize(
    "intermediate, down_group, dtype, tokens",
    [
        (128, 32, torch.float16, 3), (96, 32, torch.float16, 3), (128, 64, torch.float16, 3),
        (192, 64, torch.float32, 9), (256, 128, torch.bfloat16, 3), (256, 128, torch.float16, 12),
    ],
    ids=["composed-groups", "composed-size", "one-tile", "odd-tiles", "two-tiles-bf16", "two-tiles-16-columns"],
)
@both_ways
def test_ffn(tokens, intermediate, down_group, dtype, fast):
    """Widths of the two projections differ, an expert of 0 bits and an id out of range are among them."""
    gate_up = random_stack([2, 1, 0, 3, 4], 2 * intermediate, 128, 64, "gpu_tile", 6)
    down = random_stack([3, 4, 1, 0, 2], 128, intermediate, down_group, "gpu_tile", 7)
    ids, weights = routing(tokens, 2, 5)
    ids[0, 1] = -1
    x = fresh(tokens, 128, dtype=dtype)
    options = {"intermediate": intermediate, "group_size": 64, "down_group_size": down_group}
    out = torch.full((tokens, 128), float("nan"), dtype=dtype, device=DEVICE)
    tk.ffn_decode(
        x.to(DEVICE), on_device(gate_up), on_device(down), ids.to(DEVICE), weights.to(DEVICE), out=out, fast=fast,
        **options,
    )
    expected = reference.moe_lowbit_ffn(
        x, gate_up, down, ids, weights, layout="gpu_tile", compute_dtype=torch.float64, **options
    )
    measured = error(out, expected)
    assert measured <= TOLERANCE[dtype], f"relative error {measured:.2e}"


@pytest.mark.parametrize("tokens, top_k", [(1, 3), slow(16, 9), (5, 1)])
def test_ffn_of_many_slots(tokens, top_k):
    """Slots that are no power of two, blocks of more than one program of columns, one expert many times."""
    bits = [1, 2, 3, 2, 1, 2, 3, 2, 4]
    gate_up = random_stack(bits, 2 * 128, 128, 128, "gpu_tile", 1)
    down = random_stack(bits, 128, 128, 128, "gpu_tile", 2)
    ids, weights = routing(tokens, top_k, 9, tokens)
    ids[:, 0] = 1
    x = fresh(tokens, 128)
    out = tk.ffn_decode(
        x.to(DEVICE), on_device(gate_up), on_device(down), ids.to(DEVICE), weights.to(DEVICE), intermediate=128
    )
    expected = reference.moe_lowbit_ffn(
        x, gate_up, down, ids, weights, intermediate=128, layout="gpu_tile", compute_dtype=torch.float64
    )
    assert error(out, expected) <= TOLERANCE[torch.float16]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@both_ways
def test_a_bad_row_of_a_block_stays_alone(fast):
    """NaN in a token and in one slot's weight; an expert of 0 bits does not see it."""
    gate_up = on_device(random_stack([2, 1, 0], 256, 128, 128, "gpu_tile", 4))
    down = on_device(random_stack([1, 3, 0], 128, 128, 128, "gpu_tile", 5))
    ids = torch.tensor([[0, 1], [1, 0], [2, 2], [0, -1]], device=DEVICE)
    weights = torch.rand(4, 2).to(DEVICE)
    x = fresh(4, 128).to(DEVICE)
    clean = tk.ffn_decode(x, gate_up, down, ids, weights, intermediate=128, fast=fast)
    x[1, 5] = float("nan")
    x[2] = float("inf")
    out = tk.ffn_decode(x, gate_up, down, ids, weights, intermediate=128, fast=fast)
    assert out[1].isnan().all()
    assert torch.equal(out[0], clean[0]) and torch.equal(out[3], clean[3])
    assert not out[2].any()


@pytest.mark.parametrize("pairs, experts, columns", [(1, 3, 8), (2, 8, 8), (40, 3, 8), (128, 60, 16), (100, 1, 16)])
def test_block_tables(pairs, experts, columns):
    """Counting in the kernel and sorting in torch give the same tables, used blocks first."""
    from gemq.triton_kernels.blocks_by_counting import route_by_sorting
    from gemq.triton_kernels.decode_prepare import prepare

    ids = torch.randint(-1, experts + 1, (pairs,), device=DEVICE)
    _, blocks = prepare(fresh(1, 128).to(DEVICE), ids, experts, 128, columns, 0, 3, False)
    expert, block_pairs = route_by_sorting(ids, experts, columns, blocks.count)
    assert torch.equal(blocks.expert, expert) and torch.equal(blocks.pairs, block_pairs)
    assert blocks.arrived.tolist() == [int((expert >= 0).sum()), 0, 0, 0]


@pytest.mark.parametrize("experts, top_k", [(8, 2), (60, 4), (128, 8), (5, 5)])
@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_topk_routing(experts, top_k, scoring, dtype):
    logits = (3 * torch.randn(7, experts)).to(dtype)
    logits[3, : experts // 2] = logits[3, 0]
    for normalize, scale, bias in ((True, 1.0, None), (False, 2.5, torch.randn(experts))):
        device_bias = None if bias is None else bias.to(DEVICE)
        weights, ids = tk.topk(
            logits.to(DEVICE), top_k, sigmoid=scoring == "sigmoid", normalize=normalize, scale=scale, bias=device_bias
        )
        expected, expected_ids = reference.topk_routing(
            logits, top_k, scoring=scoring, normalize=normalize, scale=scale, bias=bias
        )
        assert torch.equal(ids.cpu(), expected_ids)
        torch.testing.assert_close(weights.cpu(), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_topk_routing_of_nan_keeps_ids_in_range():
    logits = torch.randn(3, 20)
    logits[1, 4] = float("nan")
    weights, ids = tk.topk(logits.to(DEVICE), 3)
    assert ((ids >= 0) & (ids < 20)).all()
    assert weights[1].isnan().all() and weights[[0, 2]].isfinite().all()
    assert tk.topk(logits[:0].to(DEVICE), 3)[0].shape == (0, 3)


@pytest.mark.parametrize("tokens", [1, 9, 33])
@pytest.mark.parametrize("bits", [2, 3, 6])
def test_dense(tokens, bits):
    qweight, meta, *_ = random_stack([bits], 100, 384, 128, "gpu_tile", bits)
    x = fresh(tokens, 384)
    out = tk.lowbit_gemm(x.to(DEVICE), qweight.to(DEVICE), meta.to(DEVICE), bits=bits, n=100, group_size=128)
    expected = reference.lowbit_gemm(
        x, qweight, meta, bits=bits, n=100, group_size=128, layout="gpu_tile", compute_dtype=torch.float64
    )
    assert error(out, expected) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("tokens", [slow(3), 40])
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "fast"])
def test_plain_and_fast_paths(tokens, fast):
    stack = random_stack([1, 2, 3, 4, 8], 128, 1024, 128, "gpu_tile", 8)
    ids, weights = routing(tokens, 3, 5)
    check(fresh(tokens, 1024), stack, ids, weights, 128, 128, fast=fast)


@pytest.mark.skipif(INTERPRETED, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("tokens", [1, 40, 100])
def test_cuda_graph(tokens):
    """Routing changes between replays: nothing about it was frozen at capture."""
    gate_up = random_stack([2, 1, 3, 4], 256, 256, 128, "gpu_tile", 9)
    down = random_stack([2, 1, 3, 4], 256, 128, 128, "gpu_tile", 10)
    x, (ids, weights) = fresh(tokens, 256), routing(tokens, 2, 4)
    inputs = [t.to(DEVICE) for t in (x, ids, weights)]
    stacks = on_device(gate_up), on_device(down)

    def run():
        return tk.moe_ffn(inputs[0], *stacks, inputs[1], inputs[2], intermediate=128)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x, (ids, weights) = fresh(tokens, 256), routing(tokens, 2, 4, 1)
    for t, value in zip(inputs, (x, ids, weights), strict=True):
        t.copy_(value)
    graph.replay()
    expected = reference.moe_lowbit_ffn(
        x, gate_up, down, ids, weights, intermediate=128, layout="gpu_tile", compute_dtype=torch.float64
    )
    assert error(captured, expected) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("name, limit, bias", [
    ("silu", None, True), slow("silu", 0.4, False), ("gelu_tanh", None, False), ("swigluoai", 0.7, True),
    ("relu2", None, False), slow("relu2", None, True),
])
@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("inner, down_group", [slow(96, 32), (128, 64)])
def test_activations(name, limit, bias, tokens, inner, down_group):
    """Decode and prefill, fused or not; experts without bits in one projection or both, an id out of range."""
    activation = Activation(name, limit=limit)
    rows = activation.rows(inner)
    gate_up = random_stack([2, 0, 0, 3, 4], rows, 128, 64, "gpu_tile", 6)
    down = random_stack([3, 4, 0, 2, 2], 128, inner, down_group, "gpu_tile", 7)
    biases = (torch.randn(5, rows), torch.randn(5, 128)) if bias else (None, None)
    ids, weights = routing(tokens, 2, 5)
    ids[0, 1], ids[1] = -1, torch.tensor([1, 2])
    x = fresh(tokens, 128)
    sizes = {"intermediate": inner, "group_size": 64, "down_group_size": down_group}
    given = Between(activation, *(b if b is None else b.to(DEVICE) for b in biases))
    out = torch.full((tokens, 128), float("nan"), dtype=x.dtype, device=DEVICE)
    tk.moe_ffn(x.to(DEVICE), on_device(gate_up), on_device(down), ids.to(DEVICE), weights.to(DEVICE), out=out,
               between=_for_triton(given), **sizes)
    expected = reference.moe_lowbit_ffn(
        x, gate_up, down, ids, weights, layout="gpu_tile", compute_dtype=torch.float64, activation=activation,
        gate_up_bias=biases[0], down_bias=biases[1], **sizes,
    )
    assert error(out, expected) <= 2 * TOLERANCE[torch.float16]  # GELU's and ReLU's inner values spread further
