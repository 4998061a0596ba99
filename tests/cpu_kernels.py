"""The compiled CPU kernels called directly, in every variant that this CPU runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gemq._core import core
from gemq.ops.packed_stack import Stack

TOLERANCE = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PRECISIONS = ["exact", "int16", "int8"]


def variants() -> list[str]:
    def runs(name: str) -> bool:
        try:
            core().set_cpu_isa(name)
        except ValueError:
            return False
        return True

    before = core().cpu_isa()
    found = [name for name in core().build_info()["cpu_variants"] if runs(name)]
    core().set_cpu_isa(before)
    return found


@pytest.fixture(params=variants())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = core().cpu_isa()
    core().set_cpu_isa(request.param)
    yield request.param
    core().set_cpu_isa(before)


def assert_near(out: Tensor, ref: Tensor) -> None:
    assert out.shape == ref.shape
    assert out.isfinite().all(), "some outputs were not written"
    error, size = (out - ref).norm().item(), ref.norm().item()
    assert error <= TOLERANCE * size, f"relative error {error / max(size, 1e-300):.2e}"


def address(stack: Stack):
    names = ("codes", "meta", "bits", "offsets", "meta_offsets")
    addresses = {name: t.data_ptr() for name, t in zip(names, stack, strict=True)}
    return core().stack_address(**addresses, code_bytes=stack[0].numel(), meta_elements=stack[1].numel())


def precision_of(x: Tensor, precision: str) -> dict[str, int]:
    """The arguments ``type`` and ``precision``, as the kernels number them."""
    return {"type": DTYPES.index(x.dtype), "precision": PRECISIONS.index(precision)}


def moe_gemm(
    x: Tensor, stack: Stack, ids: Tensor, weights: Tensor | None, n: int, group_size: int, threads: int = 2,
    precision: str = "exact",
) -> Tensor:
    tokens, top_k = ids.shape
    out = torch.full((tokens, top_k, n) if weights is None else (tokens, n), float("nan"), dtype=x.dtype)
    core().moe_gemm_cpu(
        x=x.data_ptr(), x_per_slot=x.dim() == 3, stack=address(stack), num_experts=stack[2].numel(),
        topk_ids=ids.data_ptr(), topk_weights=0 if weights is None else weights.data_ptr(), out=out.data_ptr(),
        tokens=tokens, top_k=top_k, k=x.shape[-1], n=n, group_size=group_size, **precision_of(x, precision),
        threads=threads,
    )
    return out


def moe_ffn(
    x: Tensor, gate_up: Stack, down: Stack, ids: Tensor, weights: Tensor, intermediate: int, group_size: int,
    down_group_size: int, threads: int = 2, precision: str = "exact",
) -> Tensor:
    tokens, top_k = ids.shape
    out = torch.full_like(x, float("nan"))
    core().moe_ffn_cpu(
        x=x.data_ptr(), gate_up=address(gate_up), down=address(down), num_experts=gate_up[2].numel(),
        topk_ids=ids.data_ptr(), topk_weights=weights.data_ptr(), out=out.data_ptr(), tokens=tokens, top_k=top_k,
        hidden=x.shape[1], intermediate=intermediate, group_size=group_size, down_group_size=down_group_size,
        **precision_of(x, precision), threads=threads,
    )
    return out


def routed(tokens: int, top_k: int, experts: int, seed: int) -> tuple[Tensor, Tensor, torch.Generator]:
    """Ids with some outside 0..experts-1 (-1 and ``experts``), and weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)
    ids[0, 0] = 1  # at least one pair does something
    return ids, torch.rand(tokens, top_k, generator=generator), generator
