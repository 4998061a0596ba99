"""The stages of ``gpu_run.sh``: what each runs, how long it may, and one JSON that is whole after each of them.

Imports nothing but the standard library, so that the figures do not wait for it and a broken installation is a failed
stage rather than no result.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# seconds that are kept for ending a stage and writing, and below which a stage is not worth starting
RESERVE, LEAST = 10, 15


@dataclass(frozen=True)
class Stage:
    """A command for bash and how long it may take.

    ``command`` and ``probe`` may hold {python}, {json} (its file), {out}, {wheels}, {site}, {built}, {ini} and {limit}
    (seconds after which it should start nothing new). ``part`` is the key of gpu.json that its file becomes. ``path``
    says which gemq it imports: ``plain`` the checkout without an extension, ``best`` the built one if there is one,
    ``none``. A ``probe`` that fails skips it, because of what is ``missing``.
    """

    name: str
    seconds: int
    command: str
    part: str | None = None
    path: str = "best"
    probe: str | None = None
    missing: str = ""
    environment: dict[str, str] = field(default_factory=dict)


PIP = "{python} -m pip install -q --no-index --no-deps --upgrade"
PYTEST = "{python} -m pytest -q -p no:cacheprovider -c {ini} --rootdir ."
MIXTRAL = "{python} benchmarks/gpu_mixtral_block.py --tokens 1"


def _bench(model: str, seconds: int, baseline: str | None = None) -> Stage:
    """``gemq bench`` of a published architecture at 2.5 bits, or one of its 16-bit baselines: a stage each, so that
    one that overruns takes no other's figures along."""
    what = f"--bits 16 --baseline {baseline}" if baseline else "--bits 2.5"
    name = f"bench_{model}" + (f"_16_{baseline}" if baseline else "")
    command = f"{{python}} -m gemq bench --model-config {model} {what} --random-weights --output {{json}}"
    return Stage(name, seconds, command, name, probe="{python} -m gemq bench --help",
                 missing="this version has no `gemq bench`")  # fmt: skip


def _quantize(model: str, seconds: int) -> Stage:
    """Stage that measures how long quantizing a published architecture takes, from a few layers of it."""
    command = f"{{python}} benchmarks/quantize_time.py {model} --device cuda --json {{json}}"
    return Stage(f"quantize_{model}", seconds, command, f"quantize_{model}")


def _sanitizer(tool: str, seconds: int) -> Stage:
    command = "compute-sanitizer --tool TOOL --error-exitcode 9 {python} benchmarks/gpu_sanitize.py"
    return Stage(tool, seconds, command.replace("TOOL", tool), probe="compute-sanitizer --version",
                 missing="no compute-sanitizer", environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})  # fmt: skip


# most valuable first; seconds are the most a stage may take, what it leaves goes to the later ones
STAGES = (
    Stage("facts", 60, "{python} benchmarks/gpu_subnormals.py --json {json}", "facts", "plain"),
    Stage("first", 75, f"{MIXTRAL} --mixes 2.0 2.5 --json {{json}}", "first", "plain"),
    Stage("wheels", 40, f"{PIP} --no-compile --target {{site}} {{wheels}}", path="none", probe="{has_wheels}",
          missing="no --wheels"),
    Stage("build", 150, f"{PIP} --no-build-isolation --target {{built}} .", path="none"),
    Stage("tests", 100, f"{PYTEST} tests/test_triton_gpu.py tests/test_triton_prefill_gpu.py"),
    Stage("moe", 150, f"{PYTEST} benchmarks/bench_moe.py --benchmark-only --benchmark-columns=median "
          "--rows-json {json} --budget {limit} --recorded-command 'bash benchmarks/gpu_run.sh'", "moe"),
    _bench("deepseek-v2-lite", 60),
    # the strongest ways under torch.compile, and the authors' gather + einsum, which it is compared with
    _bench("deepseek-v2-lite", 100, "grouped_mm"),
    _bench("deepseek-v2-lite", 100, "gather"),
    _bench("mixtral-8x7b", 60),
    _bench("qwen3-30b-a3b", 60),
    _bench("qwen1.5-moe", 60),
    _bench("deepseek-v2-lite", 100, "batched_mm"),
    _quantize("deepseek-v2-lite", 150),
    _quantize("mixtral-8x7b", 180),
    Stage("determinism", 60, f"{PYTEST} tests/test_gpu_determinism.py"),
    _sanitizer("memcheck", 60),
    _sanitizer("racecheck", 60),
    Stage("core_tests", 60, f"{PYTEST} -m gpu tests/test_core_bits.py tests/test_ops.py tests/test_tuning.py "
          "tests/test_gptq_cuda.py"),
    Stage("sweep", 120, "{python} -m gemq tune --budget {limit} --output {out}/tuned.json"),
    Stage("ncu", 45, f"ncu --launch-count 6 --section SpeedOfLight {MIXTRAL} --mixes 2.0", probe="ncu --version",
          missing="no ncu"),
)  # fmt: skip


