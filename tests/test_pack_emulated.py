"""The CUDA kernels of pack, unpack, dequantize, repack and GPTQ's descent without a GPU: their bodies and plans run on
the host, block by block and thread by thread, bit-exact with the reference (descent: up to ties) and inside their
buffers. An access of 16 bytes at an address that is not a multiple of 16 fails, as it would on the device."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from comparing import output_error
from hypothesis import given, settings
from hypothesis import strategies as st
from test_core_bits import DTYPES, LAYOUTS, WIDTHS, Guarded, random_bytes, random_meta

from gemq import format as fmt
from gemq import reference
from gemq._core import core
from gemq.reference.grid import dequantize_codes, round_to_nearest

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
TILE = 8192  # codes of a block


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("emulated") / "emulate_pack.so"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    checks = os.environ.get("GEMQ_SANITIZE")  # set by `make sanitize`
    flags = [f"-fsanitize={checks}", "-fno-sanitize-recover=all", "-g"] if checks else []
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", *flags, *includes, "-o", str(target)]
    subprocess.run([*command, str(ROOT / "tests/emulate_pack.cpp")], check=True)
    return ctypes.CDLL(str(target))


def call(function: Callable, *args: object, first: int = 0) -> int:
    """Run the plan's blocks from ``first`` on; returns how many blocks it has in all."""
    function.restype = ctypes.c_int64
    sized = [ctypes.c_int64(a.data_ptr() if isinstance(a, torch.Tensor) else a) for a in args]
    blocks = function(*sized, ctypes.c_int64(first))
    assert blocks >= 0, "a 16-byte access was not aligned"
    return blocks


def placed(t: torch.Tensor, shift: int, fill: int = 0xA5) -> torch.Tensor:
    """A copy whose address is ``shift`` bytes past a multiple of 16, with ``fill`` on both sides."""
    guarded = Guarded(tuple(t.shape), t.dtype, shift, fill)
    guarded.tensor.copy_(t)
    return guarded.tensor


def empty(shape: tuple[int, ...], dtype: torch.dtype, shift: int) -> Guarded:
    return Guarded(shape, dtype, shift)


def test_the_buffers_of_these_tests_are_where_they_say() -> None:
    for shift in (0, 2, 5):
        assert Guarded((7,), torch.uint8, shift).tensor.data_ptr() % 16 == shift


