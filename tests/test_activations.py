"""Activations and biases of the fused block, on every layout that a CPU serves, against float64 and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from cpu_kernels import isa  # noqa: F401
from stacks import random_stack
from torch import Tensor
from torch.nn import functional as F

from gemq import reference
from gemq.activation import Activation
from gemq.ops import PackedStack, moe_lowbit_ffn, set_cpu_activations

HIDDEN, INNER = 128, 96
EVERY = [
    Activation(), Activation(limit=0.4), Activation("gelu_tanh"), Activation("swigluoai", limit=0.7),
    Activation("swigluoai", alpha=0.9), Activation("relu2"),
]
named = pytest.mark.parametrize("activation", EVERY, ids=lambda a: f"{a.name}-{a.alpha}-{a.limit}")
biased = pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
# widths of the two projections differ; without bits: the first expert in one projection, the third in both
FIRST, SECOND = [2, 0, 0, 3, 8], [3, 2, 0, 1, 4]


@pytest.fixture(autouse=True)
def exact_activations():
    before = set_cpu_activations("exact")
    yield
    set_cpu_activations(before)


def by_hand(activation: Activation, first: Tensor) -> Tensor:
    """The activations as their families' models write them."""
    if activation.name == "relu2":
        return F.relu(first).pow(2)
    limit = activation.limit or math.inf
    gate, up = first.chunk(2, -1)
    if activation.name == "swigluoai":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gate * torch.sigmoid(gate * activation.alpha))
    if activation.name == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def block(activation: Activation, layout: str, bias: bool, seed: int = 0):
    """Both stacks, and the biases by name."""
    rows = activation.rows(INNER)
    stacks = (random_stack(FIRST, rows, HIDDEN, 64, layout, seed), random_stack(SECOND, HIDDEN, INNER, 32, layout, 9))
    packed = (PackedStack(*stacks[0], rows, HIDDEN, 64, layout), PackedStack(*stacks[1], HIDDEN, INNER, 32, layout))
    if not bias:
        return packed, {}
    return packed, {"gate_up_bias": torch.randn(len(FIRST), rows), "down_bias": torch.randn(len(FIRST), HIDDEN)}


def call(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.randint(-1, len(FIRST) + 1, (tokens, 3))
    return torch.randn(tokens, HIDDEN).to(dtype), ids, torch.rand(tokens, 3)


def expected(x: Tensor, stacks, ids: Tensor, weights: Tensor, activation: Activation, biases: dict) -> Tensor:
    """The block in float64, pair by pair, from dequantized experts."""
    gate_up, down = ([reference.moe_lowbit_gemm(
        torch.eye(s.k), *s.tensors, torch.full((s.k, 1), e), n=s.n, group_size=s.group_size, layout=s.layout,
        compute_dtype=torch.float64)[:, 0].T for e in range(s.experts)] for s in stacks)
    out = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for t, slots in enumerate(ids.tolist()):
        for slot, e in enumerate(slots):
            if not 0 <= e < len(FIRST):
                continue
            first = gate_up[e] @ x[t].double()
            if biases and FIRST[e]:
                first = first + biases["gate_up_bias"][e]
            second = down[e] @ by_hand(activation, first)
            if biases and SECOND[e]:
                second = second + biases["down_bias"][e]
            out[t] += weights[t, slot].double() * second
    return out


@named
@biased
def test_torch_path_and_reference(activation, bias):
    stacks, biases = block(activation, "canonical", bias)
    x, ids, weights = call(9)
    wanted = expected(x, stacks, ids, weights, activation, biases)
    found = moe_lowbit_ffn(x, *stacks, ids, weights, activation=activation, **biases)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    plain = reference.moe_lowbit_ffn(
        x, *(s.tensors for s in stacks), ids, weights, intermediate=INNER, group_size=64, down_group_size=32,
        compute_dtype=torch.float64, activation=activation, **biases,
    )
    torch.testing.assert_close(plain, wanted, rtol=1e-12, atol=1e-12)


@named
@biased
@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_kernels(isa, activation, bias, tokens, dtype):  # noqa: F811
    stacks, biases = block(activation, "cpu_tile", bias)
    x, ids, weights = call(tokens, dtype)
    wanted = expected(x, stacks, ids, weights, activation, biases)
    found = moe_lowbit_ffn(x, *stacks, ids, weights, activation=activation, **biases)
    assert found.isfinite().all() and found.dtype == dtype
    error = float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30))
    assert error < (1e-5 if dtype == torch.float32 else 4e-3)


@named
@biased
def test_gradients(activation, bias):
    """Of the tokens and the routing weights, against autograd through dequantized experts."""
    stacks, biases = block(activation, "cpu_tile", bias)
    x, ids, weights = call(6)
    x.requires_grad_()
    weights.requires_grad_()
    grad = torch.randn(6, HIDDEN)
    found = torch.autograd.grad(moe_lowbit_ffn(x, *stacks, ids, weights, activation=activation, **biases),
                                (x, weights), grad)
    wanted = torch.autograd.grad(expected(x, stacks, ids, weights, activation, biases), (x, weights), grad.double())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=1e-3, atol=1e-4)


@named
def test_a_bad_value_stays_one(isa, activation):  # noqa: F811
    """Limits hold infinity, and hide no NaN."""
    stacks, _ = block(activation, "cpu_tile", False)
    x, _, weights = call(3)
    ids = torch.tensor([[3, 4, 0], [3, 3, 3], [4, 4, 4]])
    x[1, 5] = float("nan")
    found = moe_lowbit_ffn(x, *stacks, ids, weights, activation=activation)
    assert found[1].isnan().all() and found[0].isfinite().all() and found[2].isfinite().all()


@named
def test_compiled_and_mapped(activation):
    stacks, biases = block(activation, "cpu_tile", True)
    x, ids, weights = call(4)
    run = lambda x, ids, w: moe_lowbit_ffn(x, *stacks, ids, w, activation=activation, **biases)  # noqa: E731
    wanted = run(x, ids, weights)
    torch.testing.assert_close(torch.compile(run, backend="aot_eager")(x, ids, weights), wanted)
    mapped = torch.func.vmap(run)(x[:, None], ids[:, None], weights[:, None])
    torch.testing.assert_close(mapped[:, 0], wanted)


def test_bad_arguments():
    stacks, biases = block(Activation(), "cpu_tile", True)
    x, ids, weights = call(2)
    with pytest.raises(ValueError, match="activation must be one of silu, gelu_tanh, swigluoai, relu2, got 'tanh'"):
        moe_lowbit_ffn(x, *stacks, ids, weights, activation="tanh")
    with pytest.raises(TypeError, match="activation must be an Activation or its name, got int"):
        moe_lowbit_ffn(x, *stacks, ids, weights, activation=3)
    with pytest.raises(ValueError, match="with relu2 between them"):
        moe_lowbit_ffn(x, *stacks, ids, weights, activation="relu2")
    with pytest.raises(ValueError, match=r"gate_up_bias must be \[5, 192\], got \[5, 128\]"):
        moe_lowbit_ffn(x, *stacks, ids, weights, gate_up_bias=biases["down_bias"])
    with pytest.raises(TypeError, match="down_bias"):
        moe_lowbit_ffn(x, *stacks, ids, weights, down_bias=biases["down_bias"].half())
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"activation\.limit must be positive"):
            Activation(limit=wrong)
    with pytest.raises(ValueError, match="gelu_tanh takes no limit"):
        Activation("gelu_tanh", limit=3.0)
