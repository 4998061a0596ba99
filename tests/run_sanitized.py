"""Run the tests that reach C++ on a sanitized build of the extension (``make sanitize``).

``python tests/run_sanitized.py FOLDER [pytest arguments]`` loads ``_C`` from FOLDER in place of the installed one;
LD_PRELOAD must name libasan, which has to come before everything else in the process.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
FILES = (
    "test_core_bits.py", "test_core_moe.py", "test_core_properties.py", "test_core_threads.py", "test_guard_pages.py",
    "test_pack_emulated.py", "test_ops.py", "test_ops_errors.py",
)  # fmt: skip


def substitute(path: Path) -> None:
    """Load the extension from ``path``, before a conftest or a test module imports gemq."""
    import torch  # noqa: F401  (first, as in gemq._core)

    spec = importlib.util.spec_from_file_location("gemq._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["gemq._C"] = module
    from gemq._core import core

    if Path(core().__file__) != path:
        raise SystemExit(f"the tests would run {core().__file__}")


def main(folder: Path, *arguments: str) -> int:
    """pytest's exit status."""
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        raise SystemExit("LD_PRELOAD must name libasan: call this through `make sanitize`")
    found = sorted(folder.glob("_C*.so"))
    if len(found) != 1:
        raise SystemExit(f"{folder} must hold one _C*.so, found {len(found)}")
    substitute(found[0])
    import pytest

    # capture=sys: what a sanitizer says goes straight to the terminal
    given = arguments or ("-q", "-x", *(str(TESTS / name) for name in FILES))
    return int(pytest.main(["-p", "no:cacheprovider", "--capture=sys", *given]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), *sys.argv[2:]))
