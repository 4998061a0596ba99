"""Modes of torch around packed modules, and around the functions that a user calls: the same result, or a clear no."""

from __future__ import annotations

import contextlib

import pytest
import torch
from packed_models import quantized
from test_nn_direct import arguments, prepared
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import gemq
from gemq.algorithms.method import MethodConfig
from gemq.ambient import plain_torch

kinds = pytest.mark.parametrize("kind", ["linear", "experts"])
OPS = {"linear": "gemq.lowbit_gemm.default", "experts": "gemq.moe_lowbit_ffn.default"}


def others(kind):
    """Other arguments of the same shapes."""
    x, *rest = arguments(kind)
    rest = [t.flip(0) for t in rest]
    return (x.flip(0) * 1.5 + 0.25, *rest)


# modules


@kinds
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_traced_module_computes_on_other_inputs(kind, mode):
    module, given, new = prepared(kind), arguments(kind), others(kind)
    with mode():
        module(*given)
        traced = torch.jit.trace(module, given, check_trace=False)
        assert torch.equal(traced(*new), module(*new)) and torch.equal(traced(*given), module(*given))


def close(found, expected):
    """In exact arithmetic the order of sums depends on the tokens of a call."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@kinds
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad])
def test_a_module_is_mapped(kind, mode):
    module = prepared(kind)
    rows = [tuple(t.roll(at, 0) for t in arguments(kind)) for at in range(3)]
    stacked = tuple(torch.stack(column) for column in zip(*rows, strict=True))
    with mode():
        expected = torch.stack([module(*row) for row in rows])
        close(torch.func.vmap(module)(*stacked), expected)
        last = tuple(t.movedim(0, -1) for t in stacked)
        close(torch.func.vmap(module, in_dims=-1, out_dims=-1)(*last), expected.movedim(0, -1))
        twice = tuple(t[None].expand(2, *t.shape) for t in stacked)
        close(torch.func.vmap(torch.func.vmap(module))(*twice), torch.stack([expected] * 2))
        # what is not mapped is shared
        first = torch.func.vmap(module, in_dims=(0, *[None] * (len(stacked) - 1)))
        fixed = torch.stack([module(x, *rows[0][1:]) for x in stacked[0]])
        close(first(stacked[0], *rows[0][1:]), fixed)


def test_packed_buffers_are_not_mapped():
    module, (x,) = prepared("linear"), arguments("linear")
    options = {"bits": module.bits, "n": module.out_features, "group_size": module.group_size, "layout": "cpu_tile"}
    codes = torch.stack([module.weight_codes] * 2)
    with pytest.raises(NotImplementedError, match="vmap over the buffers of packed weights is not supported"):
        torch.func.vmap(lambda c: gemq.ops.lowbit_gemm(x, c, module.weight_meta, **options))(codes)


@kinds
def test_functional_gradients_are_refused_by_torch(kind):
    """torch's custom ops have autograd and no rule for transforms of it: an error, never a result without gradient."""
    module, (x, *rest) = prepared(kind), arguments(kind)
    for outer in (torch.enable_grad, torch.no_grad):
        with outer(), pytest.raises(RuntimeError, match="functorch transforms"):
            torch.func.grad(lambda value: module(value, *rest).square().sum())(x)


@kinds
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad])
def test_forward_derivatives_are_never_dropped(kind, mode):
    module, (x, *rest) = prepared(kind), arguments(kind)
    with mode(), torch.autograd.forward_ad.dual_level():
        expected = module(x, *rest)
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            module(dual, *rest)
    assert torch.equal(module(x, *rest), expected)


@kinds
def test_modes_see_the_op(kind):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names = []
    module, given = prepared(kind), arguments(kind)
    with torch.no_grad():
        expected = module(*given)
        with Seen():
            assert torch.equal(module(*given), expected)
        assert OPS[kind] in names
        graph = make_fx(module)(*given)
        assert torch.equal(graph(*others(kind)), module(*others(kind)))
        with profile() as profiler:
            module(*given)
    assert any(e.key == OPS[kind].replace(".", "::", 1).removesuffix(".default") for e in profiler.key_averages())


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


AMBIENT = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
}
ambient = pytest.mark.parametrize("name", AMBIENT)


@kinds
@ambient
def test_modules_do_not_depend_on_what_is_around(kind, name):
    module, given = prepared(kind), arguments(kind)
    expected = module(*given).detach()
    with AMBIENT[name]():
        assert torch.equal(module(*given), expected)
        assert torch.equal(module(given[0].bfloat16(), *given[1:]), module(given[0].bfloat16(), *given[1:]))


# functions


def test_plain_torch_puts_everything_back():
    with default_dtype(torch.float64), torch.no_grad(), torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        with plain_torch():
            assert torch.zeros(1).device.type == "cpu" and torch.zeros(1).dtype == torch.float32
            assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
            (torch.zeros(1, requires_grad=True) * 2).backward()
        assert torch.zeros(1).is_meta and torch.get_default_dtype() == torch.float64
        assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        with plain_torch(inference=True):
            assert torch.is_inference_mode_enabled()


def written(tiny_folder, folder, **options):
    method = MethodConfig(budgets=(2.0,), per_layer="none")
    gemq.quantize(gemq.QuantizeConfig(**tiny_folder, output=str(folder), method=method, **options))
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


@pytest.fixture(scope="module")
def expected_files(tiny_folder, tmp_path_factory):
    """The weights that quantizing gives with nothing around it, with routers tuned: streamed, and in memory."""
    root = tmp_path_factory.mktemp("plain")
    return {keep: written(tiny_folder, root / keep, keep=keep) for keep in ("layer", "model")}


@ambient
@pytest.mark.parametrize("keep", ["layer", "model"])
def test_quantizing_gives_the_same_bytes(tiny_folder, expected_files, tmp_path, name, keep):
    with AMBIENT[name]():
        assert written(tiny_folder, tmp_path / "out", keep=keep) == expected_files[keep]


@ambient
def test_evaluating_gives_the_same_number(model_folder, text_file, name):
    expected = gemq.evaluate(str(model_folder), str(text_file), length=16, limit=4)
    with AMBIENT[name]():
        assert gemq.evaluate(str(model_folder), str(text_file), length=16, limit=4).perplexity == expected.perplexity


@ambient
@pytest.mark.parametrize("packed", [True, False])
def test_decoding_gives_the_same_tokens(model_folder, tokenizer, name, packed):
    model = quantized("mixtral").packed if packed else AutoModelForCausalLM.from_pretrained(model_folder)
    options = {"max_new_tokens": 8, "ignore_eos": True, "tokenizer": tokenizer}
    expected = gemq.generate(model, ["it was on", "it"], **options)
    text = "".join(gemq.stream(model, "it was on", **options))
    with AMBIENT[name]():
        found = gemq.generate(model, ["it was on", "it"], **options)
        assert "".join(gemq.stream(model, "it was on", **options)) == text
    assert [r.tokens for r in found] == [r.tokens for r in expected]
