"""pack, unpack, dequantize and repack of the extension: bit-exact with the reference, and inside their buffers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gemq import format as fmt
from gemq import reference
from gemq._core import core

WIDTHS = range(1, 9)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = {"cpu_tile": 1, "gpu_tile": 2}
GUARD = 64


class Guarded:
    """A tensor with sentinel bytes on both sides; ``check`` fails if a kernel wrote outside it."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, shift: int = 0, fill: int = 0xA5) -> None:
        size = torch.empty(shape, dtype=dtype, device="meta").nbytes
        self.bytes = torch.full((size + 2 * GUARD + shift,), fill, dtype=torch.uint8)
        self.start, self.end, self.fill = GUARD + shift, GUARD + shift + size, fill
        body = self.bytes[self.start : self.end]
        self.tensor = body.view(shape) if dtype == torch.uint8 else body.view(dtype).view(shape)

    def check(self) -> None:
        assert (self.bytes[: self.start] == self.fill).all(), "bytes before the buffer were written"
        assert (self.bytes[self.end :] == self.fill).all(), "bytes after the buffer were written"


def random_bytes(*shape: int, seed: int) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def random_meta(n: int, groups: int, seed: int) -> Tensor:
    return torch.randn(n, groups, 2, generator=torch.Generator().manual_seed(seed)).to(torch.float16)


def run_pack(codes: Tensor, bits: int, *, threads: int = 1, shift: int = 0) -> Tensor:
    rows, k = codes.shape
    out = Guarded((rows, fmt.row_bytes(k, bits)), torch.uint8, shift)
    core().pack(
        device=0, src=codes.data_ptr(), dst=out.tensor.data_ptr(), rows=rows, k=k, bits=bits, threads=threads
    )
    out.check()
    return out.tensor


def run_unpack(packed: Tensor, bits: int, k: int, *, threads: int = 1, shift: int = 0) -> Tensor:
    out = Guarded((packed.shape[0], k), torch.uint8, shift)
    core().unpack(
        device=0, src=packed.data_ptr(), dst=out.tensor.data_ptr(), rows=packed.shape[0], k=k, bits=bits,
        threads=threads,
    )
    out.check()
    return out.tensor


def run_repack(
    codes: Tensor, meta: Tensor, bits: int, n: int, k: int, group_size: int, layout: str, *, inverse: bool, threads: int
) -> tuple[Tensor, Tensor]:
    target = "canonical" if inverse else layout
    out = Guarded((fmt.codes_bytes(n, k, bits, target),), torch.uint8)
    out_meta = Guarded((fmt.meta_elements(n, k, bits, group_size, target),), torch.float16)
    core().repack(
        device=0, src_codes=codes.data_ptr(), src_meta=meta.data_ptr(), dst_codes=out.tensor.data_ptr(),
        dst_meta=out_meta.tensor.data_ptr(), n=n, k=k, bits=bits, group_size=group_size, layout=LAYOUTS[layout],
        inverse=inverse, threads=threads,
    )
    out.check()
    out_meta.check()
    return out.tensor, out_meta.tensor


