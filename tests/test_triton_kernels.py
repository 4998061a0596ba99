"""The Triton kernels without a GPU: their cases in the interpreter, the launch tables, and compilation for sm_90.

The interpreter is chosen when triton is imported and cannot compile, so its cases run in a process of their own.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_cases_in_the_interpreter(chosen):
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", chosen,
               str(HERE / "triton_cases.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_layout_mirrors_the_format():
    from gemq import format as fmt
    from gemq.triton_kernels import layout

    for bits in layout.WIDTHS:
        assert layout.fields(bits) == fmt.GPU_FIELDS[bits]
        assert layout.word_blocks(bits) == fmt.GPU_WORDS[bits]
        for k in range(32, 4096, 32):
            assert layout.words_along_k(k, bits) == fmt.gpu_kw(k, bits)
            spans, span = fmt.gpu_spans(k, bits)
            assert spans * span <= layout.padded_columns(k) - layout.LARGEST_SPAN
    assert layout.ROWS == fmt.GPU_ROWS


@pytest.mark.parametrize("rows", [32, pytest.param(128, marks=pytest.mark.slow)])
def test_the_height_of_a_tile_is_one_line(rows, tmp_path):
    """With that line of layout.py edited, kernels and launchers compute the same from tiles of another height."""
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    command = [sys.executable, str(HERE / "tile_rows.py"), str(rows), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_launch_tables():
    from gemq.triton_kernels import launch_parameters

    assert launch_parameters.table_name("NVIDIA H100 80GB HBM3") == "nvidia_h100_80gb_hbm3"
    assert launch_parameters.table("a device nobody has") == launch_parameters.table("default")
    assert launch_parameters.is_decode("default", 16) and not launch_parameters.is_decode("default", 17)
    few = launch_parameters.decode_launch("default", "gemm", 8, 8, 2, 4096, 14336)
    many = launch_parameters.decode_launch("default", "gemm", 9, 8, 2, 4096, 14336)
    assert (few.columns, many.columns) == (8, 16)
    assert launch_parameters.decode_launch("default", "gemm", 1, 8, 2, 4096, 14336).splits > 1
    assert launch_parameters.decode_launch("default", "gemm", 1, 8, 2, 64, 128).splits == 1
    assert launch_parameters.decode_launch("default", "ffn", 1, 8, 2, 14336, 4096).splits == 1
    # gate and up of two tiles need a warp each; few programs get more
    assert launch_parameters.decode_launch("default", "ffn", 1, 8, 2, 14336, 4096, 2).warps == 4
    assert launch_parameters.decode_launch("default", "ffn", 1, 128, 8, 768, 2048, 2).warps == 8
    assert launch_parameters.prefill_launch("default", 512, 8, 2, 14336, 4096).columns == 128


@pytest.mark.parametrize("tokens, top_k, experts, columns", [(1, 2, 8, 8), (16, 8, 60, 16), (40, 6, 4, 16)])
def test_blocks_fit_the_static_bound(tokens, top_k, experts, columns):
    """By sorting, the path that needs no interpreter: every pair once, one expert a block, within the bound."""
    from gemq.triton_kernels import blocks_by_counting
    from gemq.triton_kernels.blocks import block_count

    ids = torch.randint(-1, experts + 2, (tokens * top_k,))
    blocks = block_count(ids.numel(), experts, columns)
    expert, pairs = blocks_by_counting.route_by_sorting(ids, experts, columns, blocks)
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


# instructions a weight that the decode loop may take at 8 and 16 token columns, all kernels, by width
BUDGET = {8: {1: 1.6, 2: 1.7, 3: 2.3, 4: 2.2}, 16: {1: 2.0, 2: 2.15, 3: 2.7, 4: 2.5}}
# compiled on every run of the suite; the others are slow
QUICK = (("gate_up", 2, 8), ("product", 3, 16), ("product", 4, 8))
# what moves data between threads
EXCHANGES = ("BAR", "SHFL", "STS", "LDS")
# triton 3.7 moves operands between lanes: its kernels compile and are slower, and are held to no budget
BUDGETED = tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) >= (3, 8)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("kernel, bits, columns", [
    pytest.param(kernel, bits, columns, marks=[pytest.mark.slow] * ((kernel, bits, columns) not in QUICK))
    for kernel in ("gate_up", "product") for bits in (1, 2, 3, 4) for columns in (8, 16)
])
def test_decode_loop_for_sm90(sass_report, kernel, bits, columns):
    """Packed weights come 16 bytes a lane, nothing spills, nothing is exchanged, and the loop is within its budget."""
    row = sass_report.variant(sass_report.Variant(kernel, bits, columns))
    assert row.spills == 0
    assert row.global_loads.get("128", 0) >= 8
    assert not BUDGETED or not [x for x in row.top if x in EXCHANGES]
    assert not BUDGETED or row.per_weight <= BUDGET[columns][bits]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("kernel, columns", [
    ("gate_up", 8), *(pytest.param(*more, marks=pytest.mark.slow) for more in (
        ("gate_up", 16), ("product", 8), ("product", 16)))
])
def test_kernels_of_all_widths_for_sm90(sass_report, kernel, columns):
    row = sass_report.variant(sass_report.Variant(kernel, 0, columns))
    assert row.spills == 0 and row.registers <= 255
    assert not BUDGETED or not [x for x in row.top if x in EXCHANGES]


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize(
    "options",
    [
        {"kernel": "gate_up", "only": 2, "pdl": True},
        # triton turns integer arguments that are 1 into constants, which have fewer methods
        {"kernel": "gate_up", "only": 2, "ones": ("inputs", "sharing", "experts")},
        # gpt-oss
        {"kernel": "gate_up", "only": 2, "gating": (1.702, 0.0, 7.0, 1.0), "bias": True},
        *(pytest.param(more, marks=pytest.mark.slow) for more in (
            {"kernel": "gate_up", "only": 2, "gating": (1.5957691, 0.0713548, 0.0, 0.0)},
            {"kernel": "gate_up", "only": 2, "parts": 1}, {"kernel": "product", "only": 2, "bias": True},
            {"kernel": "product", "only": 0, "mode": 0}, {"kernel": "gate_up", "only": 0, "warps": 8},
            {"kernel": "gate_up", "only": 2, "tiles": 1, "group": 64}, {"kernel": "product", "only": 2, "kw": 8},
            {"kernel": "product", "only": 3, "dense": 3, "slots": 0},
            {"kernel": "product", "only": 2, "ones": ("inputs", "pairs", "slots", "sharing", "experts", "n")},
            {"kernel": "product", "only": 2, "splits": 1, "slots": 0, "ones": ("inputs", "pairs", "slots", "sharing")},
        )),
    ],
    ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items() if k != "ones") + ("-ones" if "ones" in o else ""),
)
def test_other_variants_compile_for_sm90(sass_report, options):
    row = sass_report.variant(sass_report.Variant(**({"columns": 8} | options)))
    assert row.loop > 0 and row.spills == 0


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_small_kernels_compile_for_sm90(sass_report):
    from gemq.triton_kernels.decode_prepare import prepare_kernel
    from gemq.triton_kernels.topk import topk_kernel

    pointers = {
        "x_ptr": "*bf16", "out_ptr": "*fp16", "groups_ptr": "*fp32", "ids_ptr": "*i64", "expert_ptr": "*i32",
        "pairs_ptr": "*i32", "arrived_ptr": "*i32", "act_ptr": "*fp16", "act_groups_ptr": "*fp32",
        "logits_ptr": "*bf16", "bias_ptr": "*fp32", "weights_ptr": "*fp32", "scale": "fp32",
    }
    prepare = {
        "KWS": (16,) * 5, "GROUP": 128, "ACT_GROUP": 128, "CHUNK": 512, "TAIL": 1024,
        "P": 128, "COLUMNS": 16, "ROUTE": 1, "ACT": True, "SCALED": True, "PDL": False,
    }
    topk = {
        "TOP_K": 6, "E": 64, "SLOTS": 8, "SIGMOID": True, "NORMALIZE": True, "BIASED": True, "ROWS": 4,
    }
    for kernel, constants in ((prepare_kernel, prepare), (prepare_kernel, prepare | {"ROUTE": 2, "PDL": True}),
                              (topk_kernel, topk)):
        ones = {a: 1 for a in ("inputs", "tokens", "pairs", "blocks", "experts", "counters") if a in kernel.arg_names}
        for more in ({}, ones):
            compiled = sass_report.compile_kernel(kernel, pointers, constants | more, 4)
            assert sass_report.measure("small", compiled, None).spills == 0
