"""Arguments that must be refused: by name, with what was given and what is allowed, before anything is read."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from stacks import random_stack
from torch import Tensor

from gemq import ops

BITS, N, K, GROUP, TOKENS = (2, 0, 3), 32, 64, 32, 4
FIELDS = ("qweight", "meta", "expert_bits", "expert_offsets", "meta_offsets")


def arguments(layout: str = "cpu_tile", /, **changes) -> dict:
    """Good ones of ``moe_lowbit_gemm``, then the changes; a callable changes what is there."""
    stack = dict(zip(FIELDS, random_stack(BITS, N, K, GROUP, layout, 0), strict=True))
    good = {
        "x": torch.ones(TOKENS, K), **stack, "topk_ids": torch.zeros(TOKENS, 2, dtype=torch.int64),
        "topk_weights": torch.ones(TOKENS, 2), "n": N, "group_size": GROUP, "layout": layout,
    }
    return good | {name: value(good[name]) if callable(value) else value for name, value in changes.items()}


def set_at(index: int, value: int):
    def change(table: Tensor) -> Tensor:
        table = table.clone()
        table[index] = value
        return table

    return change


def meta_device(t: Tensor) -> Tensor:
    return t.to("meta")


def strided(t: Tensor) -> Tensor:
    return t.repeat_interleave(2)[::2]


COMMON = [
    ("x", [[1.0]], TypeError, "x must be a tensor, got list"),
    ("x", lambda t: t.double(), TypeError, "x must be float32 or float16 or bfloat16, got float64"),
    ("qweight", lambda t: t.to(torch.int8), TypeError, "qweight must be uint8, got int8"),
    ("qweight", lambda t: t[None], ValueError, r"qweight must have 1 dimensions, got shape \[1, "),
    ("qweight", meta_device, ValueError, "qweight is on meta, but the other tensors are on cpu"),
    ("qweight", strided, ValueError, r"qweight must be contiguous, got strides \(2,\)"),
    ("meta", lambda t: t.float(), TypeError, "meta must be float16, got float32"),
    ("meta", meta_device, ValueError, "meta is on meta, but the other tensors are on cpu"),
    ("meta", strided, ValueError, r"meta must be contiguous, got strides \(2,\)"),
    ("n", 0, ValueError, "number of output features must be positive|n, .* must be positive, got 0"),
    ("group_size", 48, ValueError, r"group_size must be one of \(32, 64, 128\), got 48"),
    ("group_size", 128, ValueError, "k=64 must be a positive multiple of group_size=128"),
    ("layout", "tile", ValueError, "layout must be one of canonical, cpu_tile, gpu_tile, got 'tile'"),
]
MOE = [
    ("x", lambda t: t[0], ValueError, r"x must have 2 or 3 dimensions, got shape \[64\]"),
    ("x", lambda t: t[:3], ValueError, "x has 3 tokens, topk_ids 4"),
    ("x", lambda t: t[:, None].expand(-1, 3, -1), ValueError, "x has 3 rows a token, topk_ids 2 slots"),
    ("expert_bits", lambda t: t.long(), TypeError, "expert_bits must be int32, got int64"),
    ("expert_bits", meta_device, ValueError, "expert_bits is on meta, but the other tensors are on cpu"),
    ("expert_bits", strided, ValueError, "expert_bits must be contiguous"),
    ("expert_offsets", lambda t: t.int(), TypeError, "expert_offsets must be int64, got int32"),
    ("expert_offsets", lambda t: t[:2], ValueError, "expert_offsets has 2 entries for 3 experts"),
    ("meta_offsets", lambda t: t[:2], ValueError, "meta_offsets has 2 entries for 3 experts"),
    ("topk_ids", lambda t: t.float(), TypeError, "topk_ids must be int32 or int64, got float32"),
    ("topk_ids", lambda t: t[0], ValueError, r"topk_ids must have 2 dimensions, got shape \[2\]"),
    ("topk_ids", lambda t: t[:, :0], ValueError, r"topk_ids must have at least one slot a token, got shape \[4, 0\]"),
    ("topk_ids", meta_device, ValueError, "topk_ids is on meta, but the other tensors are on cpu"),
    ("topk_weights", lambda t: t.double(), TypeError, "topk_weights must be float32 or .*, got float64"),
    ("topk_weights", lambda t: t[:, :1], ValueError, r"topk_weights \[4, 1\] must match topk_ids \[4, 2\]"),
]


@pytest.mark.parametrize("layout", ["canonical", "cpu_tile"])
@pytest.mark.parametrize("name, change, error, message", COMMON + MOE)
def test_moe_lowbit_gemm_refuses(layout: str, name: str, change, error, message: str) -> None:
    ops.moe_lowbit_gemm(**arguments(layout))
    with pytest.raises(error, match=message):
        ops.moe_lowbit_gemm(**arguments(layout, **{name: change}))


def dense(**changes) -> dict:
    """Good arguments of ``lowbit_gemm``: those of a stack's first expert, which is all it reads."""
    moe = {name: value for name, value in arguments(**changes).items() if name not in FIELDS[2:]}
    moe.pop("topk_ids"), moe.pop("topk_weights")
    return {"bits": 2} | moe


