"""Check the built extension: its own account of itself, the libraries it links to, and the contents of the archives."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import gemq.triton_kernels
from gemq import format as fmt
from gemq._core import core

ROOT = Path(__file__).resolve().parents[1]


def test_build_info_is_coherent() -> None:
    info = core().build_info()
    assert core().cuda_built() == (info["cuda"] is not None)
    assert bool(info["archs"]) == core().cuda_built()
    if info["cuda"] is not None:
        assert re.fullmatch(r"\d+\.\d+", info["cuda"])
        assert {"sm_80", "sm_90"} <= set(info["archs"])
    assert re.match(r"(GNU|Clang|AppleClang) \d+", info["compiler"])
    assert isinstance(info["openmp"], bool)
    assert "portable" in info["cpu_variants"]
    assert core().cpu_isa() in info["cpu_variants"]
    assert info["tile_rows"] == {"cpu_tile": fmt.CPU_ROWS, "gpu_tile": fmt.GPU_ROWS}


def test_the_stub_names_what_the_extension_has() -> None:
    """Functions and their keywords, classes and their methods; those that pybind11 binds are named in their docs."""
    tree = ast.parse((ROOT / "python" / "gemq" / "_C.pyi").read_text(encoding="utf-8"))
    stub = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    del stub["BuildInfo"]
    built = {name: value for name, value in vars(core()).items() if not name.startswith("_")}
    assert set(stub) == set(built)
    assert set(core().build_info()) == {
        line.target.id for node in tree.body if getattr(node, "name", "") == "BuildInfo" for line in node.body
    }
    for name, node in stub.items():
        if isinstance(node, ast.ClassDef):
            methods = {line.name: line for line in node.body if isinstance(line, ast.FunctionDef)}
            own = {method for method in vars(built[name]) if not method.startswith("_")}
            assert {method for method in methods if method != "__init__"} == own, name
            for method, line in methods.items():
                said = getattr(built[name], method).__doc__
                assert all(f"{argument.arg}: " in said for argument in line.args.args[1:]), (name, method)
        elif node.args.kwonlyargs:
            parameters = inspect.signature(built[name]).parameters
            assert [a.arg for a in node.args.kwonlyargs] == list(parameters), name
            optional = [default is not None for default in node.args.kw_defaults]
            held = [p.default is not inspect.Parameter.empty for p in parameters.values()]
            assert optional == held, name


def test_triton_kernels_is_part_of_the_package() -> None:
    assert gemq.triton_kernels.__name__ == "gemq.triton_kernels"


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_extension_links_neither_torch_nor_the_cuda_runtime() -> None:
    lines = subprocess.run(["readelf", "-d", core().__file__], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", lines)
    assert any(name.startswith("libc.so") for name in needed)
    foreign = [name for name in needed if re.match(r"lib(torch|c10|cudart|cuda|nvrtc)", name)]
    assert not foreign


def run_with_isa(name: str) -> subprocess.CompletedProcess[str]:
    program = "from gemq._core import core; print(core().cpu_isa())"
    env = {**os.environ, "GEMQ_CPU_ISA": name}
    return subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)


def test_the_environment_forces_a_variant() -> None:
    assert run_with_isa("portable").stdout.strip() == "portable"
    refused = run_with_isa("mmx")
    assert refused.returncode != 0
    assert "GEMQ_CPU_ISA must be one of avx512vnni, " in refused.stderr


@pytest.mark.slow
def test_the_archives_hold_what_they_should(tmp_path: Path) -> None:
    """Builds the sdist, and from it a wheel, without CUDA to keep it short."""
    env = {**os.environ, "SKBUILD_CMAKE_ARGS": "-DGEMQ_CUDA=OFF", "CMAKE_BUILD_PARALLEL_LEVEL": "2"}
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    with tarfile.open(sdist) as archive:
        inside = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"pyproject.toml", "CMakeLists.txt", "csrc/bindings.cpp", "csrc/pack/pack.cu"} <= inside
    assert {"python/gemq/format.py", "triton_kernels/__init__.py", "tests/stacks.py"} <= inside
    assert not [name for name in inside if name.startswith((".venv", "build/", "examples/demo_model/text"))]
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    assert {"gemq/__init__.py", "gemq/format.py", "gemq/triton_kernels/__init__.py"} <= inside
    assert [name for name in inside if re.fullmatch(r"gemq/_C\..*\.so", name)]
    assert not [name for name in inside if name.endswith((".cpp", ".cu", ".h", ".pyc"))]
    demo = {f"gemq/demo/{p.name}" for p in (ROOT / "python/gemq/demo").glob("*.*") if p.is_file()}
    assert demo <= inside
