"""Op calls drawn from a seed (widths, shapes, dtypes, token counts, routings, layouts), against dequantize and float64.

``run_case(seed)`` is one case; the same seed is the same case. Tensors are views into larger ones whose other bytes
are guard values: inputs must come back as they were, and buffers that are ours to give (outputs of the compiled
kernels) must keep their guards.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from comparing import assert_close
from cpu_kernels import address, precision_of
from stacks import random_stack
from torch import Tensor

from gemq import format as fmt
from gemq import ops, reference
from gemq._core import core

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# the tolerances are for norms of many roundings; of a few elements, one may be rounded by all it can, or cancel
FEW, LOOSE = 64, {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 2**-7}
GUARD = 64  # bytes on each side
PATTERN = 0xA5
OPS = ("gemm", "slots", "weighted", "ffn", "dense", "pack", "dequantize", "repack", "raw_gemm", "raw_ffn")
ROUTINGS = ("random", "one", "few", "repeated", "invalid", "padding")


class Guarded:
    """Tensors between guard values."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor | None, int]] = []

    def __call__(self, value: Tensor, *, output: bool = False) -> Tensor:
        """A contiguous copy of ``value`` between guards; what is no ``output`` may not change."""
        size = value.numel() * value.element_size()
        memory = torch.full((size + 2 * GUARD,), PATTERN, dtype=torch.uint8)
        inside = memory[GUARD : GUARD + size]
        inside.copy_(value.contiguous().flatten().view(torch.uint8))
        self.kept.append((memory, None if output else inside.clone(), size))
        return inside.view(value.dtype).view(value.shape)

    def check(self) -> None:
        """Fail if a guard or an input changed."""
        for memory, before, size in self.kept:
            assert bool((memory[:GUARD] == PATTERN).all()), "the guard before a buffer was written"
            assert bool((memory[GUARD + size :] == PATTERN).all()), "the guard behind a buffer was written"
            assert before is None or torch.equal(memory[GUARD : GUARD + size], before), "an input was written"


@dataclass(frozen=True)
class Case:
    """Case that a seed draws."""

    seed: int
    op: str
    layout: str
    dtype: torch.dtype
    bits: tuple[int, ...]
    down_bits: tuple[int, ...]
    n: int
    k: int
    group_size: int
    tokens: int
    top_k: int
    routing: str
    wide_ids: bool


def draw(seed: int, layouts: tuple[str, ...] = ("canonical", "cpu_tile"), most: int = 1) -> Case:
    """The case of ``seed``; ``most`` scales the largest shapes."""
    pick = random.Random(seed)
    op = pick.choice(OPS)
    layout = "cpu_tile" if op.startswith("raw") else pick.choice(layouts)
    group_size = pick.choice(fmt.GROUP_SIZES)
    k = group_size * pick.choice((1, 1, 2, 3, 3 * most))
    experts = pick.choice((1, 2, 3, 5, 8, 17))
    one = pick.randrange(0, 9)
    bits = [tuple(one if pick.random() < 0.2 else pick.randrange(0, 9) for _ in range(experts)) for _ in range(2)]
    if op in ("ffn", "raw_ffn"):
        n = k  # unused: hidden is k, the experts' inner width a multiple of 32
        n = 32 * pick.choice((1, 2, 3, 4 * most))
    else:
        n = pick.choice((1, 2, 15, 16, 17, 31, 33, 47, 63, 64, 65, 80 * most))
    return Case(
        seed, op, layout, pick.choice(DTYPES), bits[0], bits[1], n, k, group_size,
        pick.choice((0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33 * most)), pick.randint(1, min(experts, 4)),
        pick.choice(ROUTINGS), pick.random() < 0.5,
    )


