"""No op reads or writes a byte outside its buffers: all of them lie against pages that may not be touched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from guard_pages import placed
from stacks import random_stack
from test_core_bits import DTYPES, LAYOUTS, random_bytes, random_meta
from torch import Tensor

from gemq import format as fmt
from gemq import ops, reference
from gemq._core import core

WIDTHS = range(1, 9)
ENDS = pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])


@pytest.mark.parametrize(("at_end", "offset"), [(True, 5000), (False, -1)])
def test_the_pages_do_forbid(at_end: bool, offset: int) -> None:
    program = f"import ctypes, guard_pages as g; a = g.protected(5000, at_end={at_end})\n"
    program += f"print(ctypes.string_at(a, 5000)[:1], flush=True)\nctypes.string_at(a + {offset}, 1); print('read')"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.stdout == "b'\\x00'\n"
    assert done.returncode != 0


def like(tensor: Tensor, at_end: bool) -> Tensor:
    return placed(torch.full_like(tensor.view(torch.uint8), 0xA5).view(tensor.dtype), at_end=at_end)


@ENDS
@pytest.mark.parametrize("bits", WIDTHS)
def test_pack_and_unpack(bits: int, at_end: bool) -> None:
    for rows, k in ((1, 1), (1, 7), (3, 9), (2, 31), (1, 33), (5, 64), (3, 1001), (2, 8200)):
        codes = placed(random_bytes(rows, k, seed=k), at_end=at_end)
        expected = reference.pack(codes, bits)
        packed, again = like(expected, at_end), like(codes, at_end)
        for threads in (1, 3):
            shape = {"device": 0, "rows": rows, "k": k, "bits": bits, "threads": threads}
            core().pack(src=codes.data_ptr(), dst=packed.data_ptr(), **shape)
            core().unpack(src=packed.data_ptr(), dst=again.data_ptr(), **shape)
            assert torch.equal(packed, expected)
            assert torch.equal(again, codes & ((1 << bits) - 1))


@ENDS
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(bits: int, dtype: torch.dtype, at_end: bool) -> None:
    for rows, k, group_size in ((1, 32, 32), (3, 192, 64), (5, 384, 128)):
        packed = placed(random_bytes(rows, fmt.row_bytes(k, bits), seed=bits), at_end=at_end)
        meta = placed(random_meta(rows, k // group_size, seed=k), at_end=at_end)
        expected = reference.dequantize(packed, meta, bits, k, group_size, dtype)
        out = like(expected, at_end)
        core().dequantize(
            device=0, src=packed.data_ptr(), meta=meta.data_ptr(), dst=out.data_ptr(), rows=rows, k=k, bits=bits,
            group_size=group_size, out_dtype=DTYPES.index(dtype), threads=2,
        )
        assert torch.equal(out, expected)


@ENDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_repack(bits: int, layout: str, at_end: bool) -> None:
    for n, k, group_size in ((1, 32, 32), (17, 192, 64), (65, 768, 128)):
        packed, meta = random_bytes(n, fmt.row_bytes(k, bits), seed=bits), random_meta(n, k // group_size, seed=n)
        pairs = [(packed.flatten(), meta.flatten()), reference.to_layout(packed, meta, bits, k, group_size, layout)]
        for inverse in (False, True):
            given, expected = pairs[::-1] if inverse else pairs
            source = [placed(t, at_end=at_end) for t in given]
            target = [like(t, at_end) for t in expected]
            core().repack(
                device=0, src_codes=source[0].data_ptr(), src_meta=source[1].data_ptr(),
                dst_codes=target[0].data_ptr(), dst_meta=target[1].data_ptr(), n=n, k=k, bits=bits,
                group_size=group_size, layout=LAYOUTS[layout], inverse=inverse, threads=2,
            )
            assert all(map(torch.equal, target, expected))


TOLERANCE = 1e-4


def assert_near(out: Tensor, ref: Tensor) -> None:
    assert out.isfinite().all()
    assert (out - ref).norm() <= TOLERANCE * ref.norm()


@ENDS
@pytest.mark.parametrize("layout", ["cpu_tile", "canonical"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_dense_products(bits: int, layout: str, at_end: bool) -> None:
    for n, k, group_size in ((33, 96, 32), (16, 384, 128)):
        qweight, meta, *_ = (placed(t, at_end=at_end) for t in random_stack([bits], n, k, group_size, layout, bits))
        for tokens in (1, 3, 19):
            x = placed(torch.randn(tokens, k, generator=torch.Generator().manual_seed(tokens)), at_end=at_end)
            arguments = {"bits": bits, "n": n, "group_size": group_size, "layout": layout}
            assert_near(ops.lowbit_gemm(x, qweight, meta, **arguments),
                        reference.lowbit_gemm(x, qweight, meta, **arguments))


@ENDS
@pytest.mark.parametrize("bits", WIDTHS)
def test_products_with_experts(bits: int, at_end: bool) -> None:
    """The last expert's matrix ends where the buffers do; some slots are outside the experts."""
    hidden, intermediate = 96, 64
    def stack(n: int, k: int, seed: int) -> list[Tensor]:
        return [placed(t, at_end=at_end) for t in random_stack([3, 0, bits], n, k, 32, "cpu_tile", seed)]

    gate_up, down = stack(2 * intermediate, hidden, 0), stack(hidden, intermediate, 1)
    for tokens in (1, 2, 21):
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(-1, 4, (tokens, 2), generator=generator)
        ids[-1, -1] = 2
        x, weights = torch.randn(tokens, hidden, generator=generator), torch.rand(tokens, 2, generator=generator)
        x, ids, weights = (placed(t, at_end=at_end) for t in (x, ids, weights))
        gemm = {"n": 2 * intermediate, "group_size": 32, "layout": "cpu_tile"}
        assert_near(ops.moe_lowbit_gemm(x, *gate_up, ids, weights, **gemm),
                    reference.moe_lowbit_gemm(x, *gate_up, ids, weights, **gemm))
        ffn = {"intermediate": intermediate, "group_size": 32, "layout": "cpu_tile"}
        assert_near(ops.moe_lowbit_ffn(x, gate_up, down, ids, weights, **ffn),
                    reference.moe_lowbit_ffn(x, gate_up, down, ids, weights, **ffn))