def limit_of(stage: Stage, budget: float, elapsed: float) -> int | None:
    """Seconds that a stage may take now; None if too few are left of the budget to start it."""
    left = int(budget - elapsed - RESERVE)
    limit = min(stage.seconds, left)
    return None if limit < min(LEAST, stage.seconds) else limit


def speedups(result: dict) -> dict[str, dict[str, float]]:
    """Collect by model the median tokens a second of gemq and of the 16-bit baselines of the same call, and the
    quotients."""
    rates: dict[str, dict[str, float]] = {}
    for key, part in result.items():
        if key.startswith("bench_"):
            model = key.removeprefix("bench_").partition("_16_")[0]
            runs = {name: run["tokens_per_second"]["p50"] for name, run in part["runs"].items()}
            rates[model] = rates.get(model, {}) | runs
    found = {}
    for model, runs in rates.items():
        others = {name: rate for name, rate in runs.items() if name != "gemq"}
        if "gemq" in runs and others:
            found[model] = runs | {"over_strongest": round(runs["gemq"] / max(others.values()), 3)}
            if "gather" in others:
                found[model]["over_gather"] = round(runs["gemq"] / others["gather"], 3)
    return found


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file atomically: a reader finds the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def end(process: subprocess.Popen) -> None:
    """End a running stage and all that it started; its group keeps its number until it is waited for."""
    for number, seconds in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 0.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        time.sleep(seconds)
    process.wait()


