"""The CPU kernels over packed experts against the float64 reference, in every variant that this CPU runs.

Tolerance: ``|out - ref| <= 1e-6 |ref|`` (norms). Activations and sums are float32; with two-level sums (128 terms,
then groups) their rounding stays near 3e-7 of the norm at these sizes, while one wrong code or scale gives 1e-3.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from cpu_kernels import Stack, assert_near, moe_ffn, moe_gemm, routed
from stacks import random_stack
from torch import Tensor

from gemq import reference
from gemq._core import core


@cache
def all_widths_case(tokens: int, group_size: int) -> tuple[Stack, Tensor, list[tuple[Tensor, Tensor | None, Tensor]]]:
    """``(stack, ids, [(x, weights, reference)])``, made once for all variants."""
    n, k = 45, 256
    stack = random_stack(range(9), n, k, group_size, "cpu_tile", seed=tokens)
    ids, weights, generator = routed(tokens, 3, 9, seed=group_size)
    cases = []
    for x in (torch.randn(tokens, k, generator=generator), torch.randn(tokens, 3, k, generator=generator)):
        for scale in (None, weights):
            ref = reference.moe_lowbit_gemm(
                x, *stack, ids, scale, n=n, group_size=group_size, layout="cpu_tile", compute_dtype=torch.float64
            )
            cases.append((x, scale, ref))
    return stack, ids, cases


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 17, 64])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_moe_gemm_with_all_widths(isa: str, tokens: int, group_size: int) -> None:
    stack, ids, cases = all_widths_case(tokens, group_size)
    for x, weights, ref in cases:
        assert_near(moe_gemm(x, stack, ids, weights, ref.shape[-1], group_size), ref)


@cache
def one_width_case(bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(qweight, meta, x, reference)`` of one matrix of 33 rows and 384 columns against 31 tokens."""
    qweight, meta, *_ = random_stack([bits], 33, 384, 128, "cpu_tile", seed=bits)
    x = torch.randn(31, 384, generator=torch.Generator().manual_seed(bits))
    ref = reference.lowbit_gemm(x, qweight, meta, bits=bits, n=33, layout="cpu_tile", compute_dtype=torch.float64)
    return qweight, meta, x, ref


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 8, 13, 31])
def test_every_width_at_every_number_of_tokens(isa: str, bits: int, tokens: int) -> None:
    qweight, meta, x, ref = one_width_case(bits)
    out = torch.full((tokens, 33), float("nan"))
    core().lowbit_gemm_cpu(
        x=x.data_ptr(), qweight=qweight.data_ptr(), meta=meta.data_ptr(), out=out.data_ptr(), tokens=tokens, k=384,
        n=33, bits=bits, group_size=128, type=0, precision=0, threads=2,
    )
    assert_near(out, ref[:tokens])


def test_a_long_row_keeps_the_tolerance(isa: str) -> None:
    n, k = 16, 14336
    stack = random_stack([2, 3, 8], n, k, 128, "cpu_tile", seed=0)
    x = torch.randn(9, k, generator=torch.Generator().manual_seed(0)) + 0.1
    ids = torch.tensor([[0, 1, 2]] * 9)
    for tokens in (1, 9):
        ref = reference.moe_lowbit_gemm(
            x[:tokens], *stack, ids[:tokens], n=n, layout="cpu_tile", compute_dtype=torch.float64
        )
        assert_near(moe_gemm(x[:tokens], stack, ids[:tokens], None, n, 128), ref)


@cache
def ffn_case(tokens: int, intermediate: int, down_group_size: int) -> tuple:
    """``(x, gate_up, down, ids, weights, reference)``, made once for all variants."""
    gate_up = random_stack([3, 0, 2, 8, 1], 2 * intermediate, 256, 64, "cpu_tile", seed=tokens)
    down = random_stack([2, 1, 0, 4, 5], 256, intermediate, down_group_size, "cpu_tile", seed=tokens + 1)
    ids, weights, generator = routed(tokens, 2, 5, seed=intermediate)
    ids[0] = torch.tensor([3, 0])
    x = 2 * torch.randn(tokens, 256, generator=generator)
    ref = reference.moe_lowbit_ffn(
        x, gate_up, down, ids, weights, intermediate=intermediate, group_size=64, down_group_size=down_group_size,
        layout="cpu_tile", compute_dtype=torch.float64,
    )
    return x, gate_up, down, ids, weights, ref


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 17, 64])
@pytest.mark.parametrize(("intermediate", "down_group_size"), [(96, 32), (192, 64), (128, 128)])
def test_moe_ffn(isa: str, tokens: int, intermediate: int, down_group_size: int) -> None:
    *inputs, ref = ffn_case(tokens, intermediate, down_group_size)
    assert_near(moe_ffn(*inputs, intermediate, 64, down_group_size), ref)


