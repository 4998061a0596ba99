"""The GPU script without a GPU: its budget, its stages as subprocesses, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmark_modules import load

gpu_stages = load("gpu_stages")
Stage = gpu_stages.Stage
ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_run.sh"


def script(tmp_path: Path, *options: str, **extra: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable, "GEMQ_RUN_DIR": str(tmp_path / "run")} | extra
    return subprocess.run(
        ["bash", str(SCRIPT), *options], env=env, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run of made-up stages, as if there were a device."""
    monkeypatch.setenv("GEMQ_RUN_DIR", str(tmp_path / "run"))
    return gpu_stages.Run(tmp_path / "out", 100.0, None, "abc1234")


def test_the_script_parses() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.parametrize("budget", [12, 30, 200, 540, 5000])
@pytest.mark.parametrize("used", [0.1, 0.7, 1.0])
def test_no_order_of_events_exceeds_the_budget(budget: float, used: float) -> None:
    elapsed = 0.0
    for stage in gpu_stages.STAGES:
        limit = gpu_stages.limit_of(stage, budget, elapsed)
        if limit is not None:
            assert 0 < limit <= stage.seconds
            # ending a stage by force takes about 2 seconds more
            elapsed += used * limit
    assert elapsed <= max(0, budget - gpu_stages.RESERVE)


def test_a_stage_is_not_started_for_a_moment() -> None:
    stage = Stage("s", 60, "true")
    assert gpu_stages.limit_of(stage, 100, 0) == 60
    assert gpu_stages.limit_of(stage, 100, 70) == 20
    assert gpu_stages.limit_of(stage, 100, 76) is None
    assert gpu_stages.limit_of(Stage("short", 5, "true"), 100, 84) == 5


def test_what_the_stages_run_exists() -> None:
    from gemq.ops.launch_search import PRESETS

    names = [s.name for s in gpu_stages.STAGES]
    assert len(names) == len(set(names)) and names[:2] == ["facts", "first"]
    assert names.index("moe") < names.index("sweep")
    for stage in gpu_stages.STAGES:
        for path in re.findall(r"(?:benchmarks|tests)/\w+\.\w+", stage.command):
            assert (ROOT / path).exists(), path
        assert stage.part is None or "{json}" in stage.command
        assert (stage.probe is None) == (stage.missing == "")
        if stage.name.startswith("bench_"):
            assert stage.name.removeprefix("bench_").partition("_16_")[0] in PRESETS


