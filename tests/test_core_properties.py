"""Properties of the packing ops over arguments drawn at random: round trips keep every code, and arguments that make
no sense get a ``ValueError`` or ``TypeError``, never another error and never a result of another shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import random_stack
from test_core_bits import random_bytes, random_meta
from torch import Tensor

from gemq import format as fmt
from gemq import ops, reference

FAST = settings(max_examples=50, deadline=None)
WIDTH = st.integers(1, 8)
SEED = st.integers(0, 1 << 30)


@given(bits=WIDTH, rows=st.integers(0, 6), k=st.integers(1, 700), seed=SEED)
@FAST
def test_unpack_undoes_pack(bits: int, rows: int, k: int, seed: int) -> None:
    codes = random_bytes(rows, k, seed=seed) & ((1 << bits) - 1)
    packed = ops.pack(codes, bits)
    assert packed.shape == (rows, fmt.row_bytes(k, bits))
    assert torch.equal(ops.unpack(packed, bits, k), codes)


@given(bits=WIDTH, rows=st.integers(1, 4), k=st.integers(1, 200), seed=SEED)
@FAST
def test_rows_do_not_touch_each_other(bits: int, rows: int, k: int, seed: int) -> None:
    codes = random_bytes(rows, k, seed=seed)
    together = ops.pack(codes, bits)
    for row in range(rows):
        assert torch.equal(together[row : row + 1], ops.pack(codes[row : row + 1], bits))


@given(
    bits=WIDTH, n=st.integers(1, 140), groups=st.integers(1, 14), group_size=st.sampled_from(fmt.GROUP_SIZES),
    route=st.lists(st.sampled_from(fmt.LAYOUTS), min_size=1, max_size=4), seed=SEED,
)
@settings(max_examples=25, deadline=None)
def test_any_route_between_layouts_leads_back(
    bits: int, n: int, groups: int, group_size: int, route: list[str], seed: int
) -> None:
    k = groups * group_size
    packed, meta = random_bytes(n * fmt.row_bytes(k, bits), seed=seed), random_meta(n, groups, seed).flatten()
    here, now = "canonical", (packed, meta)
    for there in [*route, "canonical"]:
        now = ops.repack(*now, bits, n, k, group_size, source=here, target=there)
        assert now[0].numel() == fmt.codes_bytes(n, k, bits, there)
        here = there
    assert torch.equal(now[0], packed)
    assert torch.equal(now[1], meta)


@given(
    bits=WIDTH, rows=st.integers(1, 4), k=st.integers(1, 9), group_size=st.sampled_from(fmt.GROUP_SIZES),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), seed=SEED,
)
@FAST
def test_dequantize_is_the_formula(
    bits: int, rows: int, k: int, group_size: int, dtype: torch.dtype, seed: int
) -> None:
    k *= group_size
    codes, meta = random_bytes(rows, k, seed=seed) & ((1 << bits) - 1), random_meta(rows, k // group_size, seed)
    pairs = meta.double().repeat_interleave(group_size, 1)
    wanted = (codes.double() * pairs[..., 0] + pairs[..., 1]).float().to(dtype)
    assert torch.equal(ops.dequantize(ops.pack(codes, bits), meta, bits, k, group_size, dtype), wanted)


@given(bits=WIDTH, offset=st.integers(0, 40), k=st.integers(1, 100), seed=SEED)
@FAST
def test_views_at_any_address_work(bits: int, offset: int, k: int, seed: int) -> None:
    """A contiguous view may begin anywhere in its storage."""
    memory = random_bytes(offset + 3 * k, seed=seed)
    view = memory[offset:].view(3, k)
    packed = ops.pack(view, bits)
    assert torch.equal(packed, reference.pack(view.clone(), bits))
    shifted = torch.cat([memory[:offset], packed.flatten()])[offset:].view_as(packed)
    assert torch.equal(ops.unpack(shifted, bits, k), view & ((1 << bits) - 1))


# ---- nonsense ----

SIZES = st.sampled_from([-(2**63), -128, -1, 0, 1, 3, 32, 63, 64, 128, 2**31, 2**62, 2**63 - 1, 2**70])
ODD = st.one_of(st.none(), st.text(max_size=3), st.floats(), st.booleans(), st.just([64]), st.just((1, 2)))
NUMBERS = st.one_of(SIZES, SIZES, SIZES, ODD)
GROUPS = st.one_of(st.sampled_from([32, 64, 128, 0, -32, 48]), NUMBERS)
BITS = st.one_of(st.integers(-1, 9), NUMBERS)
NAMES = st.one_of(st.sampled_from([*fmt.LAYOUTS, "tile", ""]), ODD)
TYPES = [torch.uint8, torch.float16, torch.float32, torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.bool,
         torch.complex64, torch.float64]  # fmt: skip


@st.composite
def tensors(draw: st.DrawFn) -> object:
    """Of few elements, any type, 0 to 4 dimensions, contiguous or not, with data or without; or no tensor at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(ODD)
    shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 8, 24, 64]), max_size=4))
    t = torch.zeros(shape, dtype=draw(st.sampled_from([*TYPES[:3] * 4, *TYPES])))
    change = draw(st.sampled_from(["", "", "", "transposed", "strided", "meta", "sparse"]))
    if change == "transposed" and t.dim() >= 2:
        t = t.transpose(0, 1)
    if change == "strided" and t.dim():
        t = t[..., ::2]
    if change == "sparse" and t.dim():
        t = t.to_sparse()
    return t.to("meta") if change == "meta" else t


