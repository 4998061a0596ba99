"""Run the tests that reach C++ on another build of the extension (``make sanitize``, ``make clang``).

``python tests/run_build.py FOLDER [pytest arguments]`` loads ``_C`` from FOLDER in place of the installed one. For a
sanitized build LD_PRELOAD must name libasan, which has to come before everything else in the process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from substitution import Substitute, extension

TESTS = Path(__file__).resolve().parent
FILES = (
    "test_core_bits.py", "test_core_moe.py", "test_core_properties.py", "test_core_threads.py", "test_guard_pages.py",
    "test_pack_emulated.py", "test_decode_program.py", "test_ops.py", "test_ops_errors.py", "test_gptq.py",
    "test_refinement.py",
)  # fmt: skip


def main(folder: Path, *arguments: str) -> int:
    """pytest's exit status."""
    if os.environ.get("GEMQ_SANITIZE") and "asan" not in os.environ.get("LD_PRELOAD", ""):
        raise SystemExit("LD_PRELOAD must name libasan: call this through `make sanitize`")
    found = sorted(folder.glob("_C*.so"))
    if len(found) != 1:
        raise SystemExit(f"{folder} must hold one _C*.so, found {len(found)}")
    # capture=sys: what a sanitizer says goes straight to the terminal
    given = arguments or ("-q", "-x", *(str(TESTS / name) for name in FILES))
    substitute = Substitute(lambda: extension(found[0]))
    return int(pytest.main(["-p", "no:cacheprovider", "--capture=sys", *given], plugins=[substitute]))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), *sys.argv[2:]))