def test_the_bench_stages_are_what_gemq_bench_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each command line, parsed by gemq itself: the models at 2.5 bits, and the 16-bit ways of DeepSeek-V2-Lite."""
    from gemq.cli.run import run

    seen = []

    def record(config, report):
        seen.append((config.model_config, config.bits, config.baseline, config.tokens, config.batch, config.layers))
        raise ValueError("parsed")

    monkeypatch.setattr("gemq.bench.run_bench", record)
    for stage in gpu_stages.STAGES:
        if stage.name.startswith("bench_"):
            words = stage.command.format(python="python", json=tmp_path / "x.json").split()
            assert words[:4] == ["python", "-m", "gemq", "bench"] and run(words[3:]) == 2
    packed = [(model, *rest) for model, bits, baseline, *rest in seen if bits == 2.5]
    assert {model for model, *_ in packed} == {"mixtral-8x7b", "deepseek-v2-lite", "qwen3-30b-a3b", "qwen1.5-moe"}
    assert all(rest == [200, 1, None] for _, *rest in packed)
    baselines = {(model, baseline) for model, bits, baseline, *_ in seen if bits == 16}
    assert baselines == {("deepseek-v2-lite", name) for name in ("grouped_mm", "batched_mm", "gather")}


def _part(**rates: float) -> dict:
    return {"runs": {name: {"tokens_per_second": {"p50": rate}} for name, rate in rates.items()}}


def test_speedups_are_over_baselines_of_the_same_call(run) -> None:
    run.result["bench_qwen1.5-moe"] = _part(gemq=10.0)
    run.save()
    assert "speedups" not in run.result
    run.result |= {
        "bench_deepseek-v2-lite": _part(gemq=400.0), "bench_deepseek-v2-lite_16_grouped_mm": _part(grouped_mm=200.0),
        "bench_deepseek-v2-lite_16_gather": _part(gather=100.0),
    }
    run.save()
    assert json.loads((run.out / "gpu.json").read_text())["speedups"] == {"deepseek-v2-lite": {
        "gemq": 400.0, "grouped_mm": 200.0, "gather": 100.0, "over_strongest": 2.0, "over_gather": 4.0,
    }}


def test_dry_run_shows_everything_and_writes_nothing(tmp_path: Path) -> None:
    done = script(tmp_path, "--dry-run", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    for stage in gpu_stages.STAGES:
        assert re.search(rf"^{re.escape(stage.name)} ", done.stdout, flags=re.M)
    ends = [int(found) for found in re.findall(r"ends by (\d+) s", done.stdout)]
    assert ends == sorted(ends) and ends[-1] <= 540 - gpu_stages.RESERVE
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_gpu_it_ends_cleanly(tmp_path: Path) -> None:
    done = script(tmp_path, "--budget", "90", "--commit", "abc1234", OUT=str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [s["stage"] for s in result["stages"]] == [s.name for s in gpu_stages.STAGES]
    assert {s["outcome"] for s in result["stages"]} == {"skipped: no CUDA device"}
    assert result["conditions"]["commit"] == "abc1234" and result["conditions"]["torch"] == torch.__version__
    assert result["kind"] == "gpu" and result["seconds"] < 90
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["gpu.json", "gpu.log"]


@pytest.mark.parametrize("options, message", [
    (["--budget", "0"], "--budget must be a positive number"),
    (["--stages", "facts,nothing"], "nothing is none of facts"),
    (["--stages", "moe=soon"], "moe=soon must end in a whole number"),
    (["--wheels", "/nowhere"], "/nowhere is no folder"),
])  # fmt: skip
def test_bad_options(options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        gpu_stages.main(options)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_stages_can_be_chosen() -> None:
    found = gpu_stages.chosen("moe=400,facts")
    assert [(s.name, s.seconds) for s in found] == [("facts", 60), ("moe", 400)]
    found = gpu_stages.chosen("bench_*=50,build")
    assert found[0].name == "build" and [s.seconds for s in found[1:]] == [50] * 7
    assert all(s.name.startswith("bench_") for s in found[1:])


def test_outcomes(run) -> None:
    assert run.run(Stage("ok", 20, "echo in {out}/x; echo last"), True)["outcome"] == "done"
    failed = run.run(Stage("bad", 20, "echo why >&2; exit 3"), True)
    assert failed["outcome"] == "failed with code 3" and failed["tail"] == ["why"]
    absent = run.run(Stage("tool", 20, "true", probe="false", missing="no tool"), True)
    assert absent == {"outcome": "skipped: no tool"}
    assert run.run(Stage("gpu", 20, "true"), False) == {"outcome": "skipped: no CUDA device"}
    run.begin -= 85
    assert run.run(Stage("late", 20, "true"), True) == {"outcome": "skipped: the budget is spent"}
    log = run.log.read_text()
    assert log.index("== ok") < log.index("last") < log.index("== bad") < log.index("why")


def gone(pid: int) -> bool:
    """Return True if a process ends within seconds; one that nobody waits for stays behind as Z."""
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_stage_that_overruns_is_ended_with_its_children_and_keeps_its_rows(run, tmp_path: Path) -> None:
    pid = tmp_path / "child.pid"
    command = (
        "echo '{{\"rows\": [1]}}' > {json}; trap '' TERM; sleep 300 & echo $! > " + str(pid) + "; sleep 300; sleep 300"
    )
    stage = Stage("moe", 2, command, "moe")
    begin = time.monotonic()
    row = run.run(stage, True)
    assert row["outcome"] == "stopped after 2 s" and time.monotonic() - begin < 15
    run.gather(stage)
    run.save()
    assert json.loads((run.out / "gpu.json").read_text())["moe"] == {"rows": [1]}
    assert not list(run.parts.iterdir())
    assert gone(int(pid.read_text()))


def test_a_broken_part_is_left_out(run) -> None:
    stage = Stage("moe", 20, "echo '{{\"rows' > {json}", "moe")
    run.run(stage, True)
    run.gather(stage)
    assert "moe" not in run.result


def test_the_environment_prefers_what_was_built(run) -> None:
    plain, best = Stage("a", 9, "", path="plain"), Stage("b", 9, "")
    assert run.environment(best)["PYTHONPATH"].split(os.pathsep)[0] == str(run.plain)
    (run.built / "gemq").mkdir(parents=True)
    assert run.environment(best)["PYTHONPATH"].split(os.pathsep)[0] == str(run.built)
    assert run.environment(plain)["PYTHONPATH"].split(os.pathsep)[0] == str(run.plain)
    assert run.environment(Stage("c", 9, "", path="none"))["PYTHONPATH"].split(os.pathsep)[0] == str(run.site)


def test_the_plain_package_imports_without_the_extension(run) -> None:
    program = (
        # an editable installation answers before any path
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Redirect' not in type(f).__name__]\n"
        "import gemq; from gemq import triton_kernels\n"
        "from gemq.ops import launch_search, measuring\n"
        "print(gemq.__file__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=run.environment(Stage("a", 9, "", path="plain")), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == run.plain / "gemq"


def test_no_folder_of_the_machine_is_in_the_result(run) -> None:
    row = run.run(Stage("a", 20, f"echo {{out}} {{site}} {ROOT}/x"), True)
    assert row["tail"] == ["out site ./x"]


def test_ended_from_outside_it_writes_what_it_has(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, 'benchmarks'); import gpu_stages as g\n"
        "g.STAGES = (g.Stage('one', 20, 'true'), g.Stage('two', 60, 'echo started; sleep 50'))\n"
        "g.Run.conditions = lambda self: True\n"
        f"g.main(['--out', {str(tmp_path / 'out')!r}])\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"GEMQ_RUN_DIR": str(tmp_path)},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    log = tmp_path / "out" / "gpu.log"
    for _ in range(200):
        if log.exists() and "started" in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    result = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert [s["outcome"] for s in result["stages"]] == ["done", "interrupted"]
