"""Imports: help and ``import gemq`` load nothing heavy, loading a checkpoint nothing of quantizing."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_models import quantized

import gemq
from gemq.checkpoint import save_packed

HEAVY = ("torch", "transformers", "triton", "numpy", "scipy", "matplotlib", "datasets")
# what quantizing needs and running does not
QUANTIZING = ("gemq.engine", "gemq.planning", "gemq.algorithms.allocation", "gemq.algorithms.method",
              "gemq.pipeline", "mip", "scipy", "datasets")  # fmt: skip
# seconds of processor time, whatever else the machine does; torch alone takes more
PATIENCE = 2.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = quantized("mixtral", tune=False)
    return save_packed(made.packed, made.config, tmp_path_factory.mktemp("lazy") / "model", dtype=torch.bfloat16)


def loaded(program, *arguments):
    """The modules in a new Python after a program, and what it printed before."""
    tail = "\nimport json, sys\nprint()\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program + tail, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    *shown, last = done.stdout.splitlines()
    return json.loads(last), "\n".join(shown).strip()


def present(names, modules):
    return [name for name in names if any(m == name or m.startswith(name + ".") for m in modules)]


def test_import_gemq_is_a_name_and_a_hook():
    modules, _ = loaded("import gemq\ngemq.__version__, dir(gemq)")
    assert not present(HEAVY, modules)
    assert [m for m in modules if m.startswith("gemq")] == ["gemq", "gemq.transformers_hook"]


@pytest.mark.parametrize("arguments", [
    ["--help"], ["quantize", "--help"], ["quantize", "--help-all"], ["generate", "--help"], ["plan", "--help"],
    ["bench", "--help"], ["--version"], ["settings", "--example"], ["auto-import", "status"],
    ["quantize", "--bitz", "2"], ["eval"],
])  # fmt: skip
def test_help_and_errors_of_usage_load_nothing_heavy(arguments):
    program = f"from gemq.cli.run import run\nrun({arguments!r})"
    started = os.times().children_user
    modules, _ = loaded(program)
    assert not present(HEAVY, modules)
    assert os.times().children_user - started < PATIENCE


def test_completion_loads_nothing_heavy():
    program = (
        "import os, sys\nos.environ.update(_GEMQ_COMPLETE='complete_bash', COMP_WORDS='gemq quan', COMP_CWORD='1')\n"
        "sys.argv = ['gemq']\nfrom gemq.cli.run import run\n"
        "try:\n    run([])\nexcept SystemExit:\n    pass"
    )
    modules, shown = loaded(program)
    assert shown == "quantize" and not present(HEAVY, modules)


def test_a_checkpoint_loads_without_what_quantizing_needs(checkpoint):
    program = "import gemq, sys\nprint(type(gemq.from_pretrained(sys.argv[1]).model.layers[0].mlp.experts).__name__)"
    modules, shown = loaded(program, checkpoint)
    assert shown == "LowBitExperts" and not present(QUANTIZING, modules)


@pytest.mark.parametrize("order", [
    "import gemq, transformers", "import transformers, gemq.checkpoint",
    pytest.param("import transformers.modeling_utils, gemq", marks=pytest.mark.slow),
    pytest.param("import gemq.hf, transformers", marks=pytest.mark.slow),
])  # fmt: skip
def test_transformers_knows_gemq_whichever_comes_first(checkpoint, order):
    program = (
        f"import sys\n{order}\nmodel = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].mlp.experts).__name__)"
    )
    modules, shown = loaded(program, checkpoint)
    assert shown.splitlines()[-1] == "LowBitExperts" and not present(QUANTIZING, modules)


def test_another_model_never_imports_the_plug_in():
    modules, _ = loaded("import gemq\nfrom transformers import AutoModelForCausalLM, modeling_utils")
    assert "gemq.hf" not in modules and "transformers.quantizers.auto" in modules


def test_ops_are_registered_with_their_module():
    modules, shown = loaded("import gemq, torch\ngemq.ops\nprint(torch.ops.gemq.moe_lowbit_gemm)")
    assert shown == "gemq.moe_lowbit_gemm" and "transformers" not in modules


def test_every_public_name_is_found_where_type_checkers_look():
    tree = ast.parse(Path(gemq.__file__).read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {alias.name: node.module for node in checked.body for alias in node.names}
    assert sorted(homes) == gemq.__all__ and set(gemq.__all__) <= set(dir(gemq))
    for name, home in homes.items():
        assert home == ("gemq" if name in ("hf", "ops") else gemq._HOME_OF[name])
        assert getattr(gemq, name) is not None
    assert set(gemq._HOME_OF) == set(homes) - {"hf", "ops"}
    with pytest.raises(AttributeError, match="module 'gemq' has no attribute 'quantise'"):
        gemq.quantise  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'quantise'"):
        from gemq import quantise  # noqa: F401
