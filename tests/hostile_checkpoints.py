"""Copies of a tiny packed checkpoint for tests of what strangers may put into one."""

from __future__ import annotations

import pytest
from broken_checkpoints import LOADERS, META, a_folder, a_made, a_sharded, edit_json, refused, save_both

from gemq.cli.run import run

__all__ = [
    "LOADERS", "META", "a_folder", "a_gemq_run", "a_made", "a_saved", "a_sharded", "edit_json", "refused",
]  # fmt: skip


@pytest.fixture(name="saved", scope="module")
def a_saved(made, tmp_path_factory):
    return save_both(made, tmp_path_factory.mktemp("pristine"), "12KB")


@pytest.fixture(name="gemq_run")
def a_gemq_run(capsys):
    """Run a command in this process: ``(exit code, standard output, lines of standard error)``."""

    def call(*arguments):
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line.strip()]

    return call
