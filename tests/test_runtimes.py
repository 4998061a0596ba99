"""Test the promises of docs/runtimes.md to a program that calls the ops with tensors of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stacks import random_stack

from gemq import ops, reference

ROOT = Path(__file__).resolve().parents[1]
BITS, N, K, GROUP = (1, 3, 0, 8, 2), 48, 128, 64
LAYOUTS = ("canonical", "cpu_tile")


def routed(tokens=7):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, K, generator=generator)
    ids = torch.rand(tokens, len(BITS), generator=generator).argsort(-1)[:, :2].int()
    return x, ids, torch.rand(tokens, 2, generator=generator)


def test_the_example_runs():
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / "call_from_torch.py")], capture_output=True, text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (error,) = re.findall(r"relative error (\S+) against", done.stdout)
    assert float(error) < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_buffers_may_begin_anywhere_and_be_longer(layout):
    qweight, meta, *tables = random_stack(BITS, N, K, GROUP, layout, seed=2)
    x, ids, weights = routed()
    expected = ops.moe_lowbit_gemm(x, qweight, meta, *tables, ids, weights, n=N, group_size=GROUP, layout=layout)
    for shift in (1, 3, 17):
        codes = torch.full((qweight.numel() + shift + 5,), 255, dtype=torch.uint8)
        codes[shift : shift + qweight.numel()] = qweight
        pairs = torch.full((meta.numel() + shift + 5,), float("nan"), dtype=torch.float16)
        pairs[shift : shift + meta.numel()] = meta
        moved = ops.moe_lowbit_gemm(
            x, codes[shift:], pairs[shift:], *tables, ids, weights, n=N, group_size=GROUP, layout=layout
        )
        assert torch.equal(moved, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_may_lie_in_any_order_and_share_memory(layout):
    """Offsets alone say where an expert is: two experts may be the same bytes, and the order is free."""
    qweight, meta, bits, offsets, meta_offsets = random_stack((3, 2, 3), N, K, GROUP, layout, seed=3)
    x, ids, _ = routed()
    ids = ids % 3
    expected = ops.moe_lowbit_gemm(
        x, qweight, meta, bits, offsets, meta_offsets, ids, n=N, group_size=GROUP, layout=layout
    )
    tables = [t[torch.tensor([2, 1, 0, 2])] for t in (bits, offsets, meta_offsets)]
    for names in ([2, 1, 0], [2, 1, 3]):
        renamed = torch.tensor(names)[ids.long()]
        got = ops.moe_lowbit_gemm(x, qweight, meta, *tables, renamed, n=N, group_size=GROUP, layout=layout)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_strides_of_activations_and_routing_are_free(layout, dtype):
    stack = random_stack(BITS, N, K, GROUP, layout, seed=4)
    x, ids, weights = routed()
    x = x.to(dtype)
    expected = ops.moe_lowbit_gemm(x, *stack, ids, weights, n=N, group_size=GROUP, layout=layout)
    wide = torch.full((7, 2 * K), float("nan"), dtype=dtype)
    wide[:, ::2] = x
    got = ops.moe_lowbit_gemm(
        wide[:, ::2], *stack, ids.t().contiguous().t(), weights.double().t().contiguous().t().float(), n=N,
        group_size=GROUP, layout=layout,
    )
    assert torch.equal(got, expected) and got.dtype == dtype and got.is_contiguous()


def test_a_call_changes_nothing_but_its_result():
    stack = random_stack(BITS, N, K, GROUP, "cpu_tile", seed=5)
    x, ids, weights = routed()
    before = [t.clone() for t in (x, ids, weights, *stack)]
    first = ops.moe_lowbit_gemm(x, *stack, ids, weights, n=N, group_size=GROUP, layout="cpu_tile")
    again = ops.moe_lowbit_gemm(x, *stack, ids, weights, n=N, group_size=GROUP, layout="cpu_tile")
    assert torch.equal(first, again) and first.data_ptr() != again.data_ptr()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, ids, weights, *stack), strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_are_those_of_the_reference(layout):
    stack = random_stack(BITS, N, K, GROUP, layout, seed=6)
    x, ids, weights = routed()
    ids[0, 0], ids[1, 1], ids[2] = -1, 99, -7
    got = ops.moe_lowbit_gemm(x, *stack, ids, weights, n=N, group_size=GROUP, layout=layout)
    expected = reference.moe_lowbit_gemm(x.double(), *stack, ids, weights, n=N, group_size=GROUP, layout=layout)
    assert float((got.double() - expected).norm() / expected.norm()) < 1e-5
    assert bool((got[2] == 0).all())
