"""A thousand op calls drawn from seeds (op_cases.py), and a few in Triton's interpreter.

A failure names its seed; ``GEMQ_CASE_SEED=<seed> pytest tests/test_op_sweep.py`` replays that case alone.
``make sweep`` runs more of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import OPS, Guarded, draw, run_case

HERE = Path(__file__).parent
REPLAYED = os.environ.get("GEMQ_CASE_SEED")
COUNT, FIRST = int(os.environ.get("GEMQ_SWEEP_CASES", "1000")), int(os.environ.get("GEMQ_SWEEP_FIRST", "0"))
INTERPRETED = int(os.environ.get("GEMQ_SWEEP_INTERPRETED", "12"))
PARTS = 10


@pytest.fixture(autouse=True)
def poisoned_memory():
    """``torch.empty`` comes filled with NaN, so that what a kernel leaves out shows."""
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(before)


@pytest.mark.timeout(0)
@pytest.mark.skipif(REPLAYED is not None, reason="one case is replayed")
@pytest.mark.parametrize("part", range(PARTS))
def test_sweep(part):
    # one part by a team, where the thread that a kernel's work falls to differs
    torch.set_num_threads(2 if part == 0 else 1)
    for seed in range(FIRST + part, FIRST + COUNT, PARTS):
        run_case(seed, most=4 if seed % 50 == 0 else 1)


@pytest.mark.skipif(REPLAYED is None, reason="GEMQ_CASE_SEED names the case to replay")
def test_replay():
    seed = int(REPLAYED)
    run_case(seed, most=4 if seed % 50 == 0 else 1)


@pytest.mark.timeout(0)
@pytest.mark.skipif(REPLAYED is not None, reason="one case is replayed")
def test_sweep_in_the_interpreter():
    """Triton's interpreter is chosen when triton is imported: a process of its own."""
    script = (
        "import torch, sys; torch.use_deterministic_algorithms(True)\n"
        "from op_cases import run_case, draw\n"
        f"first, left = {FIRST}, {INTERPRETED}\n"
        "while left:\n"
        "    if draw(first, ('gpu_tile',)).op in ('gemm', 'slots', 'weighted', 'ffn', 'dense'):\n"
        "        run_case(first, ('gpu_tile',)); left -= 1\n"
        "    first += 1\n"
    )
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_sweep_reaches_everything():
    cases = [draw(seed) for seed in range(1000)]
    assert {c.op for c in cases} == set(OPS)
    assert {b for c in cases for b in c.bits} == set(range(9))
    for name, least in (("layout", 2), ("dtype", 3), ("group_size", 3), ("routing", 6), ("tokens", 12), ("n", 14)):
        assert len({getattr(c, name) for c in cases}) >= least
    assert draw(7) == draw(7) != draw(8)


def test_guards_notice():
    keep = Guarded()
    out, given = keep(torch.zeros(3), output=True), keep(torch.ones(3))
    out.fill_(2)
    keep.check()
    given[1] = 0
    with pytest.raises(AssertionError, match="an input was written"):
        keep.check()
    given[1] = 1
    torch.as_strided(out, (4,), (1,))[3] = 0
    with pytest.raises(AssertionError, match="the guard behind a buffer was written"):
        keep.check()
