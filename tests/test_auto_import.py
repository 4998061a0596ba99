"""The hook that lets transformers load gemq checkpoints without ``import gemq``, and what happens without it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from packed_models import quantized

from gemq import auto_import
from gemq.checkpoint import save_packed
from gemq.cli.run import run
from gemq.errors import GemqError

LOAD = (
    "import sys\n"
    "from transformers import AutoModelForCausalLM\n"
    "before = 'gemq' in sys.modules\n"
    "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
    "print(before, type(model.model.layers[0].mlp.experts).__name__)\n"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    made = quantized("mixtral", tune=False)
    return save_packed(made.packed, made.config, tmp_path_factory.mktemp("hook") / "model", dtype=torch.bfloat16)


@pytest.fixture
def site(tmp_path):
    """A folder for the hook, and a way to start Python so that it reads the folder as one of its own."""
    where = tmp_path / "site"
    where.mkdir()

    def python(program, *arguments, packages=True):
        # -S leaves out site-packages; they come back, if wanted, with the folder's .pth files run as at a start
        paths = [str(where)] + ([sysconfig.get_path("purelib")] if packages else [])
        start = f"import site\nfor path in {paths!r}:\n    site.addsitedir(path)\n"
        command = [sys.executable, "-S", "-c", start + program, *map(str, arguments)]
        # a command that ran in this process may have silenced transformers
        env = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=env)

    return where, python


def test_transformers_loads_a_checkpoint_by_itself(site, checkpoint):
    where, python = site
    assert auto_import.turn_on(where) and auto_import.is_on(where)
    done = python(LOAD, checkpoint)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "LowBitExperts"


def test_without_it_transformers_warns_and_fills_in_random_weights(site, checkpoint):
    """The failure that the documentation shows: ``gemq.from_pretrained`` or the hook is needed."""
    _, python = site
    done = python(LOAD, checkpoint)
    shown = done.stdout + done.stderr
    assert "Unknown quantization type, got gemq" in shown
    assert "LowBitExperts" not in done.stdout
    if done.returncode == 0:
        assert "MISSING" in shown


def test_a_start_of_python_imports_neither_transformers_nor_gemq(site):
    where, python = site
    auto_import.turn_on(where)
    done = python("import sys\nprint([n for n in ('gemq', 'transformers', 'torch', 'warnings') if n in sys.modules])")
    assert done.stdout.strip() == "[]" and done.stderr == ""
    names = python("import sys\nprint(sys.modules['_gemq_auto_import'].__file__)")
    assert names.stdout.strip() == str(where / auto_import.MODULE_FILE)


@pytest.mark.parametrize("broken", ["no module", "bad module", "no gemq"])
def test_nothing_breaks_when_parts_are_gone(site, broken):
    where, python = site
    auto_import.turn_on(where)
    module = where / auto_import.MODULE_FILE
    if broken == "no module":
        module.unlink()
    elif broken == "bad module":
        module.write_text("raise RuntimeError('broken')\n")
    done = python("print('started')", packages=broken != "no gemq")
    assert (done.returncode, done.stdout, done.stderr) == (0, "started\n", "")
    if broken == "no gemq":
        _fake_transformers(where)
        program = "import sys, transformers.quantizers.auto as m\n"
        program += "print(m.here, m.AUTO_QUANTIZER_MAPPING, 'gemq' in sys.modules)"
        done = python(program, packages=False)
        assert (done.stdout, done.stderr) == ("True {} False\n", "")


def _fake_transformers(where):
    folder = where / "transformers" / "quantizers"
    folder.mkdir(parents=True)
    for path in (folder.parent / "__init__.py", folder / "__init__.py"):
        path.write_text("")
    (folder / "auto.py").write_text(
        "here = __spec__.loader is __loader__\nAUTO_QUANTIZER_MAPPING = {}\nAUTO_QUANTIZATION_CONFIG_MAPPING = {}\n"
    )


def test_a_broken_gemq_leaves_transformers_usable_and_says_so(site):
    where, python = site
    auto_import.turn_on(where)
    _fake_transformers(where)
    (where / "gemq").mkdir()
    (where / "gemq" / "__init__.py").write_text("raise ImportError('no extension')\n")
    program = "import transformers.quantizers.auto as m\nprint(type(m.__loader__).__name__)\n"
    done = python(program, packages=False)
    assert (done.stdout, done.stderr) == ("SourceFileLoader\n", "")
    done = python(program + "m.AUTO_QUANTIZATION_CONFIG_MAPPING['gemq'].from_dict({})", packages=False)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: this is a gemq checkpoint, and gemq could not be imported (ImportError: no extension)"
    )


def test_import_gemq_first_is_not_disturbed(site, checkpoint):
    where, python = site
    auto_import.turn_on(where)
    done = python("import gemq\n" + LOAD, checkpoint)
    assert done.returncode == 0 and done.stdout.split() == ["True", "LowBitExperts"], done.stderr


def test_on_off_and_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(auto_import, "folder", lambda: tmp_path)
    for arguments, shown, files in (
        (["status"], "off", 0), (["on"], "on: wrote", 2), (["status"], "on (", 2), (["on"], "on: wrote", 2),
        (["off"], "off: removed", 0), (["off"], "off: there was nothing", 0), ([], "off", 0),
    ):
        assert run(["auto-import", *arguments]) == 0
        assert capsys.readouterr().out.startswith(shown)
        assert len(list(tmp_path.iterdir())) == files
    assert run(["auto-import", "maybe"]) == 2


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    missing = tmp_path / "none"
    with pytest.raises(GemqError, match=r"cannot be written \(No such file"):
        auto_import.turn_on(missing)
    auto_import.turn_on(tmp_path)
    (tmp_path / auto_import.MODULE_FILE).write_text("# of an older version\n")
    assert not auto_import.is_on(tmp_path)
    assert len(auto_import.turn_off(tmp_path)) == 2


def test_the_hook_is_one_line_that_python_runs():
    (line,) = auto_import.PTH_LINE.splitlines()
    assert line.startswith("import ")
    compile(auto_import.MODULE, "hook", "exec")
    assert auto_import.folder() == Path(sysconfig.get_path("purelib"))
