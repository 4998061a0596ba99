"""Jobs of several processes: the same results as one, to the bit, and a clear end when one dies."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from distributed_worker import outcome

from gemq import distributed
from gemq.cli.run import run

TESTS = Path(__file__).parent


def environment(**changes: object) -> dict[str, str]:
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | {k: str(v) for k, v in changes.items()}


@contextmanager
def one_thread():
    """As many threads as each process of a job has: how a product is split among threads shows in its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def launch(count: int, arguments) -> list[subprocess.CompletedProcess]:
    """``python *arguments(rank)`` in ``count`` processes of one job, as torchrun would start them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(count):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        env = environment(**place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        command = [sys.executable, *map(str, arguments(rank))]
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(p.args, p.returncode, out, err)
        for p, (out, err) in zip(started, ended, strict=True)
    ]


def same_as_one(count: int, folder: Path, cases: list[str]) -> None:
    done = launch(count, lambda r: [TESTS / "distributed_worker.py", folder / f"{r}.json", *cases])
    assert [process.returncode for process in done] == [0] * count, done[0].stderr + done[-1].stderr
    with one_thread():
        expected = {case: outcome(case) for case in cases}
    for rank in range(count):
        assert json.loads((folder / f"{rank}.json").read_text()) == expected


def test_two_processes_give_the_bits_of_one(tmp_path):
    same_as_one(2, tmp_path, ["mixtral:7:2", "deepseek_v2:5:2"])


@pytest.mark.slow
def test_three_processes_give_the_bits_of_one(tmp_path):
    # four batches are uneven; of one batch, two processes have none
    same_as_one(3, tmp_path, ["mixtral:7:2", "qwen2_moe:3:4"])


def test_a_killed_process_ends_the_job(tmp_path):
    done = launch(2, lambda r: [TESTS / "distributed_worker.py", tmp_path / f"{r}.json", "mixtral:7:2",
                                "--die-at", "quantize"])
    assert done[1].returncode == -signal.SIGKILL
    assert done[0].returncode == 2
    assert re.search(r"rank 0 of 2 lost the other processes of this job: one of them ended", done[0].stderr)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("size", "status", "said"), [(2, 2, "said"), (2, 0, "said orderly"), (1, 2, "said orderly")])
def test_a_failed_process_of_a_job_leaves_at_once(size: int, status: int, said: str) -> None:
    program = "import atexit, gemq.distributed as d; atexit.register(print, 'orderly'); print('said'); d.leave({})"
    place = {"RANK": "0", "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    done = subprocess.run([sys.executable, "-c", program.format(status)], env=environment() | place, text=True,
                          capture_output=True)
    assert (done.returncode, done.stdout.split()) == (status, said.split())


def quantize_arguments(model_folder, text_file, output) -> list[str]:
    return ["quantize", str(model_folder), "-o", str(output), "--bits", "2", "--calibration", str(text_file),
            "--samples", "5", "--length", "24", "--batch-size", "2", "--device", "cpu"]


def test_torchrun_writes_the_files_of_one_process(model_folder, text_file, tmp_path):
    def arguments(name):
        return quantize_arguments(model_folder, text_file, tmp_path / name)

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gemq"]
    done = subprocess.run([*command, *arguments("two")], env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("bits/expert") == 1 and done.stderr.count("done in") == 1
    # all that was shared is rank 0's to delete
    assert os.listdir(tmp_path) == ["two"]
    with one_thread():
        assert run(arguments("one")) == 0
    for name in ("model.safetensors", "gemq_costs.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert run(["verify", str(tmp_path / "two")]) == 0


def test_what_rank_0_refuses_is_said_once(model_folder, text_file, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("not a checkpoint")
    done = launch(2, lambda r: ["-m", "gemq", *quantize_arguments(model_folder, text_file, tmp_path / "out")])
    assert [process.returncode for process in done] == [2, 2]
    assert re.fullmatch(r"error: rank 0: the output folder .* is not empty.*", done[0].stderr.strip())
    assert done[1].stderr.strip() == "" and os.listdir(tmp_path / "out") == ["mine.txt"]


def streamed_jobs(*arguments: str) -> dict:
    command = [sys.executable, TESTS / "engine_ranks.py", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_a_streamed_job_gives_the_bytes_of_one_process_and_survives_a_kill():
    assert streamed_jobs("--sizes", "2", "--kills", "1")["failures"] == []


@pytest.mark.slow
def test_streamed_jobs_of_three_processes_killed_and_continued_by_fewer():
    found = streamed_jobs("--sizes", "1,2,3", "--kills", "9")
    assert found["failures"] == [] and set(found["events"]) == {"1", "2", "3"}


def test_one_process_is_rank_0_of_1():
    assert distributed.world() == distributed.launched() == distributed.World(0, 1)
    assert distributed.world().first and distributed.processes_here() == 1
    windows = torch.arange(10).view(5, 2)
    assert [len(b) for b in distributed.batches(windows, 2)] == [2, 2, 1] and distributed.rounds(windows, 2) == 3
    assert list(distributed.share(4)) == [0, 1, 2, 3]
    tensors = {"a": torch.ones(2)}
    assert distributed.exchange(tensors, torch.device("cpu")) == [tensors]
    assert distributed.exchange(None, torch.device("cpu")) == []
    assert distributed.gather("x") == ["x"] and distributed.on_first(lambda: 3) == 3


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_every_part_belongs_to_one_process(monkeypatch, size, count):
    parts, dealt, most = [], {}, 0
    windows = torch.arange(count).view(count, 1)
    for rank in range(size):
        monkeypatch.setattr(distributed, "world", lambda r=rank: distributed.World(r, size))
        parts += distributed.share(count)
        own = distributed.batches(windows, 2)
        most = max(most, len(own))
        dealt |= {(turn, rank): batch for turn, batch in enumerate(own)}
        rounds = distributed.rounds(windows, 2)
    assert parts == list(range(count)) and rounds == most
    # round after round, rank after rank: the order of one process
    assert torch.equal(torch.cat([dealt[place] for place in sorted(dealt)]), windows)