@pytest.mark.parametrize("scale", [1.0, 20.0, 1e3])
def test_silu_far_from_zero(isa: str, scale: float) -> None:
    hidden = intermediate = 128
    gate_up = random_stack([8], 2 * intermediate, hidden, 128, "cpu_tile", seed=0)
    down = random_stack([8], hidden, intermediate, 128, "cpu_tile", seed=1)
    x = scale * torch.randn(7, hidden, generator=torch.Generator().manual_seed(2))
    ids, weights = torch.zeros(7, 1, dtype=torch.int64), torch.ones(7, 1)
    ref = reference.moe_lowbit_ffn(
        x, gate_up, down, ids, weights, intermediate=intermediate, layout="cpu_tile", compute_dtype=torch.float64
    )
    assert_near(moe_ffn(x, gate_up, down, ids, weights, intermediate, 128, 128), ref)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_one_and_two_threads_agree_to_the_bit(isa: str, tokens: int) -> None:
    hidden, intermediate = 160, 96
    gate_up = random_stack([3, 2, 1, 4], 2 * intermediate, hidden, 32, "cpu_tile", seed=0)
    down = random_stack([2, 3, 4, 1], hidden, intermediate, 32, "cpu_tile", seed=1)
    ids, weights, generator = routed(tokens, 2, 4, seed=3)
    x = torch.randn(tokens, hidden, generator=generator)
    n = 2 * intermediate
    one, two, three = (moe_gemm(x, gate_up, ids, weights, n, 32, threads) for threads in (1, 2, 3))
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    one, two = (moe_ffn(x, gate_up, down, ids, weights, intermediate, 32, 32, threads) for threads in (1, 2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [3, 12])
def test_a_poisoned_token_stays_alone(isa: str, tokens: int, poison: float) -> None:
    hidden, intermediate = 128, 64
    gate_up = random_stack([2, 3], 2 * intermediate, hidden, 64, "cpu_tile", seed=0)
    down = random_stack([3, 1], hidden, intermediate, 64, "cpu_tile", seed=1)
    ids = torch.tensor([[0, 1]] * tokens)
    weights = torch.full((tokens, 2), 0.5)
    clean = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(2))
    dirty = clean.clone()
    dirty[1, 7] = poison
    others = [t for t in range(tokens) if t != 1]
    for run in (
        lambda x: moe_gemm(x, gate_up, ids, None, 2 * intermediate, 64),
        lambda x: moe_ffn(x, gate_up, down, ids, weights, intermediate, 64, 64),
    ):
        good, bad = run(clean), run(dirty)
        assert torch.equal(good[others], bad[others])
        assert not bad[1].isfinite().all()


def test_experts_that_store_nothing(isa: str) -> None:
    stack = random_stack([0, 0], 20, 64, 32, "cpu_tile", seed=0)
    ids = torch.tensor([[0, 1], [-1, 2]])
    x = torch.randn(2, 64)
    assert not moe_gemm(x, stack, ids, None, 20, 32).any()
    assert not moe_gemm(x, stack, ids, torch.ones(2, 2), 20, 32).any()


def test_no_valid_id_gives_zeros_whatever_the_weights(isa: str) -> None:
    stack = random_stack([2], 20, 64, 32, "cpu_tile", seed=0)
    weights = torch.full((3, 2), float("nan"))
    assert not moe_gemm(torch.randn(3, 64), stack, torch.full((3, 2), -1), weights, 20, 32).any()


def test_zero_tokens(isa: str) -> None:
    stack = random_stack([2, 3], 16, 64, 32, "cpu_tile", seed=0)
    ids = torch.zeros(0, 2, dtype=torch.int64)
    assert moe_gemm(torch.zeros(0, 64), stack, ids, None, 16, 32).shape == (0, 2, 16)
    down = random_stack([2, 3], 64, 32, 32, "cpu_tile", seed=0)
    gate_up = random_stack([2, 3], 64, 64, 32, "cpu_tile", seed=0)
    assert moe_ffn(torch.zeros(0, 64), gate_up, down, ids, torch.zeros(0, 2), 32, 32, 32).shape == (0, 64)
    shape = {"tokens": 0, "k": 64, "n": 16, "bits": 2, "group_size": 32, "type": 0, "precision": 0}
    core().lowbit_gemm_cpu(x=0, qweight=0, meta=0, out=0, **shape)


def test_bad_arguments_are_refused_by_name() -> None:
    stack = random_stack([2, 3], 16, 64, 32, "cpu_tile", seed=0)
    x, ids = torch.randn(1, 64), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"weight expert_bits\[1\] must be an integer in 0\.\.8, got 9"):
        moe_gemm(x, (*stack[:2], torch.tensor([2, 9], dtype=torch.int32), *stack[3:]), ids, None, 16, 32)
    with pytest.raises(ValueError, match=r"weight expert_offsets\[0\] is -1, where the 16 x 64 of expert 0"):
        moe_gemm(x, (*stack[:3], torch.tensor([-1, 0]), stack[4]), ids, None, 16, 32)
    with pytest.raises(ValueError, match="group_size must be 32, 64 or 128, got 16"):
        moe_gemm(x, stack, ids, None, 16, 16)
    with pytest.raises(ValueError, match="k must be a positive multiple of group_size=128, got 64"):
        moe_gemm(x, stack, ids, None, 16, 128)
    with pytest.raises(ValueError, match="out must be an address, got a null pointer"):
        core().lowbit_gemm_cpu(
            x=x.data_ptr(), qweight=stack[0].data_ptr(), meta=stack[1].data_ptr(), out=0, tokens=1, k=64, n=16, bits=2,
            group_size=32, type=0, precision=0,
        )
    names = "(avx512vnni, .*)?portable"
    with pytest.raises(ValueError, match=rf"name must be one of {names} and run on this CPU .* got 'sse'"):
        core().set_cpu_isa("sse")
