"""Without gradients packed modules call their CPU kernels directly: the same results, errors and profile."""

from __future__ import annotations

import pytest
import torch
from test_nn import BITS, HIDDEN, make
from torch._subclasses import FakeTensorMode
from torch.profiler import profile

from gemq.nn import base, experts, linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
kinds = pytest.mark.parametrize("kind", ["linear", "experts"])


def arguments(kind, dtype=torch.float32, tokens=5):
    generator = torch.Generator().manual_seed(1)
    if kind == "linear":
        return (torch.randn(2, tokens, 128, generator=generator).to(dtype),)
    ids = torch.randint(-1, len(BITS) + 1, (tokens, 2), generator=generator)
    return torch.randn(tokens, HIDDEN, generator=generator).to(dtype), ids, torch.rand(tokens, 2, generator=generator)


def prepared(kind):
    module = make(kind).requires_grad_(False)
    module.prepare("cpu_tile")
    return module


@pytest.fixture
def direct(monkeypatch):
    """The number of calls that went round the dispatcher."""
    calls = []
    for module in (linear.LowBitLinear, experts.LowBitExperts):
        plain = module._direct

        def spy(self, *arguments, plain=plain):
            out = plain(self, *arguments)
            calls.append(out is not None)
            return out

        monkeypatch.setattr(module, "_direct", spy)
    return calls


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_the_same_bits(kind, dtype, tokens, direct):
    module, given = prepared(kind), arguments(kind, dtype, tokens)
    expected = module(given[0].clone().requires_grad_(), *given[1:]).detach()
    assert not direct
    with torch.no_grad():
        found = module(*given)
    assert torch.equal(found, expected) and found.dtype == dtype and found.shape == expected.shape
    assert sum(direct) == (kind == "linear" or tokens > 0)
    strided = given[0].transpose(0, 1).contiguous().transpose(0, 1)
    with torch.no_grad():
        assert torch.equal(module(strided, *given[1:]), expected)


@kinds
def test_what_watches_takes_the_op(kind, direct):
    module, given = prepared(kind), arguments(kind)
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = module(*(mode.from_tensor(t) for t in given))
    assert type(fake).__name__ == "FakeTensor" and not direct
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(*given)
    assert not direct
    assert torch.equal(compiled, module(given[0].clone().requires_grad_(), *given[1:]))
    canonical = make(kind).requires_grad_(False)
    canonical.prepare("canonical")
    with torch.no_grad():
        canonical(*given)
    assert not direct


@kinds
def test_it_shows_in_a_profile(kind):
    module, given = prepared(kind), arguments(kind)
    with torch.no_grad(), profile() as profiler:
        module(*given)
    name = {"linear": "gemq::lowbit_gemm", "experts": "gemq::moe_lowbit_ffn"}[kind]
    assert [e.count for e in profiler.key_averages() if e.key == name] == [1]
    assert base.profiled("x") is base._NO_RECORD


@pytest.mark.parametrize("kind, change, error, message", [
    ("linear", lambda x: (x[..., :64],), ValueError, r"x must have 128 columns, got shape \[2, 5, 64\]"),
    ("linear", lambda x: (x.double(),), TypeError, "x must be float32 or float16 or bfloat16, got float64"),
    ("experts", lambda x, i, w: (x.double(), i, w), TypeError, "x must be float32"),
    ("experts", lambda x, i, w: (x[:, :32], i, w), ValueError, "x|k=|hidden"),
    ("experts", lambda x, i, w: (x, i.float(), w), TypeError, "topk_ids must be int32 or int64"),
    ("experts", lambda x, i, w: (x, i[:3], w), ValueError, "x has 5 tokens, topk_ids 3"),
    ("experts", lambda x, i, w: (x, i, w[:, :1]), ValueError, r"topk_weights \[5, 1\] must match topk_ids \[5, 2\]"),
])  # fmt: skip
def test_the_same_errors(kind, change, error, message):
    module, given = prepared(kind), change(*arguments(kind))
    texts = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(error, match=message) as raised:
            module(*given)
        texts.append(str(raised.value))
    assert texts[0] == texts[1]
