"""Kill a quantization at a write, sync, rename or deletion, or at a random moment, continue it, and compare.

    python tests/engine_kills.py --events all --random 100

One process imports everything, on one thread; every trial is two forks of it: one that is killed, and one that
continues. What the second leaves must be byte for byte what an uninterrupted run leaves, and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# transformers reads weights on threads otherwise, which cost more than such a model's arithmetic
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")

import torch
import transformers

import gemq
from gemq import durable
from gemq.algorithms.method import MethodConfig
from gemq.engine.fingerprint import of_code
from gemq.integrity import RUN_FILE
from gemq.pipeline import QuantizeConfig

# the model and the text lie beside each trial's folder, so that all trials name them alike
METHOD = MethodConfig(router_bits=8, batch_size=3)
CONFIG = QuantizeConfig("../model", "out", "../words.txt", samples=6, length=16, method=METHOD, overwrite=True)


def tree(folder: Path) -> dict[str, str]:
    """SHA-256 of every file under a folder."""
    # seconds and peak memory are of the run
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != RUN_FILE)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def forking(work: Callable[[], None], folder: Path, log: Path) -> int:
    """Start ``work`` in a fork, in ``folder``, what it prints appended to ``log``; the process."""
    child = os.fork()
    if not child:
        status = 1
        try:
            os.chdir(folder)
            sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(status)
    return child


def forked(work: Callable[[], None], folder: Path, kill_after: float | None = None) -> int:
    """Run ``work`` in a fork, in ``folder``; its exit status, or the negative signal that ended it."""
    child = forking(work, folder, folder.parent / "log.txt")
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def counted(quantize: Callable[[], None], report: Path) -> None:
    """An uninterrupted run that writes down its events."""
    events: list[str] = []
    durable.watch(events.append)
    start = time.monotonic()
    quantize()
    report.write_text(json.dumps({"events": events, "seconds": time.monotonic() - start}))


def kill_before(event: int | None) -> Callable[[], int]:
    """Let this process kill itself right before its event of this number; gives how many there were so far."""
    seen = 0

    def watcher(name: str) -> None:
        nonlocal seen
        if seen == event:
            os.kill(os.getpid(), signal.SIGKILL)
        seen += 1

    durable.watch(watcher)
    return lambda: seen


def killed_at(quantize: Callable[[], None], event: int) -> None:
    """A run that kills itself right before its event number ``event``."""
    kill_before(event)
    quantize()


class Laboratory:
    """A reference run, and trials against it."""

    def __init__(self, base: Path, budgets: tuple[float, ...]):
        self.base = base
        config = replace(CONFIG, method=replace(METHOD, budgets=budgets))
        self.quantize = lambda: gemq.quantize(config)
        (base / "reference").mkdir()
        report = base / "reference.json"
        status = forked(lambda: counted(self.quantize, report), base / "reference")
        assert status == 0, (base / "log.txt").read_text()[-3000:]
        found = json.loads(report.read_text())
        self.events, self.seconds = found["events"], found["seconds"]
        self.expected = tree(base / "reference")

    def trial(self, event: int | None, moment: float | None) -> str:
        """Kill, continue, compare; "" or what went wrong."""
        folder = self.base / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        status = forked(self.quantize if event is None else lambda: killed_at(self.quantize, event), folder, moment)
        if status != -signal.SIGKILL and not (event is None and status == 0):
            return f"the first run ended with {status}"
        if forked(self.quantize, folder):
            return "the second run failed: " + (self.base / "log.txt").read_text()[-1500:]
        left = tree(folder)
        if left != self.expected:
            names = sorted(n for n in {*left, *self.expected} if left.get(n) != self.expected.get(n))
            return f"other bytes in {names}"
        return ""


def spread(count: int, wanted: str) -> list[int]:
    """Numbers of events: all, or so many of them evenly."""
    if wanted == "all":
        return list(range(count))
    number = int(wanted)
    return [(2 * i + 1) * count // (2 * number) for i in range(number)]


def run(base: Path, budgets: tuple[float, ...], events: str, moments: int, seed: int) -> dict:
    """All trials; what failed, and how many there were."""
    laboratory = Laboratory(base, budgets)
    drawn = random.Random(seed)
    trials = [(e, None) for e in spread(len(laboratory.events), events)]
    trials += [(None, drawn.uniform(0, laboratory.seconds)) for _ in range(moments)]
    failures = []
    for number, (event, moment) in enumerate(trials):
        if number % 25 == 0:
            print(f"{number} of {len(trials)} trials, {len(failures)} failed", file=sys.stderr, flush=True)
        problem = laboratory.trial(event, moment)
        if problem:
            where = f"event {event} ({laboratory.events[event]})" if event is not None else f"{moment:.3f} s"
            failures.append(f"{where}: {problem}")
            print(failures[-1], file=sys.stderr, flush=True)
    return {
        "events": len(laboratory.events), "trials": len(trials), "seconds": round(laboratory.seconds, 2),
        "failures": failures,
    }


def prepare(base: Path) -> None:
    """A tiny model with its tokenizer, and a text."""
    from tiny_models import tiny_model
    from tiny_text import word_tokenizer, words

    tiny_model("mixtral").to(torch.bfloat16).save_pretrained(base / "model")
    word_tokenizer().save_pretrained(base / "model")
    (base / "words.txt").write_text(words(1000), encoding="utf-8")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--events", default="all", help="all, or a number of them, evenly")
    options.add_argument("--random", type=int, default=100, help="kills at random moments")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--budgets", default="2.5,2")
    options.add_argument("--folder", help="where to work; one in memory spares the disk's syncs")
    given = options.parse_args()
    # no thread may exist at a fork
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # read once: an edit during the hours of a long run is not another code
    of_code()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        status = forked(lambda: prepare(Path(folder)), Path(folder))
        assert status == 0, status
        budgets = tuple(float(b) for b in given.budgets.split(","))
        found = run(Path(folder), budgets, given.events, given.random, given.seed)
    print(json.dumps(found))
    return 1 if found["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
