"""The prefill kernels without a GPU: their cases in the interpreter, the sorting of pairs, the launch table, and what
they compile to for sm_90."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def interpret(code_or_file: list[str]) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path}
    return subprocess.run([sys.executable, *code_or_file], env=env, capture_output=True, text=True, cwd=HERE.parent)


@pytest.mark.parametrize("chosen", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_cases_in_the_interpreter(chosen):
    done = interpret(["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", chosen,
                      str(HERE / "prefill_cases.py")])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("tokens, experts, top_k, expected", [
    (17, 8, 2, ("packed", 16)), (100, 8, 2, ("packed", 32)), (256, 8, 2, ("packed", 64)),
    (2048, 8, 2, ("packed", 128)), (8192, 8, 2, ("dense", 128)), (8192, 128, 8, ("packed", 128)),
    (17, 1, 1, ("packed", 32)), (4096, 1, 1, ("dense", 128)), (17, 0, 1, ("packed", 32)),
])  # fmt: skip
def test_the_table_says_which_method(tokens, experts, top_k, expected):
    """By tokens an expert: 4, 25, 64, 512, 2048, 512; one expert for a dense layer."""
    from gemq.triton_kernels import launch_parameters

    launch = launch_parameters.prefill_launch("a device nobody has", tokens, experts, top_k, 256, 256)
    assert (launch.method, launch.columns) == expected


def test_the_table_is_in_order_and_complete():
    from gemq.triton_kernels import launch_parameters

    entries = launch_parameters.table("default")["prefill"]
    limits = [e["tokens"] for e in entries]
    assert limits[-1] is None and limits[:-1] == sorted(set(limits[:-1]))
    for entry in entries:
        launch = launch_parameters.Prefill(**{k: v for k, v in entry.items() if k != "tokens"})
        assert launch.method in ("packed", "dense")
        assert launch.rows % (16 * launch.warps) == 0 or launch.method == "dense"
        assert launch.columns * launch.steps * 128 <= 32768


@pytest.fixture(scope="module")
def sass_prefill():
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter cannot compile")
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    try:
        import sass_prefill
    finally:
        sys.path.pop(0)
    return sass_prefill


# most instructions a weight in the loop: what was counted on triton 3.9 and a tenth
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("bits, columns, most", [
    (2, 16, 2.8), (3, 128, 6.5), *(pytest.param(*more, marks=pytest.mark.slow) for more in (
        (3, 16, 3.1), (2, 128, 4.1)))
])
def test_one_width_for_sm90(sass_prefill, bits, columns, most):
    """Words by 16-byte copies, weights from registers into wgmma: nothing is stored to shared memory on the way."""
    row = sass_prefill.packed(columns, 1, bits)
    assert row.spills == 0
    assert row.loop.get("HGMMA", 0) >= 2 and "HMMA" not in row.loop
    assert row.loop.get("LDGSTS.128", 0) > 0 and row.loop.get("LDS.128", 0) > 0
    assert not [opcode for opcode in row.loop if opcode.startswith(("STS", "STSM", "LDSM", "SHFL"))]
    assert row.per_weight <= most


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("columns, parts, squared", [
    (16, 1, False), *(pytest.param(*more, marks=pytest.mark.slow) for more in (
        (64, 2, False), (128, 1, False), (128, 2, False), (16, 1, True), (64, 1, True), (128, 1, True)))
])
def test_mixed_widths_for_sm90(sass_prefill, columns, parts, squared):
    row = sass_prefill.packed(columns, parts, 0, squared=squared)
    assert row.spills == 0 and row.registers <= 255
    assert row.shared <= sass_prefill.SHARED_BYTES
    assert row.loop.get("HGMMA", 0) > 0


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("parts, squared", [(1, False), (2, False), (1, True)], ids=["gemm", "gate-up", "squared"])
def test_dense_product_for_sm90(sass_prefill, parts, squared):
    row = sass_prefill.dense(parts, squared=squared)
    assert row.spills == 0 and row.shared <= sass_prefill.SHARED_BYTES
    assert row.loop.get("HGMMA", 0) >= 4 and "HMMA" not in row.loop
    assert row.loop.get("LDGSTS.128", 0) >= 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_unpacking_for_sm90(sass_prefill):
    row = sass_prefill.unpacking(0)
    assert row.spills == 0
    assert row.code.get("LDG.128", 0) >= 8
    assert row.code.get("STG.128", 0) >= 48 and not row.code.get("STG", 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_small_kernels_and_arguments_of_one_compile(sass_prefill):
    """triton turns integer arguments that are 1 into constants, which have fewer methods."""
    for ones in ((), ("experts", "sharing", "n", "blocks", "pairs", "parts", "until")):
        assert all(row.spills == 0 for row in sass_prefill.small(ones))
    assert sass_prefill.packed(16, 1, 2, ones=("experts", "sharing", "n", "blocks")).spills == 0
    assert sass_prefill.dense(1, ones=("experts", "sharing", "n", "blocks", "until")).spills == 0


SORTING = """
import torch
from gemq.triton_kernels.blocks import block_count
from gemq.triton_kernels.blocks_by_sorting import sort_pairs

for pairs, experts, columns in ((17, 1, 16), (300, 5, 16), (300, 60, 32), (40, 3, 128), (5000, 4, 64)):
    ids = torch.randint(-1, experts + 2, (pairs,))
    if pairs == 40:
        ids[:] = 1
    expert, block, counts = sort_pairs(ids, experts, columns)
    valid = torch.where((ids < 0) | (ids >= experts), experts, ids)
    assert expert.shape == (block_count(pairs, experts, columns),)
    assert torch.equal(counts.long(), torch.bincount(valid, minlength=experts + 1))
    assert sorted(block[block >= 0].tolist()) == list(range(pairs))
    assert expert[expert >= 0].tolist() == sorted(expert[expert >= 0].tolist())
    for e, row in zip(expert.tolist(), block):
        used = row[row >= 0]
        assert (e >= 0) == (used.numel() > 0)
        assert (valid[used.long()] == e).all() and (used.diff() > 0).all() and (row[: used.numel()] >= 0).all()
"""


def test_sorting_is_stable_and_fits_the_bound():
    done = interpret(["-W", "error", "-c", SORTING])
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_routing_fits_the_bound():
    from gemq.triton_kernels.blocks import block_count

    for pairs in (1, 16, 17, 100):
        for experts in (1, 3, 64):
            worst = min(pairs, experts + 1)
            most = worst + (pairs - worst) // 16
            assert block_count(pairs, experts, 16) >= most
