"""Loads the compiled extension, or says how to build it."""

from __future__ import annotations

from functools import cache
from types import ModuleType


@cache
def core() -> ModuleType:
    """Return the compiled extension ``gemq._C``. Raises ``ImportError`` with instructions if it cannot be loaded."""
    import torch  # noqa: F401  (first, so that the extension shares torch's OpenMP runtime)

    try:
        from gemq import _C
    except ImportError as error:
        raise ImportError(
            f"gemq's compiled extension gemq._C could not be loaded ({error}). Build it from the repository's root "
            "with `pip install -e .` (needs a C++17 compiler; nvcc adds the CUDA kernels)."
        ) from error
    return _C
