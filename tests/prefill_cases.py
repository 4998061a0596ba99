"""The cases of the prefill kernels, on whatever device triton runs on: test_triton_prefill.py runs them in the
interpreter, in a process of its own, and natively where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from stacks import random_stack
from triton_cases import DEVICE, INTERPRETED, TOLERANCE, error, fresh, on_device, routing, slow

from gemq import reference
from gemq.activation import Activation
from gemq.triton_kernels import launch_parameters, moe_ffn, moe_prefill, prefill_inputs, prefill_launch
from gemq.triton_kernels.activation import Inner

ENTRIES = launch_parameters.table("default")["prefill"]
PACKED = [e["columns"] for e in ENTRIES if e["method"] == "packed"]
METHODS = [*PACKED, "dense"]


def launch(method: int | str) -> launch_parameters.Prefill:
    """The default launch of the packed method with so many token columns, or of the dense one."""
    dense = method == "dense"
    entry = next(e for e in ENTRIES if e["method"] == method or (not dense and e["columns"] == method))
    return launch_parameters.Prefill(**{name: value for name, value in entry.items() if name != "tokens"})


def poisoned(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def run(x, stack, ids, weights, n, group_size, method):
    """``prefill_launch.gemm`` into a NaN-filled output."""
    out = poisoned(*((*ids.shape, n) if weights is None else (ids.shape[0], n)), dtype=x.dtype)
    scale = None if weights is None else weights.to(DEVICE)
    return prefill_launch.gemm(
        x.to(DEVICE), on_device(stack), ids.to(DEVICE), scale, n, group_size, out, not INTERPRETED, launch(method)
    )


def check(x, stack, ids, weights, n, group_size, method):
    out = run(x, stack, ids, weights, n, group_size, method)
    expected = reference.moe_lowbit_gemm(
        x, *stack, ids, weights, n=n, group_size=group_size, layout="gpu_tile", compute_dtype=torch.float64
    )
    measured = error(out, expected)
    assert measured <= TOLERANCE[x.dtype], f"relative error {measured:.2e}"
    return out


@pytest.mark.parametrize("method", [16, 64, "dense"])
@pytest.mark.parametrize("k, group_size", [(512, 128), slow(192, 64), (96, 32)])
def test_all_widths(method, k, group_size):
    """Both numbers of words along K, trips that are a whole span and trips that are not, invalid ids."""
    stack = random_stack([1, 0, 2, 3, 4, 8], 100, k, group_size, "gpu_tile", k)
    ids = torch.randint(-1, 7, (9, 2))
    check(fresh(9, k), stack, ids, None, 100, group_size, method)


@pytest.mark.parametrize("bits", [1, 3])
def test_narrow_tiles_of_wide_spans(bits):
    """k = 768 has 8 words along K at 1 and 3 bits; 32 columns take 3 bits a span at a time and 1 bit half of one."""
    stack = random_stack([bits], 64, 768, 128, "gpu_tile", bits)
    for method in (32, 128):
        check(fresh(3, 768), stack, torch.zeros(3, 1, dtype=torch.int64), None, 64, 128, method)


@pytest.mark.parametrize("method, dtype", [
    slow(32, torch.float16), (32, torch.bfloat16), (128, torch.float32), slow(128, torch.bfloat16),
    slow("dense", torch.float32), ("dense", torch.bfloat16),
])  # fmt: skip
def test_dtypes_and_weights(method, dtype):
    """Several blocks an expert, an idle expert, one row a slot, activations of a range that float16 has not."""
    stack = random_stack([3, 2, 4], 72, 128, 64, "gpu_tile", 5)
    ids = torch.tensor([[0, 2]]).repeat(33, 1)
    ids[::5, 1], ids[7] = -1, 3
    check(fresh(33, 2, 128, dtype=dtype), stack, ids, torch.rand(33, 2), 72, 64, method)


@pytest.mark.parametrize("scale, method", [(1e30, 16), (1e-30, "dense")])
def test_any_range(scale, method):
    stack = random_stack([2, 3], 64, 128, 64, "gpu_tile", 6)
    check(fresh(9, 128, dtype=torch.bfloat16) * scale, stack, torch.ones(9, 1, dtype=torch.int32), None, 64, 64, method)


@pytest.mark.parametrize("method", [64, slow("dense")])
def test_all_tokens_on_one_expert(method):
    stack = random_stack([1, 2, 3], 64, 96, 32, "gpu_tile", 2)
    check(fresh(100, 96), stack, torch.full((100, 1), 2), torch.rand(100, 1), 64, 32, method)


@pytest.mark.parametrize("method", [16, "dense"])
def test_nothing_to_multiply(method):
    """Experts without weights and ids without experts: zeros, even from NaN."""
    stack = random_stack([0, 0, 2], 64, 128, 64, "gpu_tile", 2)
    x = torch.full((17, 128), float("nan"), dtype=torch.float16)
    ids = torch.tensor([[0, 1, -5, 3]]).repeat(17, 1)
    assert not run(x, stack, ids, None, 64, 64, method).any()
    assert not run(x, stack, ids, torch.rand(17, 4), 64, 64, method).any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("method", [16, "dense"])
def test_a_bad_row_stays_alone(method):
    stack = random_stack([2, 1], 64, 128, 64, "gpu_tile", 4)
    x, ids = fresh(18, 128), torch.zeros(18, 1, dtype=torch.int64)
    clean = run(x, stack, ids, None, 64, 64, method).cpu()
    x[1, 3], x[17, 5], x[3] = float("nan"), float("inf"), 0.0
    out = run(x, stack, ids, None, 64, 64, method).cpu()
    good = [i for i in range(18) if i not in (1, 3, 17)]
    assert torch.equal(out[good], clean[good])
    assert out[1].isnan().all() and not out[17].isfinite().any() and not out[3].any()


@pytest.mark.parametrize("method, intermediate", [(16, 192), slow(128, 64), ("dense", 192), slow(32, 96)])
def test_ffn(method, intermediate, monkeypatch):
    bits = [2, 1, 0, 3, 4]
    # one expert at a time is unpacked: several rounds
    monkeypatch.setattr(prefill_launch, "SCRATCH_BYTES", 2 * 2 * intermediate * 128)
    gate_up = random_stack(bits, 2 * intermediate, 128, 64, "gpu_tile", 6)
    down = random_stack(bits[::-1], 128, intermediate, 32, "gpu_tile", 7)
    ids, weights = routing(17, 2, 5)
    ids[0, 1], ids[9] = -1, 5
    x = fresh(17, 128, dtype=torch.bfloat16)
    x[5] *= 3e4
    out = poisoned(17, 128, dtype=torch.bfloat16)
    prefill_launch.ffn(
        x.to(DEVICE), on_device(gate_up), on_device(down), ids.to(DEVICE), weights.to(DEVICE), intermediate, 64, 32,
        out, not INTERPRETED, launch(method),
    )
    expected = reference.moe_lowbit_ffn(
        x, gate_up, down, ids, weights, intermediate=intermediate, group_size=64, down_group_size=32,
        layout="gpu_tile", compute_dtype=torch.float64,
    )
    # one row is nearly all of the norm: 128 numbers, whose roundings average out less
    assert error(out, expected) <= 1.3 * TOLERANCE[torch.bfloat16]
    others = [i for i in range(17) if i != 5]
    assert error(out[others], expected[others]) <= TOLERANCE[torch.bfloat16]


def in_torch(first: torch.Tensor) -> torch.Tensor:
    raise AssertionError("the activation was left to torch")


def without_gate(x, ids, weights, bits, inner, biases, method):
    """A squared-ReLU block's output in one pass and the float64 reference, with hidden size 128."""
    gate_up = random_stack(bits, inner, 128, 64, "gpu_tile", inner)
    down = random_stack(bits[::-1], 128, inner, 32, "gpu_tile", 7)
    out = poisoned(*x.shape, dtype=x.dtype)
    between = Inner(in_torch, False, None, *(b if b is None else b.to(DEVICE) for b in biases))
    prefill_launch.ffn(
        x.to(DEVICE), on_device(gate_up), on_device(down), ids.to(DEVICE), weights.to(DEVICE), inner, 64, 32, out,
        not INTERPRETED, launch(method), between,
    )
    expected = reference.moe_lowbit_ffn(
        x, gate_up, down, ids, weights, intermediate=inner, group_size=64, down_group_size=32, layout="gpu_tile",
        compute_dtype=torch.float64, activation=Activation("relu2"), gate_up_bias=biases[0], down_bias=biases[1],
    )
    return out, expected


