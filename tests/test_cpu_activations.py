"""Rounded activations of the CPU kernels: what they are, their error bound, and the setting that chooses them."""

from __future__ import annotations

import pytest
import torch
from cpu_kernels import assert_near, moe_ffn, moe_gemm, routed
from stacks import random_stack
from torch import Tensor

from gemq import ops, reference
from gemq._core import core

STEPS = {"int16": 32512.0, "int8": 127.0}
precisions = pytest.mark.parametrize("precision", STEPS)


def rounded(x: Tensor, precision: str, group_size: int) -> Tensor:
    """The activations that the kernels multiply, float64: ``scale * q`` as gemq.ops.cpu describes them."""
    groups = x.float().unflatten(-1, (-1, group_size))
    most = groups.abs().amax(-1, keepdim=True)
    steps = torch.tensor(STEPS[precision])
    q = torch.round(groups.double() * (steps / most).double())
    return (q * (most / steps).double()).flatten(-2)


def rounds(isa: str) -> bool:
    return isa != "portable"


@precisions
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 2, 4, 7, 19])
def test_products_of_the_rounded_activations(isa: str, tokens: int, group_size: int, precision: str) -> None:
    """All widths, rows that do not fill a block, ids of no expert; each token alone and several for one expert."""
    n, k = 45, 256
    stack = random_stack(range(9), n, k, group_size, "cpu_tile", seed=tokens)
    ids, weights, generator = routed(tokens, 3, 9, seed=group_size)
    x = torch.randn(tokens, k, generator=generator) * torch.logspace(-3, 3, k)
    seen = rounded(x, precision, group_size) if rounds(isa) else x
    for scale in (None, weights):
        ref = reference.moe_lowbit_gemm(
            seen, *stack, ids, scale, n=n, group_size=group_size, layout="cpu_tile", compute_dtype=torch.float64
        )
        assert_near(moe_gemm(x, stack, ids, scale, n, group_size, precision=precision), ref)


@precisions
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_with_full_blocks_and_an_odd_one(isa: str, bits: int, precision: str) -> None:
    stack = random_stack([bits], 80, 384, 128, "cpu_tile", seed=bits)
    generator = torch.Generator().manual_seed(bits)
    for tokens in (1, 3, 5, 13):
        x = torch.randn(tokens, 384, generator=generator)
        ids = torch.zeros(tokens, 1, dtype=torch.int64)
        seen = rounded(x, precision, 128) if rounds(isa) else x
        ref = reference.moe_lowbit_gemm(seen, *stack, ids, n=80, layout="cpu_tile", compute_dtype=torch.float64)
        assert_near(moe_gemm(x, stack, ids, None, 80, 128, precision=precision), ref)


@precisions
def test_the_largest_sums_do_not_overflow(isa: str, precision: str) -> None:
    """Codes of all ones against activations of the largest size, both signs."""
    for bits in range(1, 9):
        stack = list(random_stack([bits], 16, 128, 128, "cpu_tile", seed=0))
        stack[0].fill_(255)
        x = torch.full((5, 128), 3.0)
        x[1::2] *= -1
        ids = torch.zeros(5, 1, dtype=torch.int64)
        ref = reference.moe_lowbit_gemm(x, *stack, ids, n=16, layout="cpu_tile", compute_dtype=torch.float64)
        for count in (1, 5):
            assert_near(moe_gemm(x[:count], tuple(stack), ids[:count], None, 16, 128, precision=precision), ref[:count])