def refused_or_right(call: Callable[[], Tensor | tuple[Tensor, ...]], *, no_weights: bool = False) -> None:
    try:
        out = call()
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    except RuntimeError as error:
        # nothing but memory bounds the output of experts that store no weights
        assert "can't allocate memory" in str(error) and no_weights
        return
    for t in out if isinstance(out, tuple) else (out,):
        assert isinstance(t, Tensor)


@given(t=tensors(), bits=BITS, k=NUMBERS)
@settings(max_examples=120, deadline=None)
def test_nonsense_for_pack_and_unpack(t: object, bits: object, k: object) -> None:
    refused_or_right(lambda: ops.pack(t, bits))
    refused_or_right(lambda: ops.unpack(t, bits, k))


@given(
    t=tensors(), meta=tensors(), bits=BITS, k=NUMBERS, group_size=GROUPS,
    dtype=st.one_of(st.sampled_from(TYPES), ODD),
)
@settings(max_examples=120, deadline=None)
def test_nonsense_for_dequantize(
    t: object, meta: object, bits: object, k: object, group_size: object, dtype: object
) -> None:
    refused_or_right(lambda: ops.dequantize(t, meta, bits, k, group_size, dtype))


@given(
    t=tensors(), meta=tensors(), bits=BITS, n=NUMBERS, k=NUMBERS, group_size=GROUPS, source=NAMES, target=NAMES
)
@settings(max_examples=120, deadline=None)
def test_nonsense_for_repack(
    t: object, meta: object, bits: object, n: object, k: object, group_size: object, source: object, target: object
) -> None:
    refused_or_right(lambda: ops.repack(t, meta, bits, n, k, group_size, source=source, target=target))


def good_products() -> dict[str, object]:
    qweight, meta, *tables = random_stack([2, 0, 3], 32, 64, 32, "cpu_tile", 0)
    names = ("expert_bits", "expert_offsets", "meta_offsets")
    return {
        "x": torch.ones(4, 64), "qweight": qweight, "meta": meta, **dict(zip(names, tables, strict=True)),
        "topk_ids": torch.zeros(4, 2, dtype=torch.int64), "topk_weights": torch.ones(4, 2), "n": 32,
        "group_size": 32, "layout": "cpu_tile",
    }  # fmt: skip


@given(data=st.data())
@settings(max_examples=120, deadline=None)
def test_nonsense_for_products_with_experts(data: st.DataObject) -> None:
    """One or two of good arguments replaced: whatever passes the checks must not reach outside the buffers."""
    arguments = good_products()
    entries = st.sampled_from([-(2**63), -1, 0, 1, 2, 3, 9, 512, 513, 2**31 - 1, 2**62])
    tables = st.lists(entries, min_size=3, max_size=3)
    for name in data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)):
        if name in ("n", "group_size"):
            arguments[name] = data.draw(GROUPS)
        elif name == "layout":
            arguments[name] = data.draw(NAMES)
        elif name in ("expert_offsets", "meta_offsets") and data.draw(st.booleans()):
            arguments[name] = torch.tensor(data.draw(tables))
        elif name in ("expert_bits", "topk_ids") and data.draw(st.booleans()):
            drawn = [max(-(2**31), min(v, 2**31 - 1)) for v in data.draw(tables)]
            arguments[name] = torch.tensor(drawn, dtype=torch.int32)
            if name == "topk_ids":
                arguments[name] = arguments[name][:1].expand(4, 2).contiguous()
        else:
            arguments[name] = data.draw(tensors())
    bits = arguments["expert_bits"]
    no_weights = isinstance(bits, Tensor) and bits.layout == torch.strided and not bits.is_meta and not bits.any()
    refused_or_right(lambda: ops.moe_lowbit_gemm(**arguments), no_weights=no_weights)


@pytest.mark.parametrize("weights", [None, torch.ones(4, 2)])
def test_an_output_beyond_the_memory_is_refused_by_what_the_stack_holds(weights: Tensor | None) -> None:
    with pytest.raises(ValueError, match=r"weight expert_offsets\[0\] is 0, where the 2147483648 x 64 of expert 0"):
        ops.moe_lowbit_gemm(**good_products() | {"n": 2**31, "topk_weights": weights})


@pytest.mark.parametrize("call, message", [
    (lambda t, m: ops.pack(t.to_sparse(), 3), "codes must be a dense tensor, got torch.sparse_coo"),
    (lambda t, m: ops.unpack(t, 3, 64.0), "k must be an integer, got 64.0"),
    (lambda t, m: ops.dequantize(t, m, 3, 64, 32.0), "group_size must be one of"),
    (lambda t, m: ops.dequantize(t, m, 3, 64, 32, [1]), r"dtype must be float32, float16 or bfloat16, got \[1\]"),
    (lambda t, m: ops.repack(t.flatten(), m.flatten(), 3, 4.0, 64, 32, target="cpu_tile"), "n must be an integer"),
    (lambda t, m: ops.repack(t.flatten(), m.flatten(), 3, -4, 64, 32, target="cpu_tile"), "n must be at least 0"),
    (lambda t, m: ops.repack(t.flatten(), m.flatten(), 3, 4, 64, 32, target=["cpu_tile"]), "layout must be one of"),
])  # fmt: skip
def test_what_nonsense_is_told(call: Callable, message: str) -> None:
    packed, meta = torch.zeros(4, 24, dtype=torch.uint8), torch.zeros(4, 2, 2, dtype=torch.float16)
    with pytest.raises((ValueError, TypeError), match=message):
        call(packed, meta)