def routed(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Expert ids and weights ``[tokens, top_k]``."""
    experts, shape = len(case.bits), (case.tokens, case.top_k)
    ids = torch.rand(case.tokens, experts, generator=generator).argsort(-1)[:, : case.top_k]
    if case.routing == "one":
        ids = torch.full(shape, int(torch.randint(0, experts, (), generator=generator)))
    elif case.routing == "few":
        ids = ids % max(1, experts // 2)
    elif case.routing == "repeated":
        ids = torch.randint(0, experts, shape, generator=generator)
    elif case.routing in ("invalid", "padding"):
        outside = torch.tensor([-1, experts, -(2**31), 2**31 - 1] if case.routing == "invalid" else [-1])
        hit = torch.rand(shape, generator=generator) < 0.4
        ids = torch.where(hit, outside[torch.randint(0, len(outside), shape, generator=generator)], ids)
    return ids.to(torch.int64 if case.wide_ids else torch.int32), torch.rand(shape, generator=generator)


def run_case(seed: int, layouts: tuple[str, ...] = ("canonical", "cpu_tile"), most: int = 1) -> None:
    """Run the case of ``seed`` and compare; the error names the case."""
    case = draw(seed, layouts, most)
    try:
        _RUN[case.op](case, torch.Generator().manual_seed(seed))
    except Exception as error:
        raise AssertionError(f"GEMQ_CASE_SEED={seed} fails: {case}: {error}") from error


def _precision(case: Case) -> torch.dtype:
    return torch.float16 if case.layout == "gpu_tile" and case.dtype == torch.float32 else case.dtype


def _finish(case: Case, guarded: Guarded, out: Tensor, expected: Tensor) -> None:
    assert out.dtype == case.dtype
    _close(out, expected, _precision(case))
    guarded.check()


def _close(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    if expected.numel() >= FEW:
        assert_close(out, expected, dtype=dtype)
        return
    assert out.shape == expected.shape and bool(out.isfinite().all())
    error, size = float((out.double() - expected).norm()), float(expected.norm())
    assert error <= LOOSE[dtype] * size, f"relative error {error / max(size, 1e-300):.2e} of few elements"


def _products(case: Case, generator: torch.Generator) -> None:
    keep = Guarded()
    stack = random_stack(case.bits, case.n, case.k, case.group_size, case.layout, case.seed)
    ids, weights = routed(case, generator)
    shape = (case.tokens, case.top_k, case.k) if case.op == "slots" else (case.tokens, case.k)
    x = torch.randn(shape, generator=generator).to(case.dtype)
    weights = weights if case.op == "weighted" or (case.op == "slots" and case.seed % 2) else None
    options = {"n": case.n, "group_size": case.group_size, "layout": case.layout}
    given = [keep(x), *(keep(t) for t in stack), keep(ids), None if weights is None else keep(weights)]
    out = ops.moe_lowbit_gemm(*given, **options)
    _finish(case, keep, out, reference.moe_lowbit_gemm(x, *stack, ids, weights, **options, compute_dtype=torch.float64))


def _block(case: Case, generator: torch.Generator):
    hidden, inner = case.k, case.n
    down_group = fmt.default_group_size(inner, case.group_size)
    gate_up = random_stack(case.bits, 2 * inner, hidden, case.group_size, case.layout, case.seed)
    down = random_stack(case.down_bits, hidden, inner, down_group, case.layout, case.seed + 1)
    options = {"intermediate": inner, "group_size": case.group_size, "down_group_size": down_group}
    return gate_up, down, options | {"layout": case.layout}


def _ffn(case: Case, generator: torch.Generator) -> None:
    keep = Guarded()
    gate_up, down, options = _block(case, generator)
    ids, weights = routed(case, generator)
    x = torch.randn(case.tokens, case.k, generator=generator).to(case.dtype)
    guarded = tuple(keep(t) for t in gate_up), tuple(keep(t) for t in down)
    out = ops.moe_lowbit_ffn(keep(x), *guarded, keep(ids), keep(weights), **options)
    _finish(case, keep, out, reference.moe_lowbit_ffn(
        x, gate_up, down, ids, weights, **options, compute_dtype=torch.float64
    ))


def _dense(case: Case, generator: torch.Generator) -> None:
    keep, bits = Guarded(), max(1, case.bits[0])
    qweight, meta, *_ = random_stack((bits,), case.n, case.k, case.group_size, case.layout, case.seed)
    x = torch.randn(case.tokens, case.k, generator=generator).to(case.dtype)
    options = {"bits": bits, "n": case.n, "group_size": case.group_size, "layout": case.layout}
    out = ops.lowbit_gemm(keep(x), keep(qweight), keep(meta), **options)
    _finish(case, keep, out, reference.lowbit_gemm(x, qweight, meta, **options, compute_dtype=torch.float64))


def _codes(case: Case, generator: torch.Generator, bits: int, columns: int) -> Tensor:
    return torch.randint(0, 1 << bits, (case.n, columns), generator=generator).to(torch.uint8)


def _pack(case: Case, generator: torch.Generator) -> None:
    keep, bits, columns = Guarded(), max(1, case.bits[0]), case.k + case.seed % 9
    codes = _codes(case, generator, bits, columns)
    packed = ops.pack(keep(codes), bits)
    assert torch.equal(packed, reference.pack(codes, bits))
    assert torch.equal(ops.unpack(keep(packed), bits, columns), codes)
    into = keep(torch.full_like(packed, 0xFF), output=True)
    source = keep(codes)
    core().pack(device=0, src=source.data_ptr(), dst=into.data_ptr(), rows=case.n, k=columns, bits=bits)
    assert torch.equal(into, packed)
    keep.check()


def _pairs(case: Case, generator: torch.Generator) -> Tensor:
    return torch.randn(case.n, case.k // case.group_size, 2, generator=generator).to(torch.float16)


def _dequantize(case: Case, generator: torch.Generator) -> None:
    keep, bits = Guarded(), max(1, case.bits[0])
    codes, meta = _codes(case, generator, bits, case.k), _pairs(case, generator)
    s, m = meta.double().repeat_interleave(case.group_size, 1).unbind(-1)
    expected = (codes.double() * s + m).float().to(case.dtype)
    packed = keep(reference.pack(codes, bits))
    assert torch.equal(ops.dequantize(packed, keep(meta), bits, case.k, case.group_size, case.dtype), expected)
    keep.check()


def _repack(case: Case, generator: torch.Generator) -> None:
    keep, bits = Guarded(), max(1, case.bits[0])
    codes, meta = reference.pack(_codes(case, generator, bits, case.k), bits).flatten(), _pairs(case, generator)
    shape = (bits, case.n, case.k, case.group_size)
    for target in ("cpu_tile", "gpu_tile"):
        tiled = ops.repack(keep(codes), keep(meta.flatten()), *shape, target=target)
        wanted = reference.to_layout(codes.view(case.n, -1), meta, bits, case.k, case.group_size, target)
        assert torch.equal(tiled[0], wanted[0]) and torch.equal(tiled[1], wanted[1])
        back = ops.repack(keep(tiled[0]), keep(tiled[1]), *shape, source=target, target="canonical")
        assert torch.equal(back[0], codes) and torch.equal(back[1], meta.flatten())
    keep.check()


def _raw_gemm(case: Case, generator: torch.Generator) -> None:
    """The compiled kernel into a buffer of ours."""
    keep = Guarded()
    stack = random_stack(case.bits, case.n, case.k, case.group_size, "cpu_tile", case.seed)
    ids, weights = routed(case, generator)
    ids, scaled = ids.long(), bool(case.seed % 2)
    x = torch.randn(case.tokens, case.k, generator=generator).to(case.dtype)
    shape = (case.tokens, case.n) if scaled else (case.tokens, case.top_k, case.n)
    out = keep(torch.full(shape, float("nan"), dtype=case.dtype), output=True)
    given, kept = [keep(x), keep(ids), keep(weights)], tuple(keep(t) for t in stack)
    core().moe_gemm_cpu(
        x=given[0].data_ptr(), x_per_slot=False, stack=address(kept), num_experts=len(case.bits),
        topk_ids=given[1].data_ptr(), topk_weights=given[2].data_ptr() if scaled else 0, out=out.data_ptr(),
        tokens=case.tokens, top_k=case.top_k, k=case.k, n=case.n, group_size=case.group_size,
        **precision_of(x, "exact"), threads=1 + case.seed % 3,
    )
    expected = reference.moe_lowbit_gemm(
        x, *stack, ids, weights if scaled else None, n=case.n, group_size=case.group_size, layout="cpu_tile",
        compute_dtype=torch.float64,
    )
    _finish(case, keep, out, expected)


def _raw_ffn(case: Case, generator: torch.Generator) -> None:
    """The compiled block into a buffer of ours."""
    keep = Guarded()
    gate_up, down, options = _block(case, generator)
    ids, weights = routed(case, generator)
    ids = ids.long()
    x = torch.randn(case.tokens, case.k, generator=generator).to(case.dtype)
    out = keep(torch.full_like(x, float("nan")), output=True)
    given = [keep(x), keep(ids), keep(weights)]
    stacks = [tuple(keep(t) for t in stack) for stack in (gate_up, down)]
    core().moe_ffn_cpu(
        x=given[0].data_ptr(), gate_up=address(stacks[0]), down=address(stacks[1]), num_experts=len(case.bits),
        topk_ids=given[1].data_ptr(), topk_weights=given[2].data_ptr(), out=out.data_ptr(), tokens=case.tokens,
        top_k=case.top_k, hidden=case.k, intermediate=case.n, group_size=case.group_size,
        down_group_size=options["down_group_size"], **precision_of(x, "exact"), threads=1 + case.seed % 3,
    )
    _finish(case, keep, out, reference.moe_lowbit_ffn(
        x, gate_up, down, ids, weights, **options, compute_dtype=torch.float64
    ))


_RUN = {
    "gemm": _products, "slots": _products, "weighted": _products, "ffn": _ffn, "dense": _dense, "pack": _pack,
    "dequantize": _dequantize, "repack": _repack, "raw_gemm": _raw_gemm, "raw_ffn": _raw_ffn,
}