@precisions
def test_the_error_bound(isa: str, precision: str) -> None:
    """``|x - scale * q| <= max|x| / (2 * steps)`` of the group, so the product is off by that times ``sum|w|``."""
    n, k, group = 32, 512, 128
    stack = random_stack([4], n, k, group, "cpu_tile", seed=0)
    x = torch.randn(6, k, generator=torch.Generator().manual_seed(1))
    x[:, 7] = 50.0  # an outlier costs its own group alone
    ids = torch.zeros(6, 1, dtype=torch.int64)
    ref = reference.moe_lowbit_gemm(x, *stack, ids, n=n, layout="cpu_tile", compute_dtype=torch.float64)[:, 0]
    out = moe_gemm(x, stack, ids, None, n, group, precision=precision)[:, 0]
    weight = reference.moe_lowbit_gemm(
        torch.eye(k), *stack, torch.zeros(k, 1, dtype=torch.int64), n=n, layout="cpu_tile", compute_dtype=torch.float64
    )[:, 0].T
    most = x.abs().unflatten(-1, (-1, group)).amax(-1).double()
    size = weight.abs().unflatten(-1, (-1, group)).sum(-1)
    bound = most @ size.T / (2 * STEPS[precision])
    slack = 1e-6 * (x.abs().double() @ weight.abs().T)  # of the float32 sums
    assert ((out - ref).abs() <= bound + slack).all()
    if rounds(isa) and precision == "int8":
        assert (out - ref).norm() > 1e-4 * ref.norm(), "nothing was rounded"


# the inner activations are rounded too, from float32 values that may fall to the other side of a tie
FFN_TOLERANCE = {"int16": 1e-4, "int8": 2e-2}


@precisions
@pytest.mark.parametrize("tokens", [1, 2, 5, 33])
@pytest.mark.parametrize("intermediate, down_group", [(96, 32), (192, 64), (256, 128)])
def test_the_block(isa: str, tokens: int, intermediate: int, down_group: int, precision: str) -> None:
    gate_up = random_stack([3, 0, 2, 8, 1], 2 * intermediate, 256, 64, "cpu_tile", seed=tokens)
    down = random_stack([2, 1, 0, 4, 5], 256, intermediate, down_group, "cpu_tile", seed=tokens + 1)
    ids, weights, generator = routed(tokens, 2, 5, seed=intermediate)
    ids[0] = torch.tensor([3, 0])
    x = 2 * torch.randn(tokens, 256, generator=generator)
    ref = reference.moe_lowbit_ffn(
        x, gate_up, down, ids, weights, intermediate=intermediate, group_size=64, down_group_size=down_group,
        layout="cpu_tile", compute_dtype=torch.float64,
    )
    out = moe_ffn(x, gate_up, down, ids, weights, intermediate, 64, down_group, precision=precision)
    assert out.isfinite().all()
    assert (out - ref).norm() <= FFN_TOLERANCE[precision] * ref.norm()


@precisions
def test_a_row_does_not_depend_on_the_others_or_on_threads(isa: str, precision: str) -> None:
    if not rounds(isa):
        pytest.skip("float32 sums are split differently for one token and for many")
    gate_up = random_stack([1, 2, 3, 4], 2 * 96, 128, 64, "cpu_tile", seed=0)
    down = random_stack([4, 3, 2, 1], 128, 96, 32, "cpu_tile", seed=1)
    ids, weights, generator = routed(40, 2, 4, seed=3)
    x = torch.randn(40, 128, generator=generator)
    whole = moe_ffn(x, gate_up, down, ids, weights, 96, 64, 32, 2, precision)
    for threads in (1, 3):
        assert torch.equal(whole, moe_ffn(x, gate_up, down, ids, weights, 96, 64, 32, threads, precision))
    for t in (0, 7, 39):
        alone = moe_ffn(x[t : t + 1], gate_up, down, ids[t : t + 1], weights[t : t + 1], 96, 64, 32, 2, precision)
        assert torch.equal(whole[t : t + 1], alone)


