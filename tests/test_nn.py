"""Packed modules: what they compute, what they save and load, what a change of dtype or layout leaves alone."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from comparing import assert_close
from placements import INTERPRETED, PLACEMENTS, Placement
from tiny_models import tiny_model
from torch import Tensor, nn

from gemq import format as fmt
from gemq import reference
from gemq.nn import LowBitExperts, LowBitLinear
from gemq.nn.experts import PROJECTIONS, QuantizedStack
from gemq.reference.grid import dequantize_codes, round_to_nearest

# sizes at which canonical and cpu_tile buffers are equally long, so that only a conversion tells them apart
HIDDEN, INTERMEDIATE, GROUP = 64, 96, 64
BITS = [3, 0, 1, 2]
LAYOUTS = pytest.mark.parametrize("layout", fmt.LAYOUTS)
places = pytest.mark.parametrize("place", PLACEMENTS)


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * shape[-1] ** -0.5


def make_linear(bits: int = 3, bias: bool = True, n: int = 48, k: int = 128) -> tuple[LowBitLinear, Tensor]:
    """A module and the weights ``[n, k]`` it stands for."""
    codes, meta = round_to_nearest(weights(n, k), bits, 64)
    module = LowBitLinear.from_codes(codes, meta, bits, 64, weights(n) if bias else None)
    return module, dequantize_codes(codes, meta)


def quantize_stack(dense: Tensor, bits: list[int], group_size: int) -> tuple[QuantizedStack, Tensor]:
    """Experts ``[E, n, k]`` rounded to ``bits``, and the weights that are left of them."""
    codes, meta, kept = [], [], torch.zeros_like(dense)
    for e, width in enumerate(bits):
        part = round_to_nearest(dense[e], width, group_size) if width else (None, None)
        codes.append(part[0])
        meta.append(part[1])
        if width:
            kept[e] = dequantize_codes(*part)
    return QuantizedStack(codes, meta, bits), kept


def make_experts(bits: list[int] = BITS, seed: int = 0) -> tuple[LowBitExperts, Tensor, Tensor]:
    """A module and the dense ``gate_up_proj`` and ``down_proj`` it stands for; groups are 64, and 32 for 96 columns."""
    gate_up, dense_gate_up = quantize_stack(weights(len(bits), 2 * INTERMEDIATE, HIDDEN, seed=seed), bits, 64)
    down, dense_down = quantize_stack(weights(len(bits), HIDDEN, INTERMEDIATE, seed=seed + 1), bits, 32)
    module = LowBitExperts.from_stacks(gate_up, down, HIDDEN, INTERMEDIATE, GROUP)
    return module, dense_gate_up, dense_down


def make(kind: str) -> LowBitLinear | LowBitExperts:
    return make_linear()[0] if kind == "linear" else make_experts()[0]


def inputs(kind: str, tokens: int = 7, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 128 if kind == "linear" else HIDDEN, generator=generator).to(dtype)
    if kind == "linear":
        return (x,)
    ids = torch.rand(tokens, len(BITS), generator=generator).argsort(-1)[:, :2]
    return x, ids, torch.rand(tokens, 2, generator=generator)


def packed_bytes(module: nn.Module) -> dict[str, bytes]:
    return {name: t.cpu().view(torch.uint8).numpy().tobytes() for name, t in module.named_buffers()}


kinds = pytest.mark.parametrize("kind", ["linear", "experts"])


@LAYOUTS
@pytest.mark.parametrize("bits", range(1, 9))
def test_linear_holds_its_weights(layout: str, bits: int) -> None:
    module, dense = make_linear(bits)
    module.prepare(layout)
    assert module.layout == layout
    assert torch.equal(module.weight(), dense)
    assert torch.equal(module.weight(torch.bfloat16), dense.to(torch.bfloat16))


@LAYOUTS
def test_experts_hold_their_weights(layout: str) -> None:
    module, *dense = make_experts([3, 0, 1, 2, 4, 8, 5, 6, 7])
    module.prepare(layout)
    for name, expected in zip(PROJECTIONS, dense, strict=True):
        assert torch.equal(module.dense(name), expected)
        assert torch.equal(module.dense(name, torch.float16), expected.half())


@places
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_linear_is_a_linear(place: Placement, dtype: torch.dtype, bias: bool) -> None:
    module, dense = make_linear(bias=bias)
    module.to(place.device).prepare(place.layout)
    x = inputs("linear", dtype=dtype)[0].unflatten(0, (1, 7))
    expected = nn.functional.linear(x.double(), dense.double())
    if bias:
        expected = expected + module.bias.detach().double().cpu()
    out = module(x.to(place.device))
    assert out.dtype == dtype
    # the product and the sum with the bias are two roundings
    assert_close(out, expected, dtype={torch.float32: place.precision(dtype)}.get(dtype, torch.bfloat16))


@places
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
def test_experts_are_those_of_transformers(place: Placement, dtype: torch.dtype, tokens: int) -> None:
    """A Mixtral block that holds the dequantized weights, in float64."""
    module, *dense = make_experts()
    module.to(place.device).prepare(place.layout)
    model = tiny_model("mixtral", layers=1).double()
    model.set_experts_implementation("eager")
    block = model.model.layers[0].mlp.experts
    assert block.gate_up_proj.shape == dense[0].shape and block.down_proj.shape == dense[1].shape
    with torch.no_grad():
        block.gate_up_proj.copy_(dense[0])
        block.down_proj.copy_(dense[1])
        x, ids, scale = inputs("experts", tokens, dtype)
        expected = block(x.double(), ids, scale.double())
    out = module(*(t.to(place.device) for t in (x, ids, scale)))
    assert out.dtype == dtype
    assert_close(out, expected, dtype=place.precision(dtype))


@kinds
def test_layouts_agree(kind: str) -> None:
    """Preparing changes only the order of float32 sums; going back is exact."""
    module = make(kind)
    module.prepare("canonical")
    canonical, before = module(*inputs(kind)), packed_bytes(module)
    for layout in ("cpu_tile", "gpu_tile") if INTERPRETED else ("cpu_tile",):
        module.prepare(layout)
        assert_close(module(*inputs(kind)), canonical.double(), dtype=Placement(layout, "cpu").precision(torch.float32))
    module.prepare("canonical")
    assert packed_bytes(module) == before
    assert torch.equal(module(*inputs(kind)), canonical)


@kinds
@LAYOUTS
def test_the_state_dict_is_canonical(kind: str, layout: str) -> None:
    module = make(kind)
    saved = {name: t.clone() for name, t in module.state_dict().items()}
    module.prepare(layout)
    state = module.state_dict()
    assert list(state) == list(saved)
    assert all(torch.equal(state[name], saved[name]) for name in saved)


@kinds
@pytest.mark.parametrize("saved_as", fmt.LAYOUTS)
@pytest.mark.parametrize("loaded_as", fmt.LAYOUTS)
@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
def test_loading_into_any_layout(kind: str, saved_as: str, loaded_as: str, assign: bool) -> None:
    """Also into a module that was prepared already, whose buffers have the same sizes but another order."""
    source = make(kind)
    source.prepare(saved_as)
    target = make_linear(bias=True)[0] if kind == "linear" else make_experts(seed=5)[0]
    for buffer in target.buffers():
        buffer.zero_()
    target.prepare(loaded_as)
    missing = target.load_state_dict(source.state_dict(), assign=assign)
    assert not missing.missing_keys and not missing.unexpected_keys
    assert target.layout == loaded_as
    source.prepare(loaded_as)
    assert packed_bytes(target) == packed_bytes(source)


@kinds
def test_a_partial_load_keeps_the_rest(kind: str) -> None:
    module, other = make(kind), make(kind)
    other.prepare("canonical")
    module.prepare("cpu_tile")
    key = next(name for name in other.state_dict() if name.endswith("_codes"))
    module.load_state_dict({key: other.state_dict()[key]}, strict=False)
    other.prepare("cpu_tile")
    assert packed_bytes(module) == packed_bytes(other)
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict({key: other.state_dict()[key]})


@kinds
@LAYOUTS
@pytest.mark.parametrize("change", ["bfloat16", "half", "float", "double"])
def test_a_change_of_dtype_leaves_packed_buffers_alone(kind: str, layout: str, change: str) -> None:
    module = make(kind)
    module.prepare(layout)
    before = packed_bytes(module)
    nn.Sequential(getattr(module, change)())
    assert packed_bytes(module) == before
    assert module.layout == layout
    dtypes = {t.dtype for name, t in module.named_buffers() if name.endswith("_meta")}
    assert dtypes == {torch.float16}
    if kind == "linear":
        assert module.bias.dtype == getattr(torch, change)
    nn.Sequential(module).to(torch.bfloat16)
    assert packed_bytes(module) == before


@kinds
def test_one_copy_of_the_codes(kind: str) -> None:
    """After preparing, the canonical buffers are gone and nothing but codes, metadata and tables is there."""
    module = make(kind)
    old = [weakref.ref(t) for t in module.buffers()]
    sizes = {name: t.nbytes for name, t in module.named_buffers()}
    module.prepare("cpu_tile")
    assert not any(ref() is not None for ref in old)
    now = {name: t.nbytes for name, t in module.named_buffers()}
    assert {name: now[name] for name in sizes} == sizes
    tables = 2 * len(BITS) * (4 + 8 + 8) if kind == "experts" else 0
    assert sum(now.values()) == sum(sizes.values()) + tables
    held = [v for v in vars(module).values() if isinstance(v, Tensor)]
    assert not held


@kinds
@LAYOUTS
def test_deepcopy_is_independent(kind: str, layout: str) -> None:
    module = make(kind)
    module.prepare(layout)
    before = packed_bytes(module)
    clone = copy.deepcopy(module)
    assert packed_bytes(clone) == before and clone.layout == layout
    for buffer in clone.buffers():
        buffer.zero_()
    assert packed_bytes(module) == before


def test_repr() -> None:
    linear, experts = make_linear()[0], make_experts()[0]
    assert repr(linear) == "LowBitLinear(in_features=128, out_features=48, bits=3, group_size=64, layout=canonical)"
    assert repr(experts) == "LowBitExperts(experts=4, hidden=64, intermediate=96, bits=[3, 0, 1, 2])"


def test_bias_follows_the_input() -> None:
    """A float32 bias does not widen the output."""
    module, _ = make_linear()
    module.prepare()
    assert module(inputs("linear", dtype=torch.bfloat16)[0]).dtype == torch.bfloat16


@kinds
def test_gradients_reach_the_input(kind: str) -> None:
    module = make(kind)
    module.prepare()
    x, *rest = inputs(kind)
    module(x.requires_grad_(), *rest).sum().backward()
    assert x.grad is not None and x.grad.any()
    assert all(not t.requires_grad for t in module.buffers())


@kinds
def test_from_the_meta_device(kind: str) -> None:
    """As checkpoints are loaded: built without memory, then filled, then prepared."""
    source = make(kind)
    with torch.device("meta"):
        empty = LowBitLinear(128, 48, 3, 64, bias=True) if kind == "linear" else LowBitExperts(
            HIDDEN, INTERMEDIATE, BITS, GROUP
        )  # fmt: skip
    assert empty.packed_device().type == "meta"
    empty.bfloat16().to_empty(device="cpu")
    empty.load_state_dict(source.state_dict())
    empty.prepare()
    source.prepare()
    assert empty.layout == "cpu_tile"
    assert packed_bytes(empty) == packed_bytes(source)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@kinds
def test_moving_to_the_gpu_and_back(kind: str) -> None:
    module = make(kind)
    module.prepare()
    before, out = packed_bytes(module), module(*inputs(kind))
    module.cuda()
    assert module.layout == "gpu_tile"
    on_gpu = module(*(t.cuda() for t in inputs(kind)))
    assert_close(on_gpu, out.double(), dtype=torch.float16)
    module.cpu()
    assert module.layout == "cpu_tile" and packed_bytes(module) == before


def test_experts_must_be_prepared_first() -> None:
    with pytest.raises(RuntimeError, match=r"call prepare\(\) once their buffers are filled"):
        make_experts()[0](*inputs("experts"))


@pytest.mark.parametrize("call, error, message", [
    (lambda: LowBitLinear(128, 48, 9), ValueError, r"bits must be an integer in 1\.\.8, got 9"),
    (lambda: LowBitLinear(48, 48, 2), ValueError, "k=48 columns cannot be grouped: it must be a multiple of 32"),
    (lambda: LowBitExperts(64, 96, [9]), ValueError, r"expert_bits\[0\] must be an integer in 0\.\.8, got 9"),
    (lambda: LowBitExperts(48, 96, [2]), ValueError, "k=48 columns cannot be grouped"),
    (lambda: make_linear()[0].prepare("tile"), ValueError, "layout must be one of .*, got 'tile'"),
    (lambda: make_experts()[0].prepare("tile"), ValueError, "layout must be one of .*, got 'tile'"),
])  # fmt: skip
def test_bad_shapes_and_layouts(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_from_codes_refuses_other_metadata() -> None:
    codes, meta = round_to_nearest(weights(48, 128), 3, 64)
    for wrong, error, message in (
        (meta[:, :1], ValueError, r"meta must have shape \[48, 2, 2\] for groups of 64, got \[48, 1, 2\]"),
        (meta.float(), TypeError, "meta must be float16, got float32"),
    ):
        with pytest.raises(error, match=message):
            LowBitLinear.from_codes(codes, wrong, 3, 64)
    with pytest.raises(ValueError, match=r"meta must have shape \[48, 4, 2\] for groups of 32"):
        LowBitLinear.from_codes(codes, meta, 3, 32)


def test_from_stacks_refuses_stacks_that_do_not_fit() -> None:
    gate_up, _ = quantize_stack(weights(2, 2 * INTERMEDIATE, HIDDEN), [2, 3], 64)
    down, _ = quantize_stack(weights(2, HIDDEN, INTERMEDIATE), [3, 2], 32)
    fewer = QuantizedStack(down.codes[:1], down.meta[:1], down.bits[:1])
    with pytest.raises(ValueError, match=r"down_bits must be of 2 experts, as bits, got 1"):
        LowBitExperts.from_stacks(gate_up, fewer, HIDDEN, INTERMEDIATE, GROUP)
    with pytest.raises(ValueError, match=r"codes\[0\] must have shape \[192, 64\], got \[64, 96\]"):
        LowBitExperts.from_stacks(down, gate_up, HIDDEN, INTERMEDIATE, GROUP)


def test_reference_and_module_agree_on_the_packed_form() -> None:
    codes, meta = round_to_nearest(weights(48, 128), 3, 64)
    module = LowBitLinear.from_codes(codes, meta, 3, 64)
    assert torch.equal(module.weight_codes, reference.pack(codes, 3).flatten())
    assert torch.equal(module.weight_meta, meta.flatten())