@pytest.mark.parametrize("method", [16, slow(32), slow(64), 128, "dense"])
@pytest.mark.parametrize("inner", [slow(32), 96, slow(160), slow(320), 192])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
def test_squared_relu_in_one_pass(method, inner, bias, monkeypatch):
    """Every width and none, rows that fill no tile or no program, an idle expert, ids out of range, any scale."""
    monkeypatch.setattr(prefill_launch, "SCRATCH_BYTES", 4 * inner * 128)
    bits = [2, 1, 0, 3, 4, 8, 5]
    ids, weights = torch.randint(0, 6, (19, 2)), torch.rand(19, 2)
    ids[0, 1], ids[9], ids[3] = -1, 7, 2
    x = fresh(19, 128, dtype=torch.float32)
    x[5] *= 1e12
    biases = (torch.randn(7, inner), torch.randn(7, 128)) if bias else (None, None)
    out, expected = without_gate(x, ids, weights, bits, inner, biases, method)
    # squaring doubles a rounding; a row is 128 numbers, whose roundings average out less
    others = [i for i in range(19) if i != 5]
    assert error(out[others], expected[others]) <= 2 * TOLERANCE[torch.float16]
    assert error(out[5], expected[5]) <= 3 * TOLERANCE[torch.float16]
    if not bias:
        assert not out[9].any() and not out[3].any()


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("method", [16, "dense"])
def test_squared_relu_of_a_bad_row(method):
    """NaN and what overflows stay in their row; negative infinity is a zero where nothing else is added."""
    x, ids, weights = fresh(18, 128, dtype=torch.float32), torch.zeros(18, 1, dtype=torch.int64), torch.ones(18, 1)
    clean, _ = without_gate(x, ids, weights, [2, 1], 96, (None, None), method)
    x[1, 3], x[3], x[17] = float("nan"), 0.0, 1e30
    out, _ = without_gate(x, ids, weights, [2, 1], 96, (None, None), method)
    good = [i for i in range(18) if i not in (1, 3, 17)]
    assert torch.equal(out[good], clean[good])
    assert out[1].isnan().all() and not out[17].isfinite().all() and not out[3].any()


