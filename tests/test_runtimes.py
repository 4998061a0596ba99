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


def test_the_example_of_the_page():
    """A stack and its tensors give the same."""
    text = (ROOT / "docs" / "runtimes.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert names["y"].shape == (4, 1, 256) and torch.equal(names["y"], names["z"])
    assert torch.equal(names["y"], ops.moe_lowbit_gemm(names["x"], names["again"], names["ids"]))
    assert names["again"].experts == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_ops_take_a_packed_stack(layout):
    up, down = random_stack(BITS, 2 * 64, K, GROUP, layout, seed=7), random_stack(BITS, K, 64, 32, layout, seed=8)
    stacks = ops.PackedStack(*up, 128, K, GROUP, layout), ops.PackedStack(*down, K, 64, 32, layout)
    x, ids, weights = routed()
    for scale in (None, weights):
        expected = reference.moe_lowbit_gemm(
            x.double(), *up, ids, scale, n=128, group_size=GROUP, layout=layout, compute_dtype=torch.float64
        )
        got = ops.moe_lowbit_gemm(x, stacks[0], ids, scale)
        assert float((got.double() - expected).norm() / expected.norm()) < 1e-4
        assert torch.equal(got, ops.moe_lowbit_gemm(x, stack=stacks[0], topk_ids=ids, topk_weights=scale))
        assert torch.equal(got, ops.moe_lowbit_gemm(x, *up, ids, scale, n=128, group_size=GROUP, layout=layout))
    flat = {"intermediate": 64, "group_size": GROUP, "down_group_size": 32, "layout": layout}
    got = ops.moe_lowbit_ffn(x, *stacks, ids, weights)
    assert torch.equal(got, ops.moe_lowbit_ffn(x, up, down, ids, weights, **flat))
    assert torch.equal(got, ops.moe_lowbit_ffn(x, *stacks, ids, weights, **flat))
    graph = torch.compile(ops.moe_lowbit_ffn, fullgraph=True, backend="eager")
    torch.testing.assert_close(graph(x, *stacks, ids, weights), got)


def test_stacks_that_fit_nothing_are_refused():
    up, down = (random_stack(BITS, n, k, 32, "cpu_tile", seed=9) for n, k in ((128, K), (K, 64)))
    stacks = ops.PackedStack(*up, 128, K, 32, "cpu_tile"), ops.PackedStack(*down, K, 64, 32, "cpu_tile")
    x, ids, weights = routed()
    with pytest.raises(ValueError, match="x has 64 columns, stack 128"):
        ops.moe_lowbit_gemm(x[:, :64], stacks[0], ids)
    with pytest.raises(ValueError, match="gate_up 128 x 128 and down 128 x 128 are of no one block"):
        ops.moe_lowbit_ffn(x, stacks[0], stacks[0], ids, weights)
    with pytest.raises(TypeError, match="down must be a PackedStack as the other stack is, got tuple"):
        ops.moe_lowbit_ffn(x, stacks[0], down, ids, weights)
    with pytest.raises(ValueError, match="group_size=64 was given, but the stacks say 32"):
        ops.moe_lowbit_ffn(x, *stacks, ids, weights, group_size=64)
    with pytest.raises(TypeError, match=r"moe_lowbit_ffn\(\) needs intermediate"):
        ops.moe_lowbit_ffn(x, up, down, ids, weights)
    with pytest.raises(ValueError, match="codes must hold at least one expert"):
        ops.pack_stack([None], [None], [0])
