"""Operations of the compiled decode step against float64, on memory that belongs to the test."""

from __future__ import annotations

import pytest
import torch
from cpu_kernels import DTYPES, assert_near
from torch import Tensor

from gemq import ops, reference
from gemq.format import codes_bytes
from gemq.ops.decode import Attention, DecodeProgram, Matrix, Routing

NAN = float("nan")


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, NAN)


def run(program: DecodeProgram, slot: int = 0, positions: Tensor | None = None, starts: Tensor | None = None) -> None:
    zeros = torch.zeros(program.batch, dtype=torch.int64)
    program.run(zeros, zeros if positions is None else positions, zeros if starts is None else starts, slot)


def packed(n: int, k: int, bits: int, group: int, seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """One matrix in ``cpu_tile`` and its weights in float64."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=generator)
    meta = torch.rand(n, k // group, 2, generator=generator).half()
    flat = ops.pack_experts([codes], [meta], [bits], n, k, group, "cpu_tile")
    weight = codes.double() * meta[..., 0].double().repeat_interleave(group, 1)
    return flat, weight + meta[..., 1].double().repeat_interleave(group, 1)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("n, k", [(1, 7), (37, 64), (130, 96), (48, 333)], ids=lambda v: str(v))
def test_unquantized_products(isa, batch, n, k):
    x = normal(batch, k)
    program = DecodeProgram(batch)
    source = program.buffer(k, x)
    weights = [normal(n, k, seed=1 + i).to(dtype) for i, dtype in enumerate(DTYPES)]
    biases = [None, normal(n, seed=9), normal(n, seed=10).bfloat16()]
    outs = [poisoned(batch, n) for _ in DTYPES]
    program.linear(source, k, [
        Matrix(program.buffer(n, out), n, weight, bias=bias)
        for out, weight, bias in zip(outs, weights, biases, strict=True)
    ])
    run(program)
    for out, weight, bias in zip(outs, weights, biases, strict=True):
        expected = x.double() @ weight.double().T
        assert_near(out.double(), expected if bias is None else expected + bias.double())


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_and_unquantized_matrices_share_an_input(isa, batch, bits):
    k, sizes = 256, (40, 272)
    weight = normal(24, k, seed=2).bfloat16()
    norm = normal(k, seed=3)
    program = DecodeProgram(batch)
    x = normal(batch, k, seed=4)
    y = program.buffer(k)
    matrices = [packed(n, k, bits, group, seed=n) for n, group in zip(sizes, (128, 64), strict=True)]
    outs = [poisoned(batch, n) for n in (*sizes, 24)]
    program.norm(program.buffer(k, x), norm, 1e-5, y)
    program.linear(y, k, [
        *(Matrix(program.buffer(n, out), n, flat, bits, group)
          for n, group, out, (flat, _) in zip(sizes, (128, 64), outs, matrices, strict=False)),
        Matrix(program.buffer(24, outs[2]), 24, weight),
    ])
    run(program)
    wide = x.double()
    normed = norm.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    for out, dense in zip(outs, (*(w for _, w in matrices), weight.double()), strict=True):
        assert_near(out.double(), normed @ dense.T)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_results_are_added_behind_a_gate(isa, gated):
    batch, n, k = 3, 50, 64
    x, before, gate = normal(batch, k), normal(batch, n, seed=1), normal(batch, 1, seed=2)
    (flat, dense), out = packed(n, k, 3, 64, 5), before.clone()
    program = DecodeProgram(batch)
    copied = program.buffer(k)
    ones = torch.ones(k)
    program.norm(program.buffer(k, x), ones, 0.0, copied)
    number = program.buffer(1, gate) if gated else -1
    program.linear(copied, k, [Matrix(program.buffer(n, out), n, flat, 3, 64)], onto=True, gate=number)
    run(program)
    wide = x.double() / x.double().pow(2).mean(-1, keepdim=True).sqrt()
    factor = gate.double().sigmoid() if gated else 1.0
    assert_near(out.double(), before.double() + factor * (wide @ dense.T))


def rotated(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """``[..., dim]`` with its first numbers turned by halves."""
    size = cosines.shape[-1]
    turn = x[..., :size]
    return torch.cat((turn * cosines + turn.roll(size // 2, -1) * sines, x[..., size:]), -1)


@pytest.mark.parametrize("heads, groups, dim, rotary", [(4, 2, 32, 32), (6, 1, 20, 8), (5, 5, 16, 16), (8, 2, 128, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("slot", [0, 40, 255, 256, 700])
def test_attention_over_a_cache(isa, heads, groups, dim, rotary, dtype, slot):
    """Padding up to one whole span of the cache, norms of heads, spans that are merged."""
    batch, slots = 3, 704
    starts = torch.tensor([0, min(slot, 300), slot])
    positions = slot - starts
    keys, values = (normal(batch, groups, slots, dim, seed=s).to(dtype) for s in (1, 2))
    keys[:, :, slot + 1 :] = values[:, :, slot + 1 :] = NAN
    for row in range(batch):
        keys[row, :, : starts[row]] = NAN
    query, key, value = normal(batch, heads * dim, seed=3), normal(batch, groups * dim, seed=4), normal(
        batch, groups * dim, seed=5)
    angle = normal(slots, rotary // 2, seed=6)
    cosines = torch.cat((angle.cos(), angle.cos()), -1)
    sines = torch.cat((-angle.sin(), angle.sin()), -1)
    norms = normal(dim, seed=7), normal(dim, seed=8)
    out = poisoned(batch, heads * dim)
    program = DecodeProgram(batch)
    numbers = [program.buffer(t.shape[1], t) for t in (query, key, value, out)]
    cached = keys.clone(), values.clone()
    program.attend(Attention(*numbers, heads, *cached, cosines, sines, 0.3, *norms, 1e-6))
    run(program, slot, positions, starts)

    def turned(x, count, norm):
        x = x.double().view(batch, count, dim)
        x = norm.double() * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
        return rotated(x, *(t[positions].double()[:, None] for t in (cosines, sines)))

    for held, before, new in (
        (cached[0], keys, turned(key, groups, norms[1])), (cached[1], values, value.double().view(batch, groups, dim)),
    ):
        written = held[:, :, slot].double()
        assert (written - new).norm() <= {torch.float32: 1e-6, torch.float16: 1e-3}.get(dtype, 8e-3) * new.norm()
        untouched = [s for s in range(slots) if s != slot]
        assert torch.equal(held[:, :, untouched].view(torch.uint8), before[:, :, untouched].view(torch.uint8))
    queries = turned(query, heads, norms[0])
    expected = torch.zeros(batch, heads, dim, dtype=torch.float64)
    for row in range(batch):
        seen = slice(int(starts[row]), slot + 1)
        k, v = (t[row, :, seen].double().repeat_interleave(heads // groups, 0) for t in cached)
        weights = (0.3 * torch.einsum("hd,hld->hl", queries[row], k)).softmax(-1)
        expected[row] = torch.einsum("hl,hld->hd", weights, v)
    found = out.double().view(batch, heads, dim)
    assert found.isfinite().all()
    assert (found - expected).norm() <= 2e-6 * expected.norm()


def grouped_choice(logits: Tensor, rule: Routing) -> tuple[Tensor, Tensor]:
    """Routing with groups, as DeepSeek-V3's and GLM4's modules have it, in float64."""
    scores = logits.double().sigmoid() if rule.scoring == "sigmoid" else logits.double().softmax(-1)
    choice = scores if rule.bias is None else scores + rule.bias.double()
    if rule.group_score is not None:
        runs = choice.view(len(logits), rule.groups, -1)
        best = runs.topk(2 if rule.group_score == "two_largest" else 1, -1).values.sum(-1)
        kept = best.topk(rule.kept_groups, -1).indices
        mask = torch.zeros_like(best).scatter(1, kept, 1.0)[..., None].expand_as(runs).reshape_as(choice)
        choice = choice.masked_fill(mask == 0, -torch.inf)
    ids = choice.topk(rule.top_k, -1).indices
    weights = scores.gather(1, ids)
    if rule.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + rule.epsilon)
    return weights * rule.scale, ids


RULES = {
    "mixtral": Routing(2),
    "plain": Routing(3, normalize=False, scale=2.5),
    "all": Routing(8),
    "sigmoid": Routing(2, "sigmoid", epsilon=1e-20, scale=1.5, bias=normal(8, seed=20)),
    "largest": Routing(2, normalize=False, group_score="largest", groups=4, kept_groups=2),
    "two_largest": Routing(3, "sigmoid", True, 1e-20, 1.0, normal(8, seed=21), "two_largest", 2, 1),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("batch", [1, 6, 16])
def test_routing_and_experts(isa, rule, batch):
    """Every width with one expert of 0 bits, against the reference block; the sum is added to what is there."""
    rule, hidden, inner, widths = RULES[rule], 128, 96, [2, 0, 1, 3, 4, 8, 5, 7]
    generator = torch.Generator().manual_seed(batch)

    def stack(n, k, group):
        codes = [torch.randint(0, 2**b, (n, k), dtype=torch.uint8, generator=generator) if b else None for b in widths]
        meta = [(torch.rand(n, k // group, 2, generator=generator) / 2**b - 0.3).half() if b else None for b in widths]
        return ops.pack_stack(codes, meta, widths, group, "cpu_tile")

    gate_up, down = stack(2 * inner, hidden, 128), stack(hidden, inner, 32)
    x, logits, before = normal(batch, hidden, seed=1), normal(batch, 8, seed=2), normal(batch, hidden, seed=3)
    program = DecodeProgram(batch)
    normed, out = program.buffer(hidden), before.clone()
    program.norm(program.buffer(hidden, x), torch.ones(hidden), 0.0, normed)
    program.experts(program.buffer(8, logits), normed, program.buffer(hidden, out), rule, gate_up, down)
    run(program)
    weights, ids = grouped_choice(logits, rule)
    wide = x.double() / x.double().pow(2).mean(-1, keepdim=True).sqrt()
    expected = before.double() + reference.moe_lowbit_ffn(
        wide, gate_up.tensors, down.tensors, ids, weights, intermediate=inner, group_size=128, down_group_size=32,
        layout="cpu_tile", compute_dtype=torch.float64,
    )
    assert_near(out.double(), expected)
    # again: nothing of the first step is left over
    again = out.clone()
    run(program)
    assert_near(out.double() - again.double(), expected - before.double())


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_change_nothing(threads):
    def result(count):
        batch, n, k = 5, 700, 256
        program = DecodeProgram(batch)
        x, out, y = normal(batch, k), poisoned(batch, n), program.buffer(k)
        program.norm(program.buffer(k, x), torch.ones(k), 1e-6, y)
        flat, _ = packed(n, k, 2, 128, 0)
        other = poisoned(batch, 90)
        program.linear(y, k, [Matrix(program.buffer(n, out), n, flat, 2, 128),
                              Matrix(program.buffer(90, other), 90, normal(90, k).bfloat16())])
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            run(program)
        finally:
            torch.set_num_threads(before)
        return torch.cat((out, other), 1)

    assert torch.equal(result(threads), result(1))


def test_operations_are_timed():
    program = DecodeProgram(1)
    x = program.buffer(64, normal(1, 64))
    program.norm(x, torch.ones(64), 1e-6, x)
    program.activate(x, x, x)
    run(program)
    assert program.seconds() == []
    program.measure()
    run(program)
    assert [name for name, _ in program.seconds()] == ["norm", "activate"]
    assert all(0 < seconds < 60 for _, seconds in program.seconds())
    program.measure(False)
    run(program)
    assert [seconds for _, seconds in program.seconds()] == [0.0, 0.0]


def program_with_cache(slots: int = 8) -> DecodeProgram:
    program = DecodeProgram(2)
    table = normal(10, 32)
    x = program.buffer(32)
    program.embed(table, x)
    cache = torch.zeros(2, 1, slots, 32)
    angles = torch.zeros(6, 32)
    program.attend(Attention(x, x, x, program.buffer(32), 1, cache, cache.clone(), angles, angles, 1.0))
    return program


@pytest.mark.parametrize("tokens, positions, starts, slot, message", [
    ([0, 10], [0, 0], [0, 0], 0, r"tokens\[1\] must be in 0..9, got 10"),
    ([-1, 0], [0, 0], [0, 0], 0, r"tokens\[0\] must be in 0..9, got -1"),
    ([0, 0], [6, 0], [0, 0], 0, r"positions\[0\] must be in 0..5, got 6"),
    ([0, 0], [0, 0], [0, 3], 2, r"starts\[1\] must be in 0..2, got 3"),
    ([0, 0], [0, 0], [0, 0], 8, r"slot must be in 0..7, got 8"),
    ([0, 0], [0, 0], [0], 0, r"starts must be int64 \[2\], got torch.int64 \[1\]"),
    ([0.0, 0], [0, 0], [0, 0], 0, r"tokens must be int64 \[2\], got torch.float32 \[2\]"),
])  # fmt: skip
def test_steps_out_of_range(tokens, positions, starts, slot, message):
    with pytest.raises(ValueError, match=message):
        program_with_cache().run(torch.tensor(tokens), torch.tensor(positions), torch.tensor(starts), slot)


def test_what_a_program_refuses():
    with pytest.raises(ValueError, match=r"batch must be in 1..16, got 17"):
        DecodeProgram(17)
    program = DecodeProgram(2)
    x = program.buffer(64)
    with pytest.raises(ValueError, match=r"tensor must have shape \[2, 64\], got \[64, 2\]"):
        program.buffer(64, torch.zeros(64, 2))
    with pytest.raises(TypeError, match="tensor must be float32, got float64"):
        program.buffer(64, torch.zeros(2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"out must be in 0..0, got 3"):
        program.norm(x, torch.ones(64), 1e-6, 3)
    with pytest.raises(ValueError, match=r"weight must have shape \[8, 64\], got \[8, 32\]"):
        program.linear(x, 64, [Matrix(program.buffer(8), 8, torch.zeros(8, 32))])
    with pytest.raises(ValueError, match="out: its width must be 9, got 64"):
        program.linear(x, 64, [Matrix(x, 9, torch.zeros(9, 64))])
    short = torch.zeros(codes_bytes(8, 64, 2, "cpu_tile") - 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="codes holds 255 elements, but 8 x 64 at 2 bits needs 256"):
        program.linear(x, 64, [Matrix(program.buffer(8), 8, (short, torch.zeros(64).half()), 2, 64)])
    with pytest.raises(ValueError, match="heads must be a multiple of groups=2, got 3"):
        cache, angles = torch.zeros(2, 2, 4, 16), torch.zeros(4, 16)
        program.attend(Attention(x, x, x, x, 3, cache, cache, angles, angles, 1.0))
    with pytest.raises(ValueError, match=r"keys must be \[2, groups, slots, dim\], got \[1, 2, 4, 16\]"):
        program.attend(Attention(x, x, x, x, 4, cache[:1], cache[:1], angles, angles, 1.0))
