"""The CPU ops from several threads at once, and in a child process after a fork: the same bits every time."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from stacks import random_stack
from test_core_bits import random_bytes, random_meta
from torch import Tensor

from gemq import format as fmt
from gemq import ops


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def work() -> list[Callable[[], tuple[Tensor, ...]]]:
    """Each op once, with inputs of its own."""
    rows, k, bits = 61, 384, 3
    codes, packed = random_bytes(rows, k, seed=0), random_bytes(rows, fmt.row_bytes(k, bits), seed=1)
    meta = random_meta(rows, k // 128, seed=2)
    generator = torch.Generator().manual_seed(3)
    gate_up, down = (random_stack([2, 3, 0, 4], n, kk, 32, "cpu_tile", n) for n, kk in ((128, 96), (96, 64)))
    ids, weights = torch.randint(0, 4, (9, 2), generator=generator), torch.rand(9, 2, generator=generator)
    x = torch.randn(9, 96, generator=generator)
    return [
        lambda: (ops.pack(codes, bits),),
        lambda: (ops.unpack(packed, bits, k),),
        lambda: (ops.dequantize(packed, meta, bits, k, 128),),
        lambda: ops.repack(packed.flatten(), meta.flatten(), bits, rows, k, target="cpu_tile"),
        lambda: ops.repack(packed.flatten(), meta.flatten(), bits, rows, k, target="gpu_tile"),
        lambda: (ops.moe_lowbit_gemm(x, *gate_up, ids, weights, n=128, group_size=32, layout="cpu_tile"),),
        lambda: (
            ops.moe_lowbit_ffn(x, gate_up, down, ids, weights, intermediate=64, group_size=32, layout="cpu_tile"),
        ),
        lambda: (ops.lowbit_gemm(x, gate_up[0], gate_up[1], bits=2, n=128, group_size=32, layout="cpu_tile"),),
    ]


def same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("inner", [1, 2])
def test_several_threads_at_once(two_threads: None, inner: int) -> None:
    torch.set_num_threads(inner)
    calls = work()
    expected = [call() for call in calls]
    wrong: list[object] = []
    begin = threading.Barrier(4)

    def repeat(offset: int) -> None:
        try:
            torch.set_num_threads(inner)
            begin.wait()
            for turn in range(25):
                index = (offset + turn) % len(calls)
                if not same(calls[index](), expected[index]):
                    wrong.append(index)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=repeat, args=(2 * i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def in_a_child(check: Callable[[], bool], seconds: float) -> str:
    """Run ``check`` in a forked child and return its outcome: "same", "different", a signal's number, or "hangs"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: forking beside threads
        child = os.fork()
    if child == 0:
        status = 2
        try:
            status = 0 if check() else 1
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return {0: "same", 1: "different", 2: "raised"}.get(code, f"signal {-code}")
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


def test_a_forked_child_computes_the_same(two_threads: None) -> None:
    """Also where the parent's threads, which a child does not have, were at work before."""
    calls = work()
    expected = [call() for call in calls]
    for call, result in zip(calls, expected, strict=True):
        assert in_a_child(lambda call=call, result=result: same(call(), result), 20) == "same"
    assert all(same(call(), result) for call, result in zip(calls, expected, strict=True))


def test_a_child_of_a_child_too(two_threads: None) -> None:
    call = work()[0]
    expected = call()
    assert in_a_child(lambda: in_a_child(lambda: same(call(), expected), 10) == "same", 20) == "same"


def test_the_lock_of_the_interpreter_is_free_meanwhile() -> None:
    """A large call lets other Python threads run: a counter goes on while it computes."""
    codes = torch.zeros(1 << 13, 1 << 13, dtype=torch.uint8)
    done, seconds = threading.Event(), []

    def pack() -> None:
        start = time.perf_counter()
        ops.pack(codes, 3)
        seconds.append(time.perf_counter() - start)
        done.set()

    worker = threading.Thread(target=pack)
    worker.start()
    waits = []
    while not done.is_set():
        start = time.perf_counter()
        time.sleep(0.0005)
        waits.append(time.perf_counter() - start)
    worker.join()
    # holding the lock would make one wait as long as the call itself
    assert len(waits) >= 3
    assert sum(sorted(waits)[:-1]) >= 0.3 * seconds[0]
