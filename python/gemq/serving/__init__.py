"""Plug-ins for vLLM and SGLang: both find the functions here by their entry points when gemq is installed.

``vllm.general_plugins`` calls :func:`register_vllm`, ``sglang.srt.plugins`` calls :func:`register_sglang`. Written
against vLLM 0.33 and SGLang 0.5.23; with another version whose interfaces differ, a warning says so and the server runs
on without gemq's checkpoints.
"""

from __future__ import annotations

import warnings

VLLM_VERSION = "0.33"
SGLANG_VERSION = "0.5.23"


def register_vllm() -> None:
    """Make vLLM load checkpoints of ``quant_method`` gemq. Called in every process of vLLM; twice is once."""
    try:
        from gemq.serving import vllm_methods
    except (ImportError, AttributeError) as error:
        _warn("vLLM", VLLM_VERSION, error)
        return
    vllm_methods.register()


def register_sglang() -> None:
    """Make SGLang load checkpoints of ``quant_method`` gemq. Called in every process of SGLang; twice is once."""
    try:
        from gemq.serving import sglang_methods
    except (ImportError, AttributeError) as error:
        _warn("SGLang", SGLANG_VERSION, error)
        return
    sglang_methods.register()


def _warn(name: str, version: str, error: Exception) -> None:
    warnings.warn(
        f"gemq's plug-in for {name} is written for {name} {version} and found another interface ({error}): gemq "
        "checkpoints will not load here, all others will", RuntimeWarning, stacklevel=3,
    )
