"""gemq: quantize the experts of Mixture-of-Experts language models globally, and run them packed.

>>> import gemq
>>> gemq.quantize("mistralai/Mixtral-8x7B-v0.1", "mixtral-2.5", bits=2.5)
>>> model = gemq.from_pretrained("mixtral-2.5")

After ``import gemq``, ``transformers.AutoModelForCausalLM.from_pretrained`` loads such folders too. ``import gemq``
itself imports neither torch nor transformers: each name below is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gemq import transformers_hook as _hook  # noqa: F401  (tells transformers about gemq)

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gemq import hf, ops
    from gemq.api import allocate, preview, quantize
    from gemq.checkpoint import from_pretrained, save_packed
    from gemq.continuation import generate, stream
    from gemq.errors import (
        CalibrationError,
        CheckpointError,
        GemqError,
        NumberError,
        OutOfMemoryError,
        UnsupportedModelError,
    )
    from gemq.generation import Generation, GenerationOptions
    from gemq.integrity import Verification, verify
    from gemq.outcome import QuantizeOutcome
    from gemq.pipeline import QuantizeConfig, evaluate
    from gemq.recipes import Recipe, quantize_config

__all__ = [
    "CalibrationError",
    "CheckpointError",
    "GemqError",
    "Generation",
    "GenerationOptions",
    "NumberError",
    "OutOfMemoryError",
    "QuantizeConfig",
    "QuantizeOutcome",
    "Recipe",
    "UnsupportedModelError",
    "Verification",
    "allocate",
    "evaluate",
    "from_pretrained",
    "generate",
    "hf",
    "ops",
    "preview",
    "quantize",
    "quantize_config",
    "save_packed",
    "stream",
    "verify",
]

# the modules and the names that each holds; hf and ops are modules themselves
_HOMES = {
    "gemq.api": ("allocate", "preview", "quantize"),
    "gemq.checkpoint": ("from_pretrained", "save_packed"),
    "gemq.continuation": ("generate", "stream"),
    "gemq.errors": ("CalibrationError", "CheckpointError", "GemqError", "NumberError", "OutOfMemoryError",
                    "UnsupportedModelError"),
    "gemq.generation": ("Generation", "GenerationOptions"),
    "gemq.integrity": ("Verification", "verify"),
    "gemq.outcome": ("QuantizeOutcome",),
    "gemq.pipeline": ("QuantizeConfig", "evaluate"),
    "gemq.recipes": ("Recipe", "quantize_config"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in ("hf", "ops"):
        return import_module(f"gemq.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gemq' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
