"""Operations of the compiled decode step that some families have: windows, gates and sinks, norms onto, activations,
biases of experts, linear attention and Mamba. Against float64, on memory that belongs to the test."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cpu_kernels import DTYPES, assert_near
from test_decode_program import NAN, normal, packed, poisoned, rotated, run
from torch import Tensor

from gemq import ops, reference
from gemq.activation import Activation, Between
from gemq.ops.decode import Attention, DecodeProgram, DeltaNet, Mamba, Matrix, Part, Routing


@pytest.mark.parametrize("activation", [
    Activation("silu"), Activation("silu", limit=0.7), Activation("gelu_tanh"), Activation("swigluoai", 1.3, 0.9),
    Activation("relu2"),
], ids=lambda a: f"{a.name}-{a.limit}")
@pytest.mark.parametrize("width", [5, 16, 130, 1500])
def test_activations(isa, activation, width):
    gate, up, out = normal(4, width, scale=3), normal(4, width, seed=1), poisoned(4, width)
    program = DecodeProgram(4)
    first = program.buffer(width, gate)
    program.activate(
        first, program.buffer(width, up) if activation.gated else first, program.buffer(width, out), activation
    )
    run(program)
    assert_near(out.double(), activation(torch.cat((gate, up), -1).double() if activation.gated else gate.double()))


@pytest.mark.parametrize("onto", [False, True])
@pytest.mark.parametrize("width", [7, 64, 200])
def test_norms_are_set_or_added_and_scaled(isa, onto, width):
    x, weight, before = normal(3, width), normal(width, seed=1), normal(3, width, seed=2)
    out = before.clone() if onto else poisoned(3, width)
    program = DecodeProgram(3)
    options = {"onto": True, "scale": 0.7} if onto else {}
    program.norm(program.buffer(width, x), weight, 1e-5, program.buffer(width, out), **options)
    run(program)
    wide = weight.double() * x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_near(out.double(), (before.double() + wide) * 0.7 if onto else wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_embeddings(isa, dtype):
    table, out = normal(9, 40).to(dtype), poisoned(2, 40)
    program = DecodeProgram(2)
    program.embed(table, program.buffer(40, out), 6.5)
    zeros = torch.zeros(2, dtype=torch.int64)
    program.run(torch.tensor([8, 3]), zeros, zeros, 0)
    assert_near(out.double(), 6.5 * table[[8, 3]].double())


@pytest.mark.parametrize("heads, groups, dim, rotary", [(4, 2, 32, 32), (6, 1, 20, 0), (8, 2, 64, 16)])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("slots", [16, 300])
def test_attention_in_a_window(isa, heads, groups, dim, rotary, gated, sinks, slots):
    """Rows at positions before, at and long behind the window's end; a row's newest token replaces its oldest."""
    positions = torch.tensor([0, 3, slots - 1, slots, 5 * slots + 2])
    batch = len(positions)
    keys, values = (normal(batch, groups, slots, dim, seed=s) for s in (1, 2))
    for row, at in enumerate(positions.tolist()):
        keys[row, :, at:] = values[row, :, at:] = NAN
    width = 2 * dim if gated else dim
    query, key, value = normal(batch, heads * width, seed=3), normal(batch, groups * dim, seed=4), normal(
        batch, groups * dim, seed=5)
    angle = normal(6 * slots, rotary // 2, seed=6)
    tables = (torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1))
    sink = normal(heads, seed=9, scale=2)
    out = poisoned(batch, heads * dim)
    program = DecodeProgram(batch)
    numbers = [program.buffer(t.shape[1], t) for t in (query, key, value, out)]
    cached = keys.clone(), values.clone()
    program.attend(Attention(
        *numbers, heads, *cached, *(tables if rotary else (None, None)), 0.4, eps=1e-6, value_norm=torch.ones(dim),
        gated=gated, sinks=sink if sinks else None, window=True,
    ))
    zeros = torch.zeros(batch, dtype=torch.int64)
    program.run(zeros, positions, zeros, 0)
    cosines, sines = (t[positions].double()[:, None] for t in tables)
    new = rotated(key.double().view(batch, groups, dim), cosines, sines) if rotary else key.double().view(
        batch, groups, dim)
    new_value = value.double().view(batch, groups, dim)
    new_value = new_value / (new_value.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    queries = query.double().view(batch, heads, width)
    gates, queries = queries[..., dim:], queries[..., :dim]
    queries = rotated(queries, cosines, sines) if rotary else queries
    for row, at in enumerate(positions.tolist()):
        k, v = keys[row].double(), values[row].double()
        k[:, at % slots], v[:, at % slots] = new[row], new_value[row]
        k, v = (t[:, : min(at + 1, slots)].repeat_interleave(heads // groups, 0) for t in (k, v))
        scores = 0.4 * torch.einsum("hd,hld->hl", queries[row], k)
        if sinks:
            weights = torch.cat((scores, sink.double()[:, None]), -1).softmax(-1)[:, :-1]
        else:
            weights = scores.softmax(-1)
        expected = torch.einsum("hl,hld->hd", weights, v)
        assert_near(out[row].double(), (expected * gates[row].sigmoid() if gated else expected).flatten())
        assert_near(cached[0][row, :, at % slots].double(), new[row])


def packed_experts(widths: list[int], n: int, k: int, group: int, generator: torch.Generator):
    codes = [torch.randint(0, 2**b, (n, k), dtype=torch.uint8, generator=generator) if b else None for b in widths]
    meta = [(torch.rand(n, k // group, 2, generator=generator) / 2**b - 0.3).half() if b else None for b in widths]
    return ops.pack_stack(codes, meta, widths, group, "cpu_tile")


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "swigluoai", "relu2"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_experts_by_activation(isa, activation, biased):
    """The outputs replace what the buffer held, and a packed product reads them at once."""
    how, hidden, inner, widths, batch = Activation(activation), 160, 96, [2, 0, 3, 8], 5
    generator = torch.Generator().manual_seed(3)
    rows = how.rows(inner)
    gate_up = packed_experts(widths, rows, hidden, 32, generator)
    down = packed_experts(widths, hidden, inner, 32, generator)
    between = Between(how, normal(4, rows, seed=4), normal(4, hidden, seed=5)) if biased else Between(how)
    scale = torch.tensor([0.5, 2.0, -1.0, 3.0])
    x, logits, out = normal(batch, hidden, seed=1), normal(batch, 4, seed=2), poisoned(batch, hidden)
    program = DecodeProgram(batch)
    normed = program.buffer(hidden)
    program.norm(program.buffer(hidden, x), torch.ones(hidden), 0.0, normed)
    rule = Routing(2, expert_scale=scale)
    program.experts(
        program.buffer(4, logits), normed, program.buffer(hidden, out), rule, gate_up, down, between, onto=False
    )
    run(program)
    weights, ids = logits.double().softmax(-1).topk(2, -1)
    weights = weights / weights.sum(-1, keepdim=True) * scale.double()[ids]
    wide = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    expected = reference.moe_lowbit_ffn(
        wide, gate_up.tensors, down.tensors, ids, weights, intermediate=inner, group_size=32, down_group_size=32,
        layout="cpu_tile", compute_dtype=torch.float64, activation=how, gate_up_bias=between.gate_up_bias,
        down_bias=between.down_bias,
    )
    assert_near(out.double(), expected)


def convolved(past: Tensor, new: Tensor, weights: Tensor, bias: Tensor | None) -> Tensor:
    """SiLU of the convolution at the newest of ``past`` and ``new``, in float64."""
    both = torch.cat((past.double(), new.double()[:, None]), 1)
    out = (both * weights.double()).sum(1)
    return F.silu(out if bias is None else out + bias.double())


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "fused"])
@pytest.mark.parametrize("key_heads, value_heads, key_dim, value_dim, taps", [
    (2, 4, 16, 16, 4), (1, 3, 20, 37, 2), (4, 4, 128, 128, 4), (2, 6, 64, 100, 3),
])
def test_gated_delta_rule(isa, apart, key_heads, value_heads, key_dim, value_dim, taps):
    batch, shared = 3, value_heads // key_heads
    keys, values = key_heads * key_dim, value_heads * value_dim
    channels = 2 * keys + values
    weights, past = normal(taps, channels, seed=1), normal(batch, taps - 1, channels, seed=2)
    state = normal(batch, value_heads, key_dim, value_dim, seed=3)
    rate, offset, norm = -normal(value_heads, seed=4).exp(), normal(value_heads, seed=5), normal(value_dim, seed=6)
    query, key, value = (normal(batch, n, seed=7 + i) for i, n in enumerate((keys, keys, values)))
    gate, beta, decay = normal(batch, values, seed=10), normal(batch, value_heads, seed=11), normal(
        batch, value_heads, seed=12, scale=12)
    out = poisoned(batch, values)
    program = DecodeProgram(batch)
    run_of = shared * value_dim
    if apart:
        mixed, z, b, a = (
            program.buffer(t.shape[1], t) for t in (torch.cat((query, key, value), 1).contiguous(), gate, beta, decay)
        )
        parts = [Part(mixed, 0, key_dim), Part(mixed, keys, key_dim), Part(mixed, 2 * keys, run_of),
                 Part(z, 0, run_of), Part(b, 0, shared), Part(a, 0, shared)]
    else:
        by_head = [t.view(batch, key_heads, -1) for t in (query, key, value, gate)]
        fused = torch.cat(by_head, -1).flatten(1).contiguous()
        numbers = torch.cat([t.view(batch, key_heads, -1) for t in (beta, decay)], -1).flatten(1).contiguous()
        mixed, b = program.buffer(fused.shape[1], fused), program.buffer(numbers.shape[1], numbers)
        stride = 2 * key_dim + 2 * run_of
        parts = [Part(mixed, 0, stride), Part(mixed, key_dim, stride), Part(mixed, 2 * key_dim, stride),
                 Part(mixed, 2 * key_dim + run_of, stride), Part(b, 0, 2 * shared), Part(b, shared, 2 * shared)]
    moved = past.clone(), state.clone()
    program.delta_net(DeltaNet(
        *parts, program.buffer(values, out), key_heads, weights, rate, offset, norm, 1e-5, *moved
    ))
    run(program)
    q, k, v = convolved(past, torch.cat((query, key, value), 1), weights, None).split([keys, keys, values], 1)
    q, k = (t.view(batch, key_heads, key_dim) for t in (q, k))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    q, k = ((t * f).repeat_interleave(shared, 1) for t, f in ((q, key_dim**-0.5), (k, 1.0)))
    v = v.view(batch, value_heads, value_dim)
    wide = state.double() * (rate.double() * F.softplus(decay.double() + offset.double())).exp()[..., None, None]
    change = (v - torch.einsum("bhk,bhkv->bhv", k, wide)) * beta.double().sigmoid()[..., None]
    wide = wide + k[..., None] * change[:, :, None]
    read = torch.einsum("bhk,bhkv->bhv", q, wide)
    read = norm.double() * read / (read.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert_near(out.double(), read.flatten(1) * F.silu(gate.double()))
    assert_near(moved[1].double(), wide)
    assert_near(moved[0].double(), torch.cat((past, torch.cat((query, key, value), 1)[:, None]), 1)[:, 1:].double())


@pytest.mark.parametrize("heads, dim, groups, states, taps", [(4, 32, 1, 16, 4), (6, 20, 3, 37, 2), (8, 64, 8, 128, 4)])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_mamba(isa, heads, dim, groups, states, taps, biased):
    batch, inner = 3, heads * dim
    channels = inner + 2 * groups * states
    weights, bias = normal(taps, channels, seed=1), normal(channels, seed=2) if biased else None
    past, state = normal(batch, taps - 1, channels, seed=3), normal(batch, heads, dim, states, seed=4)
    rate, offset, skip = -normal(heads, seed=5).exp(), normal(heads, seed=6), normal(heads, seed=7)
    norm, projected = normal(inner, seed=8), normal(batch, inner + channels + heads, seed=9, scale=3)
    out = poisoned(batch, inner)
    program = DecodeProgram(batch)
    moved = past.clone(), state.clone()
    program.mamba(Mamba(
        program.buffer(projected.shape[1], projected), program.buffer(inner, out), groups, weights, bias, rate, offset,
        skip, norm, 1e-5, *moved,
    ))
    run(program)
    gate, new, step = projected.split([inner, channels, heads], 1)
    x, into, read = convolved(past, new, weights, bias).split([inner, groups * states, groups * states], 1)
    x = x.view(batch, heads, dim)
    into, read = (t.view(batch, groups, states).repeat_interleave(heads // groups, 1) for t in (into, read))
    step = F.softplus(step.double() + offset.double())
    wide = state.double() * (rate.double() * step).exp()[..., None, None]
    wide = wide + (step[..., None] * x)[..., None] * into[:, :, None]
    found = torch.einsum("bhds,bhs->bhd", wide, read) + skip.double()[:, None] * x
    found = (found.flatten(1) * F.silu(gate.double())).view(batch, groups, -1)
    found = (found / (found.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(1) * norm.double()
    assert_near(out.double(), found)
    assert_near(moved[1].double(), wide)


def delta_net(**changes) -> DeltaNet:
    """Two key heads of 16, four value heads of 16, in buffers that :func:`test_bad_recurrent_operations` makes."""
    parts = {"query": Part(0, 0, 16), "key": Part(0, 32, 16), "value": Part(0, 64, 32), "gate": Part(1, 0, 32),
             "beta": Part(2, 0, 2), "decay": Part(2, 0, 2)}
    given = parts | {
        "out": 3, "key_heads": 2, "weights": torch.zeros(4, 128), "rate": torch.zeros(4), "offset": torch.zeros(4),
        "norm": torch.zeros(16), "eps": 1e-5, "past": torch.zeros(1, 3, 128), "state": torch.zeros(1, 4, 16, 16),
    }
    return DeltaNet(**given | changes)


@pytest.mark.parametrize("changes, message", [
    ({"weights": torch.zeros(4, 127)}, "weights must be of 128 channels, got 127"),
    ({"past": torch.zeros(1, 2, 128)}, r"past must have shape \[1, 3, 128\]"),
    ({"state": torch.zeros(1, 4, 16, 16).half()}, "state must be"),
    ({"value": Part(0, 65, 32)}, "value: its end"), ({"gate": Part(1, 0, 31)}, "gate.stride must be at least 32"),
    ({"beta": Part(9, 0, 2)}, "beta must be in 0..3"), ({"rate": torch.zeros(3)}, r"rate must have shape \[4\]"),
])
def test_bad_recurrent_operations(changes, message):
    program = DecodeProgram(1)
    for width in (128, 64, 4, 64):
        program.buffer(width)
    program.delta_net(delta_net())
    with pytest.raises((ValueError, TypeError), match=message):
        program.delta_net(delta_net(**changes))


@pytest.mark.parametrize("setting", ["int16", "int8"])
@pytest.mark.parametrize("k", [96, 160, 352])
def test_a_row_does_not_depend_on_its_batch(isa, setting, k):
    """Unquantized, packed and expert products of a row alone, and as one of 2 to 9 rows, are the same bits, where
    activations are rounded to integers."""
    if ops.cpu_isa() == "portable":
        pytest.skip("its products are in float32, which share what they decode among rows in other orders")
    ops.set_cpu_activations(setting)
    generator = torch.Generator().manual_seed(k)
    widths, inner, n = [2, 0, 3, 8], 96, 70
    gate_up = packed_experts(widths, 2 * inner, k, 32, generator)
    down = packed_experts(widths, k, inner, 32, generator)
    weights = [normal(n, k, seed=i).to(dtype) for i, dtype in enumerate(DTYPES)]
    flat, _ = packed(n, k, 3, 32, seed=5)
    x, logits = normal(9, k, seed=1), normal(9, 4, seed=2)

    def outputs(rows: slice) -> Tensor:
        batch = len(x[rows])
        program = DecodeProgram(batch)
        y, outs = program.buffer(k), [torch.zeros(batch, n) for _ in range(len(DTYPES) + 1)]
        routed = torch.zeros(batch, k)
        program.norm(program.buffer(k, x[rows].contiguous()), torch.ones(k), 1e-6, y)
        program.linear(y, k, [
            *(Matrix(program.buffer(n, out), n, weight) for out, weight in zip(outs, weights, strict=False)),
            Matrix(program.buffer(n, outs[-1]), n, flat, 3, 32),
        ])
        program.experts(
            program.buffer(4, logits[rows].contiguous()), y, program.buffer(k, routed), Routing(2), gate_up, down
        )
        run(program)
        return torch.cat((*outs, routed), 1)

    alone = torch.cat([outputs(slice(row, row + 1)) for row in range(9)])
    for batch in range(2, 10):
        assert torch.equal(outputs(slice(0, batch)), alone[:batch])
