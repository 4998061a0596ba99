"""Quantize by jobs of several processes, whole and with one process killed, continue, and compare all bytes.

    python tests/engine_ranks.py --sizes 1,2,3 --kills 20

One process imports everything, on one thread; every process of a job is a fork of it. A job of any size, and one that
continues after a kill with the same number of processes or another, must leave what a single process leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from engine_kills import CONFIG, METHOD, forking, kill_before, prepare, tree

import gemq
from gemq import distributed
from gemq.algorithms.router_tuning import RouterTuningConfig
from gemq.engine.fingerprint import of_code
from gemq.errors import GemqError

# five windows in batches of two: of three processes, one has a batch fewer at times
CONFIG = replace(
    CONFIG, samples=5, method=replace(METHOD, batch_size=2, router=RouterTuningConfig(batch_size=3))
)
LOST = r"rank \d of \d lost the other processes of this job: one of them ended"


def process(rank: int, size: int, port: int, kill_at: int | None, events: Path) -> None:
    """One process of a job; it kills itself right before its event number ``kill_at``."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    seen = kill_before(kill_at)
    try:
        with distributed.job(torch.device("cpu")):
            gemq.quantize(CONFIG)
    except GemqError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(2)
    events.write_text(str(seen()))


def job(base: Path, folder: Path, size: int, kill: tuple[int, int] | None = None) -> tuple[list[int], list[str]]:
    """Exit statuses and messages of the processes; ``kill`` is a rank and an event."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children, logs = [], [base / f"log-{rank}.txt" for rank in range(size)]
    for rank, log in enumerate(logs):
        log.unlink(missing_ok=True)
        at = kill[1] if kill and kill[0] == rank else None
        work = lambda rank=rank, at=at: process(rank, size, port, at, base / f"events-{rank}")  # noqa: E731
        children.append(forking(work, folder, log))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return codes, [log.read_text() if log.exists() else "" for log in logs]


def fresh(base: Path) -> Path:
    """An empty folder, always of the same name."""
    folder = base / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def whole(base: Path, size: int) -> tuple[dict[str, str], list[int]]:
    """Digests of the files that an uninterrupted job leaves, and how many events each of its processes passed."""
    folder = fresh(base)
    codes, logs = job(base, folder, size)
    assert codes == [0] * size, (codes, logs)
    return tree(folder), [int((base / f"events-{rank}").read_text()) for rank in range(size)]


def killed(base: Path, size: int, rank: int, event: int, then: int, expected: dict[str, str]) -> str:
    """Kill ``rank`` at its ``event``, continue with ``then`` processes; "" or what went wrong."""
    folder = fresh(base)
    codes, logs = job(base, folder, size, (rank, event))
    if codes[rank] != -signal.SIGKILL:
        return f"rank {rank} ended with {codes[rank]}: {logs[rank][-500:]}"
    for other in set(range(size)) - {rank}:
        if codes[other] != 2 or not re.search(LOST, logs[other]):
            return f"rank {other} ended with {codes[other]}: {logs[other][-500:]}"
    codes, logs = job(base, folder, then)
    if any(codes):
        return f"continued by {then}, ended with {codes}: {''.join(logs)[-1500:]}"
    left = tree(folder)
    names = sorted(n for n in {*left, *expected} if left.get(n) != expected.get(n))
    return f"continued by {then}, other bytes in {names}" if names else ""


def run(base: Path, sizes: list[int], kills: int, seed: int) -> dict:
    """All jobs; what failed."""
    expected, _ = whole(base, 1)
    failures, drawn, counts = [], random.Random(seed), {}
    for size in sizes:
        found, counts[size] = whole(base, size)
        if found != expected:
            failures.append(f"{size} processes: other bytes")
    several = [size for size in sizes if size > 1]
    for number in range(kills):
        size = several[number % len(several)]
        rank = (number // len(several) + 1) % size
        # the last events of rank 0 are after the others are done
        event = drawn.randrange(counts[size][rank] - (40 if rank == 0 else 0))
        then = size if number % 3 else drawn.choice(sizes)
        problem = killed(base, size, rank, event, then, expected)
        if problem:
            failures.append(f"{size} processes, rank {rank} killed at event {event}: {problem}")
            print(failures[-1], file=sys.stderr, flush=True)
    return {"sizes": sizes, "events": counts, "kills": kills, "failures": failures}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--sizes", default="1,2,3")
    options.add_argument("--kills", type=int, default=20)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    # no thread may exist at a fork
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    of_code()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        child = forking(lambda: prepare(base), base, base / "log.txt")
        assert os.waitpid(child, 0)[1] == 0, (base / "log.txt").read_text()
        found = run(base, [int(size) for size in given.sizes.split(",")], given.kills, given.seed)
    print(json.dumps(found))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
