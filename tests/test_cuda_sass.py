"""Read the machine code that nvcc makes of the pack and GPTQ kernels for sm_90; nothing runs."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
try:
    import sass_cuda
finally:
    sys.path.pop(0)

pytestmark = [
    pytest.mark.skipif(sass_cuda.nvcc() is None, reason="needs nvcc"),
    pytest.mark.skipif(sass_cuda.cuobjdump() is None, reason="needs cuobjdump"),
]

WIDTHS = range(1, 9)
OUTPUTS = ("Float32", "Float16", "BFloat16")
CODES = [f"{body}<{bits}>" for body in ("PackTile", "UnpackTile") for bits in WIDTHS]
CODES += [f"DequantizeTile<{bits}, {out}>" for bits, out in itertools.product(WIDTHS, OUTPUTS)]
REPACK = [f"{way}{tile}Tile<{bits}>" for way in ("To", "From") for tile in ("Cpu", "Gpu") for bits in WIDTHS]
META = [f"RepackMeta<{layout}, {inverse}>" for layout in (1, 2) for inverse in ("false", "true")]
VECTORS = [*CODES, *REPACK, *META]
EDGES = [f"{body}<{bits}>" for body in ("PackAny", "UnpackAny") for bits in WIDTHS]
ROWS = ["quantize_rows", "descend_rows"]
EDGES += [f"DequantizeAny<{bits}, {out}>" for bits, out in itertools.product(WIDTHS, OUTPUTS)] + ["RepackMetaAny"]


@pytest.fixture(scope="module")
def kernels() -> dict[str, sass_cuda.Kernel]:
    return {kernel.name: kernel for kernel in sass_cuda.report()}


def test_these_are_all_the_kernels(kernels: dict[str, sass_cuda.Kernel]) -> None:
    assert set(kernels) == {*VECTORS, *EDGES, *ROWS}


def test_nothing_spills_or_lives_in_local_memory(kernels: dict[str, sass_cuda.Kernel]) -> None:
    assert not {k.name: (k.spills, k.local) for k in kernels.values() if k.spills or k.local}


def test_every_vector_kernel_loads_and_stores_16_bytes(kernels: dict[str, sass_cuda.Kernel]) -> None:
    without = [name for name in VECTORS if not (kernels[name].loads.get(128) and kernels[name].stores.get(128))]
    assert not without


def test_other_widths_serve_ends_only(kernels: dict[str, sass_cuda.Kernel]) -> None:
    """Byte accesses for the last vector of a matrix, words for rows that are not whole vectors; nothing between."""
    for name in CODES:
        assert set(kernels[name].loads) <= {8, 128}, name
        assert set(kernels[name].stores) <= {8, 128}, name
    for name in (*REPACK, *META):
        assert set(kernels[name].loads) <= {32, 128}, name
        assert set(kernels[name].stores) <= {32, 128}, name


def test_threads_keep_several_loads_in_flight(kernels: dict[str, sass_cuda.Kernel]) -> None:
    """A thread has four vectors of its own where codes are bytes; text with and without a tail counts twice."""
    for bits in WIDTHS:
        assert kernels[f"PackTile<{bits}>"].loads[128] == 2 * 4
        assert kernels[f"UnpackTile<{bits}>"].stores[128] == 2 * 4
        assert kernels[f"UnpackTile<{bits}>"].loads[128] == 2 * -(-bits // 2)
        assert kernels[f"ToGpuTile<{bits}>"].loads[128] >= 3


def test_registers_and_shared_memory_leave_room_for_many_blocks(kernels: dict[str, sass_cuda.Kernel]) -> None:
    """Of 64 K registers and 227 KB an SM: 12 blocks of 128 threads for the streams, 6 for a repack."""
    for name in (*CODES, *REPACK, *META):
        kernel, blocks = kernels[name], 12 if name in CODES else 6
        assert kernel.registers * 128 * blocks <= 65536, (name, kernel.registers)
        assert kernel.shared * blocks <= 227 << 10, (name, kernel.shared)


def test_instructions_leave_the_streams_to_memory(kernels: dict[str, sass_cuda.Kernel]) -> None:
    """Even if a thread, for its 64 codes, ran all of a kernel's text: 132 SMs of 128 lanes at 1.7 GHz issue 9.5
    instructions for each byte of 3 TB/s."""
    for bits in WIDTHS:
        moved = 64 * (1 + bits / 8)
        for name in (f"PackTile<{bits}>", f"UnpackTile<{bits}>"):
            assert kernels[name].instructions <= 9.5 * moved, name


def test_one_bit_spans_take_about_an_instruction_a_code(kernels: dict[str, sass_cuda.Kernel]) -> None:
    """512 codes a trip; a copy's budget is 2.4 a code."""
    for name in ("ToGpuTile<1>", "FromGpuTile<1>"):
        assert 0 < kernels[name].loop <= 1.2 * 512, name


def test_names_are_read() -> None:
    name = "_ZN4gemq11body_kernelINS_14DequantizeTileILi3ENS_8BFloat16EEEEEvNT_4ArgsE"
    assert sass_cuda.readable(name) == "DequantizeTile<3, BFloat16>"
    assert sass_cuda.readable("_ZN4gemq11body_kernelINS_13RepackMetaAnyEEEvNT_4ArgsE") == "RepackMetaAny"
