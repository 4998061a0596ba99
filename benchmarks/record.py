"""Put a measured result under ``benchmarks/results`` with its conditions: machine, commit, date, versions, command.

    python benchmarks/record.py demo demo-out/table.json --command "make demo"     # demo-<date>.json
    python benchmarks/record.py moe-cpu rows.json                                  # moe-cpu-<date>.json
    python benchmarks/record.py gpu out/gpu.json                                   # <gpu>-<date>.json

A result that holds its own conditions keeps them. ``docs/update_tables.py`` renders tables from these files.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "triton", "transformers", "numpy", "gemq")


def machine() -> str:
    """The GPU if there is one, else the processor and its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}, CPU only"


def commit() -> str:
    """The checkout's commit, with a plus sign if files differ from it; ``unknown`` outside a repository."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        # measured figures and built files do not make another program
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of the installed packages that matter, and of CUDA and its driver if there is one."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    import torch

    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(smi, capture_output=True, text=True, check=True, timeout=20)
            found["driver"] = done.stdout.strip().splitlines()[0]
        except (OSError, subprocess.SubprocessError, IndexError):
            pass
    return found


def conditions(command: str) -> dict:
    """Conditions under which a figure was measured: machine, commit, date, command, versions, threads, load."""
    import torch

    return {
        "machine": machine(), "commit": os.environ.get("GEMQ_COMMIT") or commit(),
        "date": datetime.date.today().isoformat(), "command": command, **versions(),
        "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 1),
    }


def file_name(kind: str, content: dict) -> str:
    """``<kind>-<date>.json``; of kind ``gpu`` the device's name takes its place."""
    given = content["conditions"]
    name = re.sub(r"[^a-z0-9]+", "-", given["machine"].lower()).strip("-") if kind == "gpu" else kind
    return f"{name}-{given['date']}.json"


def recorded(kind: str, result: object, command: str | None, title: str = "", commit: str | None = None) -> dict:
    """The result with its conditions; its own come first. ``ValueError`` if neither it nor the caller has a command."""
    content = {"rows": result} if isinstance(result, list) else dict(result)
    if "conditions" not in content:
        if command is None:
            raise ValueError("this result does not say how it was measured: give --command")
        content = {"title": title, "conditions": conditions(command), **content}
    content = {"kind": kind, "title": title} | content | {"kind": kind}
    given = dict(content["conditions"])
    if command is not None:
        given["command"] = command
    if commit is not None:
        given["commit"] = commit
    return content | {"conditions": given}


def main() -> None:
    """Wrap the JSON and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", help="prefix of the file name: demo, reproduction, moe-cpu, gpu, ...")
    parser.add_argument("result", type=Path, help="JSON: a list of rows, or an object")
    parser.add_argument("--command", help="what was run")
    parser.add_argument("--title", default="", help="a sentence for the table's head")
    parser.add_argument("--commit", help="of the run, if it was not the present one")
    options = parser.parse_args()
    try:
        result = json.loads(options.result.read_text())
        content = recorded(options.kind, result, options.command, options.title, options.commit)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {options.result}: {error}")
    target = ROOT / "benchmarks" / "results" / file_name(options.kind, content)
    target.parent.mkdir(exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, target)
    print(target.relative_to(ROOT))


if __name__ == "__main__":
    main()