@pytest.mark.parametrize("name, change, error, message", [
    *COMMON,
    ("x", lambda t: t[0, 0], ValueError, "x must have at least 1 dimension, got a scalar"),
    ("bits", 9, ValueError, r"bits must be an integer in 1\.\.8, got 9"),
    ("bits", 0, ValueError, r"bits must be an integer in 1\.\.8, got 0"),
    ("qweight", lambda t: t[:511], ValueError, "qweight holds 511 elements, but 32 x 64 at 2 bits needs 512"),
    ("meta", lambda t: t[:127], ValueError, "meta holds 127 elements, but 32 x 64 needs 128"),
])  # fmt: skip
def test_lowbit_gemm_refuses(name: str, change, error, message: str) -> None:
    ops.lowbit_gemm(**dense())
    changes = dense(**{name: change}) if name != "bits" else dense() | {"bits": change}
    with pytest.raises(error, match=message):
        ops.lowbit_gemm(**changes)


def ffn(gate_up=None, down=None, **changes) -> Tensor:
    stacks = SimpleNamespace(
        gate_up=list(random_stack(BITS, 2 * 32, K, GROUP, "cpu_tile", 0)),
        down=list(random_stack(BITS, K, 32, GROUP, "cpu_tile", 1)),
    )
    for name, change in (("gate_up", gate_up), ("down", down)):
        if change:
            setattr(stacks, name, change(getattr(stacks, name)))
    good = {
        "x": torch.ones(TOKENS, K), "gate_up": stacks.gate_up, "down": stacks.down,
        "topk_ids": torch.zeros(TOKENS, 2, dtype=torch.int64), "topk_weights": torch.ones(TOKENS, 2),
        "intermediate": 32, "group_size": GROUP, "layout": "cpu_tile",
    }
    return ops.moe_lowbit_ffn(**good | changes)


@pytest.mark.parametrize("changes, error, message", [
    ({"x": torch.ones(TOKENS, 2, K)}, ValueError, "x must have 2 dimensions"),
    ({"topk_weights": None}, TypeError, "topk_weights must be a tensor, got None"),
    ({"intermediate": 0}, ValueError, "gate_up: the number of output features must be positive, got 0"),
    ({"intermediate": 48}, ValueError, "k=48 must be a positive multiple of group_size=32"),
    ({"down_group_size": 64}, ValueError, "k=32 must be a positive multiple of group_size=64"),
    ({"layout": "tile"}, ValueError, "layout must be one of"),
    ({"gate_up": lambda s: s[:4]}, ValueError, r"gate_up must be \(qweight, .*\), got 4 entries"),
    ({"down": lambda s: [s[0].short(), *s[1:]]}, TypeError, "down qweight must be uint8, got int16"),
    ({"down": lambda s: [t[:2] if i > 1 else t for i, t in enumerate(s)]}, ValueError, "3 experts, down 2"),
    ({"down": lambda s: [s[0][:-1], *s[1:]]}, ValueError, r"down expert_offsets\[2\] is 512, .* 1279 elements of qw"),
    ({"gate_up": lambda s: [s[0], s[1][:-1], *s[2:]]}, ValueError, r"gate_up meta_offsets\[2\] is 256, .* 511 elemen"),
])  # fmt: skip
def test_moe_lowbit_ffn_refuses(changes: dict, error, message: str) -> None:
    ffn()
    with pytest.raises(error, match=message):
        ffn(**changes)


