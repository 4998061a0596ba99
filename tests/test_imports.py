"""The package's layers: which module may import which, read from the sources without importing anything."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python" / "gemq"
KERNELS = ROOT / "triton_kernels"

# Each row may import the rows above it and nothing else of the package; `gemq` is the package's own __init__.
LAYERS = [
    ("activation", "auto_class", "choices", "config_fields", "errors", "format", "transformers_hook",
     "transformers_versions", "_C"),
    ("launch",),
    ("ambient", "auto_import", "folders", "plain_json", "tensor_files", "time_limit", "widths"),
    ("_core", "triton_kernels", "reference", "integrity", "durable", "distributed"),
    ("shards", "output_folder", "model_config"),
    ("staging",),
    ("ops",),
    ("nn",),
    ("models",),
    ("algorithms", "packed_config", "packed_model"),
    ("hf",),
    ("checkpoint", "evaluations", "logits_file"),
    ("loading",),
    ("generation", "engine"),
    ("run_log",),
    ("planning",),
    ("checkpoint_summary",),
    ("card",),
    ("outcome",),
    ("pipeline", "hub", "serving", "interchange", "tasks"),
    ("continuation", "dry_run"),
    ("recipes",),
    ("api",),
    ("gemq",),
    ("bench", "demo", "report", "server"),
    ("cli",),
    ("__main__",),
]
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}

# Who alone may import what: kernels are reached through the ops.
ONLY = {"_C": {"_core"}, "_core": {"ops"}, "triton_kernels": {"ops"}}

# Imports inside functions that point back, and why.
EXCEPTIONS = {
    ("transformers_hook", "hf"): "what stands for hf's classes imports them when the first checkpoint is loaded",
}

UNITS = sorted({path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in PACKAGE.glob("[!.]*")} - {
    "__pycache__", "triton_kernels", "_C.pyi", "py.typed"
})  # fmt: skip


def sources(unit: str) -> list[Path]:
    if unit == "__init__":
        return [PACKAGE / "__init__.py"]
    folder = PACKAGE / unit
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{unit}.py"]


def unit_of(module: str, name: str | None = None) -> str | None:
    """The unit that an absolute import reaches; None outside the package, and for the version."""
    first, *rest = module.split(".")
    if first != "gemq" or (not rest and name == "__version__"):
        return None
    unit = rest[0] if rest else name
    return unit if unit in RANK or unit in UNITS else "gemq"


def absolute(node: ast.ImportFrom, path: Path) -> str:
    """The module that ``from`` names, relative ones resolved."""
    if not node.level:
        return node.module or ""
    parents = path.relative_to(PACKAGE.parent).with_suffix("").parts[: -node.level]
    return ".".join([*parents, *filter(None, [node.module])])


def imported(text: str, path: Path) -> list[tuple[str, int]]:
    """``(unit, line)`` of every import of the package in a source, at any depth."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(unit_of(alias.name), node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(unit_of(absolute(node, path), alias.name), node.lineno) for alias in node.names]
    return [(unit, line) for unit, line in found if unit]


def arrows_back(unit: str, text: str, path: Path) -> list[tuple[str, int]]:
    """Imports that the layers forbid."""
    return [
        (target, line)
        for target, line in imported(text, path)
        if target != unit and (RANK[target] >= RANK[unit] or unit not in ONLY.get(target, {unit}))
    ]


@pytest.mark.parametrize("unit", UNITS)
def test_imports_point_one_way(unit: str) -> None:
    name = "gemq" if unit == "__init__" else unit
    assert name in RANK, f"{unit} has no place in LAYERS"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in sources(unit)
        for target, line in arrows_back(name, path.read_text(), path)
        if (name, target) not in EXCEPTIONS
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("unit, target", EXCEPTIONS)
def test_exceptions_are_inside_functions_and_needed(unit: str, target: str) -> None:
    tops = [
        line
        for path in sources(unit)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for found, line in imported(ast.unparse(node), path)
        if found == target
    ]
    assert not tops
    assert any(t == target for path in sources(unit) for t, _ in imported(path.read_text(), path))


def test_loading_needs_no_method() -> None:
    """Modules that read checkpoints import nothing of how one is made."""
    for unit in ("widths", "models", "packed_config", "packed_model", "hf", "checkpoint"):
        found = {target for path in sources(unit) for target, _ in imported(path.read_text(), path)}
        assert not found & {"algorithms", "engine", "planning", "pipeline"}, unit


@pytest.mark.parametrize("unit, text, forbidden", [
    ("nn", "from gemq.models import describe", ["models"]),
    ("nn", "def f():\n    import gemq.hf", ["hf"]),
    ("nn", "from gemq import cli, ops", ["cli"]),
    ("nn", "import gemq", ["gemq"]),
    ("nn", "from .. import pipeline", ["pipeline"]),
    ("nn", "from ..checkpoint import save_packed", ["checkpoint"]),
    ("nn", "from gemq._core import core", ["_core"]),
    ("ops", "from gemq import _C", ["_C"]),
    ("checkpoint", "from gemq import triton_kernels", ["triton_kernels"]),
    ("nn", "from gemq import __version__, format\nfrom .linear import LowBitLinear\nimport torch", []),
    ("ops", "from gemq._core import core\nfrom gemq.triton_kernels import moe_gemm", []),
])  # fmt: skip
def test_the_reader_finds_them(unit: str, text: str, forbidden: list[str]) -> None:
    path = PACKAGE / unit / "module.py"
    assert [target for target, _ in arrows_back(unit, text, path)] == forbidden


def test_triton_kernels_stand_alone() -> None:
    """torch, triton, the standard library and themselves: the folder is published on its own too."""
    allowed = {"torch", "triton"} | sys.stdlib_module_names
    for path in KERNELS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{path.name}:{node.lineno} reaches out of the folder"
                names = [node.module] if node.level == 0 else []
            else:
                continue
            assert {name.partition(".")[0] for name in names} <= allowed, f"{path.name}:{node.lineno}"


def code_files() -> list[Path]:
    """Everything written by hand under python/, triton_kernels/ and csrc/."""
    endings = {".py", ".cpp", ".cu", ".h", ".hpp", ".cuh"}
    files = [path for top in ("python", "triton_kernels", "csrc") for path in (ROOT / top).rglob("*")]
    return [path for path in files if path.suffix in endings and "__pycache__" not in path.parts]


def test_no_file_is_a_dumping_ground() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    files = code_files()
    assert len(files) > 60
    assert not [str(p.relative_to(ROOT)) for p in files if vague & {part.partition(".")[0] for part in p.parts[-3:]}]


def test_no_file_is_long() -> None:
    lengths = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in code_files()}
    assert not {name: lines for name, lines in lengths.items() if lines > 400}
