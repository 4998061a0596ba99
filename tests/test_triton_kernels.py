"""The Triton kernels without a GPU: their cases in the interpreter, the launch tables, and compilation for sm_90.

The interpreter is chosen when triton is imported and cannot compile, so its cases run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def test_cases_in_the_interpreter():
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / "triton_cases.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_layout_mirrors_the_format():
    from gemq import format as fmt
    from gemq.triton_kernels import layout

    for bits in layout.WIDTHS:
        assert layout.FIELDS[bits] == fmt.GPU_FIELDS[bits]
        for k in range(32, 4096, 32):
            assert layout.words_along_k(k, bits) == fmt.gpu_kw(k, bits)
            spans, span = fmt.gpu_spans(k, bits)
            assert spans * span <= layout.padded_columns(k) - layout.LARGEST_SPAN
    assert layout.ROWS == fmt.GPU_ROWS


def test_launch_tables():
    from gemq.triton_kernels import tuning

    assert tuning.table_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
    assert tuning.table("a device nobody has") == tuning.table("default")
    assert tuning.is_decode("default", 16) and not tuning.is_decode("default", 17)
    few = tuning.decode_launch("default", "gemm", 8, 8, 2, 4096, 14336)
    many = tuning.decode_launch("default", "gemm", 9, 8, 2, 4096, 14336)
    assert (few.columns, many.columns) == (8, 16)
    assert tuning.decode_launch("default", "gemm", 1, 8, 2, 4096, 14336).splits > 1
    assert tuning.decode_launch("default", "gemm", 1, 8, 2, 64, 128).splits == 1
    assert tuning.decode_launch("default", "ffn", 1, 8, 2, 14336, 4096).splits == 1
    assert tuning.prefill_launch("default", 512, 8, 2).columns in (16, 32)


@pytest.mark.parametrize("tokens, top_k, experts, columns", [(1, 2, 8, 8), (16, 8, 60, 16), (40, 6, 4, 16)])
def test_blocks_fit_the_static_bound(tokens, top_k, experts, columns):
    """By sorting, the path that needs no interpreter: every pair once, one expert a block, within the bound."""
    from gemq.triton_kernels import routing

    ids = torch.randint(-1, experts + 2, (tokens * top_k,))
    blocks = routing.block_count(ids.numel(), experts, columns)
    expert, pairs = routing._route_by_sorting(ids, experts, columns, blocks)
    assert expert.shape == (blocks,) and pairs.shape == (blocks, columns)
    assert sorted(pairs[pairs >= 0].tolist()) == list(range(ids.numel()))
    valid = torch.where((ids < 0) | (ids >= experts), experts, ids)
    for e, row in zip(expert.tolist(), pairs, strict=True):
        assert all(valid[p] == e for p in row[row >= 0])
        assert (e >= 0) == bool((row >= 0).any())


@pytest.fixture(scope="module")
def sass_report():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter cannot compile")
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    try:
        import sass_report
    finally:
        sys.path.pop(0)
    return sass_report


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("bits, most", [(1, 1.5), (2, 1.6), (3, 2.1), (4, 2.1)])
def test_decode_loop_for_sm90(sass_report, bits, most):
    """Packed weights come 16 bytes a lane, nothing spills, and the loop stays near its instruction count."""
    row = sass_report.variant(bits, 8, 2, 1, 4, False)
    assert row.spills == 0
    assert row.global_loads.get("128", 0) >= 8
    assert row.per_weight <= most


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    "columns, mode, parts", [(8, 2, 2), (16, 1, 1), (8, 0, 1)], ids=["decode-gate-up", "prefill", "plain"]
)
def test_mixed_kernels_compile_for_sm90(sass_report, columns, mode, parts):
    row = sass_report.variant(-1, columns, mode, parts, 4, False)
    assert row.registers <= 255 and row.loop > 0


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_arguments_of_one_compile(sass_report):
    """triton turns integer arguments that are 1 into constants, which have fewer methods."""
    ones = ("rows", "pairs", "row_pairs", "experts", "n")
    assert sass_report.variant(2, 8, 2, 1, 4, False, ones=ones).loop > 0


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_small_kernels_compile_for_sm90(sass_report):
    from gemq.triton_kernels.activations import combine_kernel, normalize_kernel
    from gemq.triton_kernels.routing import route_kernel

    cases = (
        (route_kernel, {"ids_ptr": "*i64", "expert_ptr": "*i32", "pairs_ptr": "*i32"}, {"P": 16, "COLUMNS": 8}),
        (
            normalize_kernel, {"x_ptr": "*bf16", "out_ptr": "*fp16", "sums_ptr": "*fp32", "inverse_ptr": "*fp32"},
            {"KW1": 16, "KW2": 16, "KW3": 16, "KW4": 16, "GROUP": 128, "CHUNK": 512, "BLOCK": 4096, "SCALED": True},
        ),
        (
            combine_kernel, {"partial_ptr": "*fp32", "ids_ptr": "*i64", "weights_ptr": "*fp32", "out_ptr": "*bf16"},
            {"SLOTS": 2, "SPLITS": 3, "WEIGHTED": True, "BLOCK": 1024},
        ),
    )
    for kernel, pointers, constants in cases:
        ones = {a: 1 for a in ("rows", "pairs", "n", "experts", "BLOCKS") if a in kernel.arg_names}
        assert sass_report.compile_kernel(kernel, pointers, constants | ones, 4).asm["cubin"]
        assert sass_report.compile_kernel(kernel, pointers, constants, 4).asm["cubin"]