@pytest.mark.parametrize("layout", ["canonical", "cpu_tile"])
@pytest.mark.parametrize("changes, message", [
    ({"qweight": lambda t: t[:-1]}, r"weight expert_offsets\[2\] is 512, where the 32 x 64 of expert 2 at 3 bits in"),
    ({"qweight": lambda t: t[:0]}, r"weight expert_offsets\[0\] is 0, .* not inside the 0 elements of qweight"),
    ({"meta": lambda t: t[:-1]}, r"weight meta_offsets\[2\] is 128, .* not inside the 255 elements of meta"),
    ({"expert_offsets": set_at(0, -1)}, r"weight expert_offsets\[0\] is -1"),
    ({"expert_offsets": set_at(2, 513)}, r"weight expert_offsets\[2\] is 513"),
    ({"expert_offsets": set_at(2, 2**63 - 1)}, r"weight expert_offsets\[2\] is 9223372036854775807"),
    ({"expert_offsets": set_at(2, -(2**63))}, r"weight expert_offsets\[2\] is -9223372036854775808"),
    ({"meta_offsets": set_at(0, -2)}, r"weight meta_offsets\[0\] is -2"),
    ({"meta_offsets": set_at(2, 130)}, r"weight meta_offsets\[2\] is 130"),
    ({"expert_bits": set_at(1, 9)}, r"weight expert_bits\[1\] must be an integer in 0\.\.8, got 9"),
    ({"expert_bits": set_at(0, -1)}, r"weight expert_bits\[0\] must be an integer in 0\.\.8, got -1"),
    ({"expert_bits": set_at(2, 8)}, r"weight expert_offsets\[2\] is 512, .* at 8 bits"),
    ({"n": 48}, r"weight expert_offsets\[2\] is 512, where the 48 x 64"),
])  # fmt: skip
def test_offsets_out_of_the_buffers(layout: str, changes: dict, message: str) -> None:
    """Also those of experts that no token is routed to."""
    with pytest.raises(ValueError, match=message):
        ops.moe_lowbit_gemm(**arguments(layout, **changes))


@pytest.mark.parametrize("layout", ["canonical", "cpu_tile"])
def test_offsets_of_an_expert_of_no_bits_are_not_read(layout: str) -> None:
    good = ops.moe_lowbit_gemm(**arguments(layout))
    odd = arguments(layout, expert_offsets=set_at(1, -7), meta_offsets=set_at(1, 2**62))
    assert torch.equal(ops.moe_lowbit_gemm(**odd), good)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter serves it")
def test_a_layout_needs_its_device() -> None:
    with pytest.raises(ValueError, match=r"gpu_tile is read on CUDA devices .*, the tensors are on cpu; repack to cpu"):
        ops.moe_lowbit_gemm(**arguments("gpu_tile"))
    with pytest.raises(ValueError, match="cpu_tile is read on the CPU only, the tensors are on meta"):
        everything = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in arguments().items()}
        ops.moe_lowbit_gemm(**everything)


CODES, PACKED = torch.zeros(4, 64, dtype=torch.uint8), torch.zeros(4, 24, dtype=torch.uint8)
META = torch.zeros(4, 2, 2, dtype=torch.float16)
FLAT = (PACKED.flatten(), META.flatten())