def test_four_codes_at_once(kernels: ctypes.CDLL) -> None:
    """Every pair of neighbouring bytes, and every byte in every place."""
    kernels.check_fours.argtypes = [ctypes.c_uint32]
    for value in range(1 << 16):
        assert kernels.check_fours(value | (~value & 0xFFFF) << 16) == 0
    for place in range(4):
        for value in range(256):
            assert kernels.check_fours(value << 8 * place) == 0


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_descent_by_a_thread_a_row(kernels: ctypes.CDLL, group: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(10 * group + bits)
    rows, x = 70, torch.randn(3 * group, group, generator=generator)
    hessian = x.T @ x
    weight = torch.randn(rows, group, generator=generator) * 0.03
    codes, meta = round_to_nearest(weight, bits, group)
    products = (weight - dequantize_codes(codes, meta)) @ hessian
    found = codes.clone()
    call(kernels.emulate_descend, products, hessian, meta, found, rows, group, bits)
    given = (products, hessian, codes, meta[:, 0])
    expected = reference.descend_codes(*(t[None] for t in given), torch.tensor([bits]))
    # a tie in float32 may go either way, and takes what follows in its row with it
    assert (found == expected[0]).all(-1).double().mean() > 0.9
    error = output_error(weight, hessian, found, meta)
    assert error == pytest.approx(output_error(weight, hessian, expected[0], meta), rel=1e-3)
    assert error < output_error(weight, hessian, codes, meta)


# k: odd, rows of whole bytes, of whole words; sizes around a vector, a tile and several tiles
SHAPES = [(1, 1), (3, 7), (5, 33), (1, 8), (3, 40), (1, 16), (2, 24), (7, 96), (1, TILE), (1, TILE - 8), (1, TILE + 8),
          (3, 8 * 1025), (17, 1408)]  # fmt: skip


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shifts", [(0, 0), (0, 1), (3, 0), (8, 4)])
def test_pack_and_unpack(kernels: ctypes.CDLL, bits: int, shifts: tuple[int, int]) -> None:
    for rows, k in SHAPES:
        codes = placed(random_bytes(rows, k, seed=k), shifts[0])
        packed = empty((rows, fmt.row_bytes(k, bits)), torch.uint8, shifts[1])
        blocks = call(kernels.emulate_pack, codes, packed.tensor, rows, k, bits)
        packed.check()
        assert torch.equal(packed.tensor, reference.pack(codes, bits)), (rows, k)
        vectors = k % 8 == 0 and shifts == (0, 0)
        assert blocks == (-(-rows * k // TILE) if vectors else -(-rows * -(-k // 8) // 128))
        again = empty((rows, k), torch.uint8, shifts[0])
        call(kernels.emulate_unpack, packed.tensor, again.tensor, rows, k, bits)
        again.check()
        assert torch.equal(again.tensor, codes & ((1 << bits) - 1)), (rows, k)


@given(
    bits=st.sampled_from(WIDTHS), rows=st.integers(1, 5), k=st.integers(1, 4000), seed=st.integers(0, 1 << 30),
    shifts=st.tuples(st.sampled_from([0, 0, 0, 1, 4]), st.sampled_from([0, 0, 0, 2, 8])),
)
@settings(max_examples=60, deadline=None)
def test_any_pack_is_the_extension_s(
    kernels: ctypes.CDLL, bits: int, rows: int, k: int, seed: int, shifts: tuple[int, int]
) -> None:
    codes = placed(random_bytes(rows, k, seed=seed), shifts[0])
    ours, theirs = empty((rows, fmt.row_bytes(k, bits)), torch.uint8, shifts[1]), torch.empty(0)
    theirs = torch.empty(rows, fmt.row_bytes(k, bits), dtype=torch.uint8)
    call(kernels.emulate_pack, codes, ours.tensor, rows, k, bits)
    core().pack(device=0, src=codes.data_ptr(), dst=theirs.data_ptr(), rows=rows, k=k, bits=bits)
    ours.check()
    assert torch.equal(ours.tensor, theirs)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", fmt.GROUP_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(kernels: ctypes.CDLL, bits: int, group_size: int, dtype: torch.dtype) -> None:
    for rows, groups in ((1, 1), (5, 3), (3, TILE // group_size + 1), (3, 2 * TILE // group_size // 3)):
        k = groups * group_size
        packed, meta = random_bytes(rows, fmt.row_bytes(k, bits), seed=bits), random_meta(rows, groups, seed=groups)
        expected = reference.dequantize(packed, meta, bits, k, group_size, dtype)
        for shifts in ((0, 0, 0), (1, 0, 0), (0, 2, 0), (0, 0, 4)):
            if sum(shifts) and rows * k > TILE:
                continue
            out = empty((rows, k), dtype, shifts[2])
            given_packed, given_meta = placed(packed, shifts[0]), placed(meta, shifts[1])
            index = DTYPES.index(dtype)
            call(kernels.emulate_dequantize, given_packed, given_meta, out.tensor, rows, k, bits, group_size, index)
            out.check()
            assert torch.equal(out.tensor, expected), (rows, k, shifts)


REPACKED = [(1, 32, 32), (16, 128, 64), (45, 384, 128), (65, 768, 64), (130, 1408, 128), (33, 1056, 32), (20, 2112, 64)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shifts", [(0, 0), (4, 2), (0, 4)], ids=str)
def test_repack_both_ways(kernels: ctypes.CDLL, layout: str, bits: int, shifts: tuple[int, int]) -> None:
    """``shifts``: of all codes and of all metadata."""
    for n, k, group_size in REPACKED:
        packed, meta = random_bytes(n, fmt.row_bytes(k, bits), seed=k), random_meta(n, k // group_size, seed=n)
        tile, tile_meta = reference.to_layout(packed, meta, bits, k, group_size, layout)
        for inverse in (False, True):
            source = (tile, tile_meta) if inverse else (packed.flatten(), meta.flatten())
            wanted = (packed.flatten(), meta.flatten()) if inverse else (tile, tile_meta)
            outs = [empty(tuple(w.shape), w.dtype, shift) for w, shift in zip(wanted, shifts, strict=True)]
            given_source = [placed(s, shift) for s, shift in zip(source, shifts, strict=True)]
            call(
                kernels.emulate_repack, *given_source, *(o.tensor for o in outs), n, k, bits, group_size,
                LAYOUTS[layout], inverse,
            )
            for out, want in zip(outs, wanted, strict=True):
                out.check()
                assert torch.equal(out.tensor, want), (n, k, group_size, inverse)


def address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def sparse(size: int) -> mmap.mmap:
    """Address space without memory: only pages that are touched exist."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000))


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_indices_are_64_bits_wide(kernels: ctypes.CDLL, bits: int) -> None:
    """The last blocks of a matrix of more than 2 ** 32 codes, in address space that is mostly not there."""
    rows, k = (1 << 20) + 1, 4096
    total = rows * k
    assert total > 1 << 32
    source, target = sparse(total), sparse(total * bits // 8)
    size = 3 * 4096
    end = torch.frombuffer(source, dtype=torch.uint8)[total - size :]
    end.copy_(random_bytes(size, seed=bits))
    blocks = -(-total // TILE)
    assert call(kernels.emulate_pack, address(source), address(target), rows, k, bits, first=blocks - 1) == blocks
    packed = torch.frombuffer(target, dtype=torch.uint8)[-4096 * bits // 8 :]
    assert torch.equal(packed, reference.pack(end[-4096:].view(1, -1), bits)[0])
    end.zero_()
    call(kernels.emulate_unpack, address(target), address(source), rows, k, bits, first=blocks - 1)
    assert torch.equal(reference.pack(end[-4096:].view(1, -1), bits)[0], packed)
    assert end[-4096:].any()