@precisions
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [3, 12])
def test_a_poisoned_token_stays_alone(isa: str, tokens: int, poison: float, precision: str) -> None:
    gate_up = random_stack([2, 3], 128, 128, 64, "cpu_tile", seed=0)
    down = random_stack([3, 1], 128, 64, 64, "cpu_tile", seed=1)
    ids, weights = torch.tensor([[0, 1]] * tokens), torch.full((tokens, 2), 0.5)
    clean = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(2))
    dirty = clean.clone()
    dirty[1, 7] = poison
    others = [t for t in range(tokens) if t != 1]
    for run in (
        lambda x: moe_gemm(x, gate_up, ids, None, 128, 64, precision=precision),
        lambda x: moe_ffn(x, gate_up, down, ids, weights, 64, 64, 64, precision=precision),
    ):
        good, bad = run(clean), run(dirty)
        assert torch.equal(good[others], bad[others])
        assert not bad[1].isfinite().any()


@precisions
def test_groups_of_zeros_and_of_next_to_nothing(isa: str, precision: str) -> None:
    stack = random_stack([3], 16, 256, 128, "cpu_tile", seed=0)
    ids = torch.zeros(4, 1, dtype=torch.int64)
    x = torch.zeros(4, 256)
    x[1, :128] = 1e-38
    x[2, 128:] = 1e-30
    x[3] = 1e34
    ref = reference.moe_lowbit_gemm(x, *stack, ids, n=16, layout="cpu_tile", compute_dtype=torch.float64)[:, 0]
    out = moe_gemm(x, stack, ids, None, 16, 128, precision=precision)[:, 0]
    assert not out[0].any()
    assert out[1].abs().max() <= ref[1].abs().max() * 1.01
    assert (out[2:] - ref[2:]).norm(dim=-1).le(1e-2 * ref[2:].norm(dim=-1)).all()


@pytest.mark.parametrize("precision", ["exact", "int16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 9])
def test_half_types_are_widened_and_rounded_once(isa: str, tokens: int, dtype: torch.dtype, precision: str) -> None:
    gate_up = random_stack([1, 2, 3], 2 * 96, 160, 32, "cpu_tile", seed=0)
    down = random_stack([3, 2, 1], 160, 96, 32, "cpu_tile", seed=1)
    ids, weights, generator = routed(tokens, 2, 3, seed=3)
    x = torch.randn(tokens, 160, generator=generator).to(dtype)
    for run in (
        lambda x: moe_gemm(x, gate_up, ids, None, 192, 32, precision=precision),
        lambda x: moe_gemm(x, gate_up, ids, weights, 190, 32, precision=precision),
        lambda x: moe_ffn(x, gate_up, down, ids, weights, 96, 32, 32, precision=precision),
    ):
        assert torch.equal(run(x), run(x.float()).to(dtype))


def op(x: Tensor) -> Tensor:
    stack = random_stack([3], 32, 128, 128, "cpu_tile", seed=0)
    return ops.lowbit_gemm(x, *stack[:2], bits=3, n=32, layout="cpu_tile")


def test_the_setting() -> None:
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    results = {}
    for setting in ("int16", "int8", "exact"):
        before = ops.cpu_activations()
        assert ops.set_cpu_activations(setting) == before
        assert ops.cpu_activations() == setting
        results[setting] = op(x)
    near, far = ((results[s] - results["exact"]).norm() / results["exact"].norm() for s in ("int16", "int8"))
    if core().cpu_isa() == "portable":
        assert near == far == 0  # it multiplies in float32 whatever the setting
    else:
        assert near < 1e-4 < far < 2e-2
    for bad in ("auto", "fp32", None):
        with pytest.raises(ValueError, match="setting must be one of exact, int16, int8, got"):
            ops.set_cpu_activations(bad)
    assert ops.cpu_activations() == "exact"


def test_the_default_is_int16() -> None:
    import subprocess
    import sys

    program = "from gemq import ops; print(ops.cpu_activations())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "int16"


def test_a_variant_can_be_chosen_without_a_variable() -> None:
    before = ops.cpu_isa()
    try:
        assert ops.set_cpu_isa("portable") == before and ops.cpu_isa() == "portable"
        with pytest.raises(ValueError, match=r"name must be one of .*portable and run on this CPU .* got 'sse'"):
            ops.set_cpu_isa("sse")
        assert ops.cpu_isa() == "portable"
    finally:
        ops.set_cpu_isa(before)
