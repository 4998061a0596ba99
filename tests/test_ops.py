"""The values of every op, from Python, against the plain torch reference in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from comparing import assert_close
from placements import DEVICES, PLACEMENTS, Placement
from stacks import random_stack
from torch import Tensor

from gemq import ops, reference

FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WIDTHS = range(1, 9)
# every width, an expert of 0 bits among them, 4 twice
MIXED = (3, 0, 1, 4, 2, 8, 5, 7, 6, 4)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` on the CPU comes filled with NaN (255 for bytes), so that what a kernel leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(not torch.cuda.is_available())
    yield
    torch.use_deterministic_algorithms(before)


def dtypes(name: str = "dtype"):
    return pytest.mark.parametrize(name, FLOATS.values(), ids=FLOATS)


def random_codes(n: int, k: int, bits: int) -> Tensor:
    return torch.randint(0, 1 << bits, (n, k), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)


def random_meta(n: int, groups: int) -> Tensor:
    return torch.randn(n, groups, 2, generator=torch.Generator().manual_seed(n)).to(torch.float16)


def fresh(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def routing(tokens: int, top_k: int, experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Distinct experts a token, weights that sum to 1."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, :top_k]
    return ids, torch.rand(tokens, top_k, generator=generator).softmax(-1)


def on(device: str, tensors) -> tuple:
    return tuple(t if t is None else t.to(device) for t in tensors)


def check_gemm(place: Placement, x, stack, ids, weights, n: int, group_size: int) -> Tensor:
    """``moe_lowbit_gemm`` against the reference."""
    options = {"n": n, "group_size": group_size, "layout": place.layout}
    out = ops.moe_lowbit_gemm(*on(place.device, (x, *stack, ids, weights)), **options)
    assert out.dtype == x.dtype
    expected = reference.moe_lowbit_gemm(x, *stack, ids, weights, **options, compute_dtype=torch.float64)
    assert_close(out, expected, dtype=place.precision(x.dtype))
    return out


def check_ffn(place: Placement, x, gate_up, down, ids, weights, **options) -> Tensor:
    """``moe_lowbit_ffn`` against the reference."""
    options["layout"] = place.layout
    moved = [on(place.device, part) for part in ((x,), gate_up, down, (ids, weights))]
    out = ops.moe_lowbit_ffn(*moved[0], *moved[1:3], *moved[3], **options)
    assert out.dtype == x.dtype
    expected = reference.moe_lowbit_ffn(x, gate_up, down, ids, weights, **options, compute_dtype=torch.float64)
    assert_close(out, expected, dtype=place.precision(x.dtype))
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("rows, k", [(5, 37), (1, 1), (3, 256), (0, 8), (2, 0)])
def test_pack_and_unpack(device: str, bits: int, rows: int, k: int) -> None:
    codes = random_codes(rows, k, bits)
    packed = ops.pack(codes.to(device), bits)
    assert torch.equal(packed.cpu(), reference.pack(codes, bits))
    assert torch.equal(ops.unpack(packed, bits, k).cpu(), codes)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_dequantize_to_the_bit(device: str, bits: int, group_size: int) -> None:
    packed, meta = ops.pack(random_codes(7, 384, bits), bits), random_meta(7, 384 // group_size)
    for dtype in FLOATS.values():
        out = ops.dequantize(packed.to(device), meta.to(device), bits, 384, group_size, dtype)
        assert torch.equal(out.cpu(), reference.dequantize(packed, meta, bits, 384, group_size, dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("n, k, group_size", [(1, 32, 32), (47, 192, 64), (80, 384, 128)])
def test_repack_to_the_bit(device: str, bits: int, n: int, k: int, group_size: int) -> None:
    """From canonical to each tile layout, from one tile to the other, and back."""
    packed, meta = reference.pack(random_codes(n, k, bits), bits), random_meta(n, k // group_size)
    wanted = {
        layout: reference.to_layout(packed, meta, bits, k, group_size, layout)
        for layout in ("canonical", "cpu_tile", "gpu_tile")
    }
    for source, buffers in wanted.items():
        for target, (codes, pairs) in wanted.items():
            given = on(device, buffers)
            got = ops.repack(*given, bits, n, k, group_size, source=source, target=target)
            assert torch.equal(got[0].cpu(), codes) and torch.equal(got[1].cpu(), pairs), f"{source} -> {target}"
            assert got[0].data_ptr() != given[0].data_ptr()


@pytest.mark.parametrize("layout", ["canonical", "cpu_tile", "gpu_tile"])
def test_a_stack_comes_back(layout: str) -> None:
    n, k, group_size = 33, 128, 64
    codes = [random_codes(n, k, bits) if bits else None for bits in MIXED]
    meta = [random_meta(n, k // group_size) if bits else None for bits in MIXED]
    flat = ops.pack_experts(codes, meta, list(MIXED), n, k, group_size, layout)
    back = ops.unpack_experts(*flat, list(MIXED), n, k, group_size, layout)
    for plain, pairs, part in zip(codes, meta, back, strict=True):
        assert (part is None) == (plain is None)
        assert part is None or (torch.equal(part[0], plain) and torch.equal(part[1], pairs))


@pytest.mark.parametrize("place", PLACEMENTS)
@dtypes()
@pytest.mark.parametrize("bits", WIDTHS)
def test_one_width(place: Placement, dtype: torch.dtype, bits: int) -> None:
    stack = random_stack([bits], 48, 256, 128, place.layout, bits)
    check_gemm(place, fresh(3, 256, dtype=dtype), stack, torch.zeros(3, 1, dtype=torch.int64), None, 48, 128)


@pytest.mark.parametrize("place", PLACEMENTS)
@dtypes()
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 40])
@pytest.mark.parametrize("per_slot", [False, True], ids=["x-per-token", "x-per-slot"])
@pytest.mark.parametrize("weights", [None, torch.float32, torch.bfloat16], ids=["unweighted", "w-fp32", "w-bf16"])
def test_mixed_widths(place: Placement, dtype: torch.dtype, tokens: int, per_slot: bool, weights) -> None:
    stack = random_stack(MIXED, 33, 128, 64, place.layout, 1)
    ids, scale = routing(tokens, 3, len(MIXED), tokens)
    x = fresh(tokens, 3, 128, dtype=dtype) if per_slot else fresh(tokens, 128, dtype=dtype)
    check_gemm(place, x, stack, ids, None if weights is None else scale.to(weights), 33, 64)


@pytest.mark.parametrize("place", PLACEMENTS)
@pytest.mark.parametrize("n", [1, 31, 33, 65])
@pytest.mark.parametrize("k, group_size", [(32, 32), (96, 32), (192, 64), (384, 128)])
def test_shapes_off_the_tile(place: Placement, n: int, k: int, group_size: int) -> None:
    stack = random_stack((2, 0, 3), n, k, group_size, place.layout, n)
    ids, weights = routing(5, 2, 3)
    check_gemm(place, fresh(5, k), stack, ids, weights, n, group_size)


@pytest.mark.parametrize("place", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_ids_of_no_expert_give_zero(place: Placement, dtype: torch.dtype) -> None:
    """Whatever their weight: padding comes with any."""
    stack = random_stack((2, 1), 40, 64, 32, place.layout, 2)
    ids = torch.tensor([[-1, 0], [2, 1], [7, torch.iinfo(dtype).min], [1, torch.iinfo(dtype).max]], dtype=dtype)
    out = check_gemm(place, fresh(4, 64), stack, ids, None, 40, 32)
    assert not out[0, 0].any() and not out[1, 0].any() and not out[2].any() and not out[3, 1].any()
    weights = torch.where((ids >= 0) & (ids < 2), 0.5, float("nan"))
    out = check_gemm(place, fresh(4, 64), stack, ids, weights, 40, 32)
    assert not out[2].any()


@pytest.mark.parametrize("place", PLACEMENTS)
@pytest.mark.parametrize("expert", [0, 1, 3])
def test_all_tokens_on_one_expert(place: Placement, expert: int) -> None:
    """The others idle; expert 1 stores nothing."""
    stack = random_stack((3, 0, 2, 1), 48, 64, 32, place.layout, 3)
    out = check_gemm(place, fresh(17, 64), stack, torch.full((17, 2), expert), torch.rand(17, 2), 48, 32)
    assert bool(out.any()) == (expert != 1)


@pytest.mark.parametrize("place", PLACEMENTS)
def test_only_experts_of_no_bits(place: Placement) -> None:
    stack = random_stack((0, 0), 48, 64, 32, place.layout, 3)
    ids, weights = routing(3, 2, 2)
    assert not check_gemm(place, fresh(3, 64), stack, ids, weights, 48, 32).any()
    down = random_stack((0, 0), 64, 32, 32, place.layout, 3)
    gate_up = random_stack((0, 0), 64, 64, 32, place.layout, 3)
    assert not check_ffn(place, fresh(3, 64), gate_up, down, ids, weights, intermediate=32, group_size=32).any()


@pytest.mark.parametrize("place", PLACEMENTS)
@dtypes()
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 40])
@pytest.mark.parametrize(
    "hidden, intermediate, group_size, down_group_size",
    [(128, 128, 128, None), (160, 96, 32, None), (192, 64, 64, 32)],
)
def test_ffn(
    place: Placement, dtype: torch.dtype, tokens: int, hidden: int, intermediate: int, group_size: int, down_group_size
) -> None:
    gate_up = random_stack(MIXED, 2 * intermediate, hidden, group_size, place.layout, 4)
    # other widths than gate_up: only one of the two may store nothing
    down = random_stack(MIXED[::-1], hidden, intermediate, down_group_size or group_size, place.layout, 5)
    ids, weights = routing(tokens, 3, len(MIXED), tokens)
    if tokens > 1:
        ids[0, 0], ids[1, 2] = -1, len(MIXED)
    ids = ids.to(torch.int32) if tokens % 2 else ids
    check_ffn(
        place, fresh(tokens, hidden, dtype=dtype), gate_up, down, ids, weights.to(dtype), intermediate=intermediate,
        group_size=group_size, down_group_size=down_group_size,
    )


@pytest.mark.parametrize("place", PLACEMENTS)
@dtypes()
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", [(), (3,), (0,), (2, 9), (0, 4)], ids=str)
def test_lowbit_gemm(place: Placement, dtype: torch.dtype, bits: int, shape: tuple[int, ...]) -> None:
    qweight, meta, *_ = random_stack([bits], 47, 192, 64, place.layout, bits)
    x = fresh(*shape, 192, dtype=dtype)
    options = {"bits": bits, "n": 47, "group_size": 64, "layout": place.layout}
    out = ops.lowbit_gemm(*on(place.device, (x, qweight, meta)), **options)
    assert out.dtype == dtype
    expected = reference.lowbit_gemm(x, qweight, meta, **options, compute_dtype=torch.float64)
    assert_close(out, expected, dtype=place.precision(dtype))


@pytest.mark.parametrize("place", PLACEMENTS)
@dtypes()
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, from Triton's interpreter
def test_a_poisoned_row_stays_alone(place: Placement, dtype: torch.dtype, poison: float) -> None:
    """The other rows come out as without it, to the bit."""
    layout, device = place
    gate_up, down = random_stack((2, 1, 3), 128, 64, 32, layout, 6), random_stack((2, 1, 3), 64, 64, 32, layout, 7)
    gate_up, down = on(device, gate_up), on(device, down)
    ids, weights = on(device, routing(6, 2, 3))
    dense = on(device, random_stack([4], 128, 64, 32, layout, 8)[:2])
    calls = (
        lambda x: ops.moe_lowbit_gemm(x, *gate_up, ids, n=128, group_size=32, layout=layout),
        lambda x: ops.moe_lowbit_gemm(x, *gate_up, ids, weights, n=128, group_size=32, layout=layout),
        lambda x: ops.moe_lowbit_ffn(
            x, gate_up, down, ids, weights, intermediate=64, group_size=32, layout=layout
        ),
        lambda x: ops.lowbit_gemm(x, *dense, bits=4, n=128, group_size=32, layout=layout),
    )
    clean = fresh(6, 64, dtype=dtype).to(device)
    poisoned = clean.clone()
    poisoned[2, 5] = poison
    for call in calls:
        expected, out = call(clean), call(poisoned)
        others = torch.arange(6) != 2
        assert torch.equal(out[others], expected[others])
        assert not out[2].isfinite().any()


@pytest.mark.parametrize("place", PLACEMENTS)
def test_strides_do_not_matter(place: Placement) -> None:
    layout, device = place
    gate_up, down = random_stack((2, 1, 3), 128, 64, 32, layout, 6), random_stack((2, 1, 3), 64, 64, 32, layout, 7)
    gate_up, down = on(device, gate_up), on(device, down)
    wide, tall = fresh(5, 128).to(device)[:, ::2], fresh(64, 5).to(device).T
    slots = fresh(2, 5, 64).to(device).transpose(0, 1)
    ids, weights = (t.T.contiguous().T for t in on(device, routing(5, 2, 3)))
    assert not any(t.is_contiguous() for t in (wide, tall, slots, ids, weights))

    def gemm(x, ids, weights):
        return ops.moe_lowbit_gemm(x, *gate_up, ids, weights, n=128, group_size=32, layout=layout)

    def ffn(x, ids, weights):
        return ops.moe_lowbit_ffn(x, gate_up, down, ids, weights, intermediate=64, group_size=32, layout=layout)

    def dense(x, ids, weights):
        return ops.lowbit_gemm(x, *gate_up[:2], bits=2, n=128, group_size=32, layout=layout)

    for call, x in ((gemm, wide), (gemm, tall), (gemm, slots), (ffn, wide), (ffn, tall), (dense, wide), (dense, tall)):
        assert torch.equal(call(x, ids, weights), call(*(t.contiguous() for t in (x, ids, weights))))