class Run:
    """One call of the script: folders, environment, log and result."""

    def __init__(self, out: Path, budget: float, wheels: Path | None, commit: str | None) -> None:
        self.begin, self.budget = time.monotonic(), budget
        self.out, self.parts = out, out / "parts"
        self.parts.mkdir(parents=True, exist_ok=True)
        # where a second call on the same machine finds what the first one built
        base = Path(os.environ.get("GEMQ_RUN_DIR", tempfile.gettempdir()))
        self.site, self.built, self.plain = base / "gemq-site", base / "gemq-built", base / "gemq-plain"
        self._link_plain()
        self.log = out / "gpu.log"
        self.names = {
            "python": sys.executable, "out": str(out), "site": str(self.site), "built": str(self.built),
            "ini": str(self.plain / "pytest.ini"),
            }
        self.names = {name: shlex.quote(value) for name, value in self.names.items()}
        found = sorted(wheels.glob("*.whl")) if wheels else []
        self.names |= {"wheels": shlex.join(str(w.resolve()) for w in found), "has_wheels": str(bool(found)).lower()}
        self.log.write_text("")
        self.commit = commit
        self.result: dict = {"kind": "gpu", "budget_s": budget, "conditions": {}, "stages": []}

    def _link_plain(self) -> None:
        """The checkout's python/ and triton_kernels/ side by side, without an extension: enough for the kernels; and
        settings for pytest, as the project's own turn warnings of versions not met before into errors."""
        package = self.plain / "gemq"
        shutil.rmtree(package, ignore_errors=True)
        package.mkdir(parents=True)
        for entry in (ROOT / "python" / "gemq").iterdir():
            if entry.suffix != ".so" and entry.name not in ("triton_kernels", "__pycache__"):
                (package / entry.name).symlink_to(entry)
        (package / "triton_kernels").symlink_to(ROOT / "triton_kernels")
        (self.plain / "pytest.ini").write_text(
            "[pytest]\nmarkers =\n  gpu: needs an NVIDIA GPU\n  slow: takes more than 20 seconds\n"
            f"pythonpath = {ROOT / 'tests'} {ROOT / 'benchmarks'}\npython_files = test_*.py bench_*.py\n"
        )

    def elapsed(self) -> float:
        return time.monotonic() - self.begin

    def environment(self, stage: Stage) -> dict[str, str]:
        built = [self.built] if (self.built / "gemq").is_dir() else [self.plain]
        first = {"plain": [self.plain], "none": [], "best": built}[stage.path]
        path = os.pathsep.join([*map(str, [*first, self.site]), *filter(None, [os.environ.get("PYTHONPATH")])])
        return os.environ | {"PYTHONPATH": path, "GEMQ_COMMIT": self.result["conditions"].get("commit", "")} \
            | stage.environment

    def scrubbed(self, text: str) -> str:
        """Remove the folders of this machine from a text of the result."""
        for folder, name in ((self.out, "out"), (self.built, "built"), (self.site, "site"), (self.plain, "plain"),
                             (ROOT, "."), (Path.home(), "~")):
            text = text.replace(str(folder), name)
        return text

    def conditions(self) -> bool:
        """Record machine, commit and versions in the result; returns True if there is a CUDA device."""
        program = (
            "import sys, json; sys.path.insert(0, 'benchmarks'); import record, torch; "
            "print(json.dumps([record.conditions('bash benchmarks/gpu_run.sh'), torch.cuda.is_available()]))"
        )
        basic = {"machine": "unknown", "commit": "unknown", "date": datetime.date.today().isoformat(),
                 "command": "bash benchmarks/gpu_run.sh"}  # fmt: skip
        try:
            done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True,
                                  timeout=min(60, max(1, self.budget - RESERVE)))  # fmt: skip
            found, cuda = json.loads(done.stdout.splitlines()[-1])
        except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
            found, cuda = basic | {"error": type(error).__name__}, False
        self.result["conditions"] = found | ({"commit": self.commit} if self.commit else {})
        return cuda

    def run(self, stage: Stage, cuda: bool) -> dict:
        """Run a stage, or record the reason for skipping it."""
        limit = limit_of(stage, self.budget, self.elapsed())
        if not cuda:
            return {"outcome": "skipped: no CUDA device"}
        if limit is None:
            return {"outcome": "skipped: the budget is spent"}
        names = self.names | {"json": shlex.quote(str(self.parts / f"{stage.part}.json"))}
        environment = self.environment(stage)
        if stage.probe is not None:
            probe = ["bash", "-c", stage.probe.format(**names)]
            try:
                found = subprocess.run(probe, cwd=ROOT, env=environment, capture_output=True, timeout=min(40, limit))
                able = found.returncode == 0
            except subprocess.TimeoutExpired:
                able = False
            if not able:
                return {"outcome": f"skipped: {stage.missing}"}
            limit = limit_of(stage, self.budget, self.elapsed())
            if limit is None:
                return {"outcome": "skipped: the budget is spent"}
        # a case or a search that is under way at its own limit still has to end
        names["limit"] = str(max(1, limit - 15))
        return self._measured(["bash", "-c", stage.command.format(**names)], stage.name, limit, environment)

    def _measured(self, command: list[str], name: str, limit: int, environment: dict[str, str]) -> dict:
        begin = time.monotonic()
        with self.log.open("a") as log:
            log.write(f"\n== {name}, at most {limit} s\n")
            log.flush()
            at = log.tell()
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, text=True,
                                       start_new_session=True)  # fmt: skip
            try:
                code = process.wait(limit)
                outcome = "done" if code == 0 else f"failed with code {code}"
            except subprocess.TimeoutExpired:
                outcome = f"stopped after {limit} s"
            finally:
                if process.returncode is None:
                    end(process)
        tail = self.log.read_text(errors="replace")[at:].strip().splitlines()[-6:]
        return {"outcome": outcome, "seconds": round(time.monotonic() - begin, 1), "limit_s": limit,
                "tail": [self.scrubbed(line)[:300] for line in tail]}  # fmt: skip

    def gather(self, stage: Stage) -> None:
        """Add the stage's measurements to the result, also if it was stopped."""
        part = self.parts / f"{stage.part}.json"
        if stage.part is not None and part.exists():
            with contextlib.suppress(ValueError):
                self.result[stage.part] = json.loads(self.scrubbed(part.read_text()))
            part.unlink()

    def save(self) -> None:
        self.result["seconds"] = round(self.elapsed(), 1)
        with contextlib.suppress(KeyError, TypeError, ZeroDivisionError):
            if compared := speedups(self.result):
                self.result["speedups"] = compared
        write_json(self.out / "gpu.json", self.result)


