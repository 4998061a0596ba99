"""Put a measured result under ``benchmarks/results`` with its conditions: machine, commit, date, versions, command.

``python benchmarks/record.py demo demo-out/table.json --command "make demo"`` writes ``demo-<date>.json``;
``docs/update_tables.py`` renders the README's tables from these files.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def machine() -> str:
    """The GPU if there is one, else the processor and its cores."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor()}, CPU only"


def conditions(command: str) -> dict[str, str]:
    """What a figure needs beside it."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {
        "machine": machine(), "commit": git.stdout.strip(), "date": datetime.date.today().isoformat(),
        "command": command, "python": platform.python_version(), "torch": version("torch"),
        "triton": version("triton"), "transformers": version("transformers"),
    }


def main() -> None:
    """Wrap the JSON and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", help="prefix of the file name: demo, reproduction, ...")
    parser.add_argument("result", type=Path, help="JSON: a list of rows, or an object")
    parser.add_argument("--command", required=True, help="what was run")
    parser.add_argument("--title", default="", help="a sentence for the table's head")
    parser.add_argument("--commit", help="of the run, if it was not the present one")
    options = parser.parse_args()
    content = json.loads(options.result.read_text())
    content = {"rows": content} if isinstance(content, list) else content
    content = {"title": options.title, "conditions": conditions(options.command), **content}
    content["conditions"]["commit"] = options.commit or content["conditions"]["commit"]
    target = ROOT / "benchmarks" / "results" / f"{options.kind}-{datetime.date.today().isoformat()}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