def test_public_calls_take_the_table():
    """17 tokens through moe_prefill and moe_ffn, twice: the same bits."""
    stack = on_device(random_stack([2, 3], 128, 64, 64, "gpu_tile", 8))
    ids, weights = (t.to(DEVICE) for t in routing(17, 1, 2))
    x = fresh(17, 64).to(DEVICE)
    a, b = (moe_prefill(x, *stack, ids, weights, n=128, group_size=64) for _ in range(2))
    assert torch.equal(a, b) and torch.isfinite(a).all()
    down = on_device(random_stack([2, 3], 64, 64, 64, "gpu_tile", 9))
    a, b = (moe_ffn(x, stack, down, ids, weights, intermediate=64, group_size=64) for _ in range(2))
    assert torch.equal(a, b) and torch.isfinite(a).all()


def test_column_order_is_a_permutation_of_each_32():
    place = torch.arange(512)
    at = place % 32
    column = place - at + at % 8 // 2 * 8 + at // 16 * 4 + at % 16 // 8 * 2 + at % 2
    assert torch.equal(column.view(-1, 32).sort(-1).values, place.view(-1, 32))
    x = torch.arange(1.0, 513.0)[None].to(DEVICE)
    ordered, inverse = prefill_inputs.normalize(x, True)
    plain, _ = prefill_inputs.normalize(x, False)
    assert torch.equal(ordered[0].cpu(), plain[0].cpu()[column])
    assert torch.equal((plain.float() * inverse).cpu(), x.cpu())