def chosen(text: str | None) -> list[Stage]:
    """The stages named, in their order; ``moe=400`` gives one more seconds, ``bench_*`` is all that begin like this.

    ``ValueError`` for a name that is none.
    """
    if text is None:
        return list(STAGES)
    wanted = {}
    for name, _, seconds in (part.partition("=") for part in text.split(",")):
        matching = [s.name for s in STAGES if name.endswith("*") and s.name.startswith(name[:-1])]
        wanted |= dict.fromkeys(matching or [name], seconds)
    unknown = [name for name in wanted if name not in {s.name for s in STAGES}]
    if unknown:
        raise ValueError(f"--stages: {', '.join(unknown)} is none of {', '.join(s.name for s in STAGES)}")
    wrong = [f"{name}={seconds}" for name, seconds in wanted.items() if seconds and not seconds.isdecimal()]
    if wrong:
        raise ValueError(f"--stages: {', '.join(wrong)} must end in a whole number of seconds")
    return [replace(s, seconds=int(wanted[s.name] or s.seconds)) for s in STAGES if s.name in wanted]


def show(stages: list[Stage], budget: float) -> None:
    """Print the stages that would run, and when each would end if every stage took its limit."""
    elapsed = 0.0
    print(f"budget {budget:g} s")
    for stage in stages:
        limit = limit_of(stage, budget, elapsed)
        elapsed += limit or 0
        what = f"at most {limit} s, ends by {elapsed:.0f} s" if limit else "only with time left by those before"
        print(f"{stage.name:<24} {what}\n    {stage.command}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gpu_run.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--default-out", type=Path, default=Path("out"), help=argparse.SUPPRESS)
    parser.add_argument("--wheels", type=Path, help="folder of wheels that the machine lacks")
    parser.add_argument("--stages", help="only these, separated by commas; moe=400 gives one so many seconds, "
                        "bench_* all that begin like this")
    parser.add_argument("--commit", help="what is measured, where the copy is no repository")
    parser.add_argument("--dry-run", action="store_true", help="show the stages and their limits, run nothing")
    options = parser.parse_args(arguments)
    if not options.budget > 0:
        parser.error(f"--budget must be a positive number of seconds, got {options.budget:g}")
    if options.wheels is not None and not options.wheels.is_dir():
        parser.error(f"--wheels: {options.wheels} is no folder")
    try:
        options.stages = chosen(options.stages)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Run the stages; 0 unless one of them failed."""
    options = _options(arguments)
    if options.dry_run:
        show(options.stages, options.budget)
        return 0
    # a call that is ended from outside still ends its stage and writes what it has
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run = Run((options.out or options.default_out).resolve(), options.budget, options.wheels, options.commit)
    cuda = run.conditions()
    for stage in options.stages:
        row = {"stage": stage.name, "outcome": "interrupted"}
        try:
            row |= run.run(stage, cuda)
        finally:
            run.gather(stage)
            run.result["stages"].append(row)
            run.save()
        say(f"{stage.name:<24} {row['outcome']}" + (f", {row['seconds']:g} s" if "seconds" in row else ""))
        for line in row.get("tail", [])[-2:]:
            say(f"    {line}")
    shutil.rmtree(run.parts, ignore_errors=True)
    return int(any(row["outcome"].startswith("failed") for row in run.result["stages"]))


if __name__ == "__main__":
    sys.exit(main())