@pytest.mark.parametrize("call, error, message", [
    (lambda: ops.pack(CODES.int(), 3), TypeError, "codes must be uint8, got int32"),
    (lambda: ops.pack(CODES[0], 3), ValueError, r"codes must have 2 dimensions, got shape \[64\]"),
    (lambda: ops.pack(CODES.T, 3), ValueError, r"codes must be contiguous, got strides \(1, 64\)"),
    (lambda: ops.pack(CODES, 9), ValueError, r"bits must be an integer in 1\.\.8, got 9"),
    (lambda: ops.pack(CODES, True), ValueError, "bits must be an integer"),
    (lambda: ops.unpack(PACKED, 3, 63 + 8), ValueError, "packed has 24 bytes a row, but k=71 codes of 3 bits take 27"),
    (lambda: ops.unpack(PACKED.T, 3, 64), ValueError, "packed must be contiguous"),
    (lambda: ops.unpack(PACKED, 0, 64), ValueError, r"bits must be an integer in 1\.\.8, got 0"),
    (lambda: ops.dequantize(PACKED, META.float(), 3, 64, 32), TypeError, "meta must be float16, got float32"),
    (lambda: ops.dequantize(PACKED, META[0], 3, 64, 32), ValueError, "meta must have 3 dimensions"),
    (lambda: ops.dequantize(PACKED, META, 3, 64, 64), ValueError, r"meta must have shape \[4, 1, 2\].*\[4, 2, 2\]"),
    (lambda: ops.dequantize(PACKED, META, 3, 64, 48), ValueError, "group_size must be one of"),
    (lambda: ops.dequantize(PACKED, meta_device(META), 3, 64, 32), ValueError, "meta is on meta, but .* on cpu"),
    (lambda: ops.dequantize(PACKED, META, 3, 64, 32, torch.float64), TypeError, "dtype must be float32, .*float64"),
    (lambda: ops.repack(*FLAT, 3, 4, 64, 32, target="tile"), ValueError, "layout must be one of .*, got 'tile'"),
    (lambda: ops.repack(*FLAT, 3, 5, 64, 32, target="cpu_tile"), ValueError, "codes holds 96 elements, .* has 120"),
    (lambda: ops.repack(FLAT[0], FLAT[1][1:], 3, 4, 64, 32, target="cpu_tile"), ValueError, "meta holds 15 elements"),
    (lambda: ops.repack(*FLAT, 3, 4, 96, 64, target="cpu_tile"), ValueError, "k=96 must be .* of group_size=64"),
    (lambda: ops.repack(*FLAT, 9, 4, 64, 32, target="cpu_tile"), ValueError, r"bits must be .* 1\.\.8, got 9"),
    (lambda: ops.pack_experts([CODES], [META], [3, 2], 4, 64, 32), ValueError, "equally long, got 1, 1, 2"),
    (lambda: ops.pack_experts([CODES], [META], [9], 4, 64, 32), ValueError, r"expert_bits\[0\] must be .*, got 9"),
    (lambda: ops.pack_experts([CODES], [META], [3], 5, 64, 32), ValueError, r"codes\[0\] must have shape \[5, 64\]"),
    (lambda: ops.pack_experts([None], [META], [3], 4, 64, 32), TypeError, r"codes\[0\] must be a tensor, got NoneType"),
    (lambda: ops.pack_experts([CODES], [META[:3]], [3], 4, 64, 32), ValueError, r"meta\[0\] must have shape \[4, 2, 2"),
    (lambda: ops.pack_experts([CODES], [META.float()], [3], 4, 64, 32), TypeError, r"meta\[0\] must be float16"),
])  # fmt: skip
def test_packing_refuses(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_the_fake_ops_agree_with_meta_tensors() -> None:
    """Shapes are known without data, and the same checks apply."""
    packed = ops.pack(meta_device(CODES), 3)
    assert packed.shape == PACKED.shape and packed.device.type == "meta"
    assert ops.dequantize(packed, meta_device(META), 3, 64, 32).shape == (4, 64)
    with pytest.raises(TypeError, match="codes must be uint8"):
        ops.pack(meta_device(CODES.int()), 3)