@given(
    bits=st.sampled_from(WIDTHS), rows=st.integers(1, 7), k=st.integers(1, 300), seed=st.integers(0, 1 << 30),
    threads=st.integers(1, 3), shift=st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_pack_and_unpack_match_the_reference(
    bits: int, rows: int, k: int, seed: int, threads: int, shift: int
) -> None:
    codes = random_bytes(rows, k, seed=seed)  # bits above the width must be dropped
    packed = run_pack(codes, bits, threads=threads, shift=shift)
    assert torch.equal(packed, reference.pack(codes, bits))
    again = run_unpack(packed, bits, k, threads=threads, shift=shift)
    assert torch.equal(again, codes & ((1 << bits) - 1))


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_in_every_position(bits: int) -> None:
    codes = (torch.arange(1 << bits)[:, None] + torch.arange(41)).remainder(1 << bits).to(torch.uint8)
    packed = run_pack(codes, bits)
    assert torch.equal(packed, reference.pack(codes, bits))
    assert torch.equal(run_unpack(packed, bits, 41), codes)


def test_the_example_of_the_format() -> None:
    packed = run_pack(torch.tensor([[5, 1, 6]], dtype=torch.uint8), 3)
    assert packed.tolist() == [[0b10001101, 0b00000001]]


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_source_may_end_where_its_last_code_does(bits: int) -> None:
    """Whatever lies behind the source changes nothing: the bytes there are not read into the result."""
    for k in (1, 7, 9, 31, 33):
        results = []
        for fill in (0x00, 0xFF):
            source = Guarded((3, k), torch.uint8, fill=fill)
            source.tensor.copy_(random_bytes(3, k, seed=k))
            results.append(run_pack(source.tensor, bits))
        assert torch.equal(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("group_size", fmt.GROUP_SIZES)
def test_dequantize_matches_the_reference(bits: int, group_size: int, dtype: torch.dtype) -> None:
    rows, k = 5, 3 * group_size
    packed = random_bytes(rows, fmt.row_bytes(k, bits), seed=bits)
    meta = random_meta(rows, 3, seed=group_size)
    for shift in (0, 4):
        out = Guarded((rows, k), dtype, shift)
        core().dequantize(
            device=0, src=packed.data_ptr(), meta=meta.data_ptr(), dst=out.tensor.data_ptr(), rows=rows, k=k, bits=bits,
            group_size=group_size, out_dtype=DTYPES.index(dtype), threads=2,
        )
        out.check()
        assert torch.equal(out.tensor, reference.dequantize(packed, meta, bits, k, group_size, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_finite_half_converts_and_rounds_as_in_torch(dtype: torch.dtype) -> None:
    """All float16 scales (subnormals too), times codes 0..255, rounded to each output type."""
    halves = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()]
    codes = torch.arange(halves.numel() * 32).remainder(251).to(torch.uint8).view(-1, 32)
    meta = torch.stack([halves, halves.flip(0)], -1)[:, None].contiguous()
    out = torch.empty(halves.numel(), 32, dtype=dtype)
    core().dequantize(
        device=0, src=codes.data_ptr(), meta=meta.data_ptr(), dst=out.data_ptr(), rows=halves.numel(), k=32, bits=8,
        group_size=32, out_dtype=DTYPES.index(dtype),
    )
    assert torch.equal(out, reference.dequantize(codes, meta, 8, 32, 32, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize(
    ("n", "k", "group_size"), [(1, 32, 32), (16, 128, 64), (45, 384, 128), (65, 768, 64), (130, 1408, 128)]
)
def test_repack_matches_the_reference_both_ways(layout: str, bits: int, n: int, k: int, group_size: int) -> None:
    packed = random_bytes(n, fmt.row_bytes(k, bits), seed=bits)
    meta = random_meta(n, k // group_size, seed=n)
    tile, tile_meta = reference.to_layout(packed, meta, bits, k, group_size, layout)
    ours = run_repack(packed, meta, bits, n, k, group_size, layout, inverse=False, threads=2)
    assert torch.equal(ours[0], tile)
    assert torch.equal(ours[1], tile_meta)
    back = run_repack(tile, tile_meta, bits, n, k, group_size, layout, inverse=True, threads=2)
    assert torch.equal(back[0].view_as(packed), packed)
    assert torch.equal(back[1].view_as(meta), meta)


def test_nothing_to_do_needs_no_buffers() -> None:
    core().pack(**PACK | {"src": 0, "dst": 0, "rows": 0})
    core().unpack(**PACK | {"src": 0, "dst": 0, "rows": 0})
    core().dequantize(**DEQUANTIZE | {"src": 0, "meta": 0, "dst": 0, "rows": 0})
    core().repack(**REPACK | {"src_codes": 0, "src_meta": 0, "dst_codes": 0, "dst_meta": 0, "n": 0})


BUFFER = torch.zeros(4096, dtype=torch.uint8)
AT = BUFFER.data_ptr()
# good arguments
PACK = {"device": 0, "src": AT, "dst": AT, "rows": 1, "k": 8, "bits": 4}
DEQUANTIZE = PACK | {"meta": AT, "k": 64, "group_size": 64, "out_dtype": 0}
REPACK = {
    "device": 0, "src_codes": AT, "src_meta": AT, "dst_codes": AT, "dst_meta": AT, "n": 1, "k": 64, "bits": 4,
    "group_size": 64, "layout": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.pack(**PACK | {"bits": 0}), r"bits must be in 1\.\.8, got 0"),
        (lambda c: c.pack(**PACK | {"bits": 9}), r"bits must be in 1\.\.8, got 9"),
        (lambda c: c.unpack(**PACK | {"bits": -1}), r"bits must be in 1\.\.8, got -1"),
        (lambda c: c.pack(**PACK | {"device": 2}), r"device must be 0 \(CPU\) or 1 \(CUDA\), got 2"),
        (lambda c: c.pack(**PACK | {"src": 0}), "src must be an address, got a null pointer"),
        (lambda c: c.unpack(**PACK | {"dst": 0}), "dst must be an address, got a null pointer"),
        (lambda c: c.pack(**PACK | {"rows": -1}), "rows must be at least 0, got -1"),
        (lambda c: c.pack(**PACK | {"k": 0}), "k must be at least 1, got 0"),
        (lambda c: c.pack(**PACK | {"threads": 0}), r"threads must be in 1\.\.1024, got 0"),
        (lambda c: c.dequantize(**DEQUANTIZE | {"meta": 0}), "meta must be an address"),
        (lambda c: c.dequantize(**DEQUANTIZE | {"group_size": 48}), "group_size must be 32, 64 or 128, got 48"),
        (lambda c: c.dequantize(**DEQUANTIZE | {"k": 96}), "k must be a positive multiple of group_size"),
        (lambda c: c.dequantize(**DEQUANTIZE | {"out_dtype": 3}), "out_dtype must be 0 .* got 3"),
        (lambda c: c.dequantize(**DEQUANTIZE | {"meta": AT + 1}), "meta must be aligned to 2 bytes"),
        (lambda c: c.repack(**REPACK | {"layout": 0}), r"layout must be 1 .* got 0"),
        (lambda c: c.repack(**REPACK | {"bits": 9}), r"bits must be in 1\.\.8, got 9"),
        (lambda c: c.repack(**REPACK | {"dst_codes": 0}), "dst_codes must be an address"),
        (lambda c: c.repack(**REPACK | {"device": 1, "src_codes": AT + 1}), "src_codes must be aligned to 4"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(core())


@pytest.mark.parametrize("wrong, message", [
    ({"bits": None}, r"pack\(\): bits must be an integer, got None"),
    ({"bits": 4.0}, r"bits must be an integer, got 4\.0"), ({"bits": 1 << 31}, "bits must be an integer of 32 bits"),
    ({"src": -1}, "src must be an address, got -1"), ({"width": 4}, "no argument is named width"),
])  # fmt: skip
def test_arguments_are_given_by_name_and_type(wrong: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        core().pack(**PACK | wrong)


def test_no_argument_is_left_out_or_given_by_its_place() -> None:
    with pytest.raises(TypeError, match=r"pack\(\): argument rows is missing"):
        core().pack(**{name: value for name, value in PACK.items() if name != "rows"})
    with pytest.raises(TypeError, match=r"pack\(\): arguments are given by name"):
        core().pack(*PACK.values())
    with pytest.raises(TypeError, match="inverse must be a bool, got 1"):
        core().repack(**REPACK | {"inverse": 1})


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine where CUDA cannot run")
def test_cuda_without_a_gpu_is_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match=r"CUDA|cuda"):
        core().pack(**PACK | {"device": 1, "k": 64})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", WIDTHS)
def test_cuda_matches_the_cpu(bits: int) -> None:
    c, stream = core(), torch.cuda.current_stream().cuda_stream
    for rows, k in ((3, 1), (5, 33), (7, 48), (9, 256), (70, 1408)):
        codes = random_bytes(rows, k, seed=k).cuda()
        packed = torch.empty(rows, fmt.row_bytes(k, bits), dtype=torch.uint8, device="cuda")
        c.pack(1, codes.data_ptr(), packed.data_ptr(), rows, k, bits, 1, stream)
        assert torch.equal(packed.cpu(), reference.pack(codes.cpu(), bits))
        again = torch.empty_like(codes)
        c.unpack(1, packed.data_ptr(), again.data_ptr(), rows, k, bits, 1, stream)
        assert torch.equal(again, codes & ((1 << bits) - 1))
        if k % 128:
            continue
        meta = random_meta(rows, k // 128, seed=rows).cuda()
        for index, dtype in enumerate(DTYPES):
            wide = torch.empty(rows, k, dtype=dtype, device="cuda")
            c.dequantize(1, packed.data_ptr(), meta.data_ptr(), wide.data_ptr(), rows, k, bits, 128, index, 1, stream)
            assert torch.equal(wide.cpu(), reference.dequantize(packed.cpu(), meta.cpu(), bits, k, 128, dtype))
        for layout, number in LAYOUTS.items():
            want = reference.to_layout(packed.cpu(), meta.cpu(), bits, k, 128, layout)
            tile, tile_meta = (torch.empty_like(t, device="cuda") for t in want)
            args = (rows, k, bits, 128, number)
            c.repack(
                1, packed.data_ptr(), meta.data_ptr(), tile.data_ptr(), tile_meta.data_ptr(), *args, False, 1, stream
            )
            assert torch.equal(tile.cpu(), want[0])
            assert torch.equal(tile_meta.cpu(), want[1])
            back, back_meta = torch.empty_like(packed), torch.empty_like(meta)
            c.repack(
                1, tile.data_ptr(), tile_meta.data_ptr(), back.data_ptr(), back_meta.data_ptr(), *args, True, 1, stream
            )
            assert torch.equal(back, packed)
            assert torch.equal(back_meta, meta)
