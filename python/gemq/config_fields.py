"""Read fields of transformers configs, some of which differ from layer to layer."""

from __future__ import annotations

from typing import Any


def field(config: Any, name: str, default: Any = None) -> Any:
    """A field of a transformers config; ``default`` if it has none, or one value a layer (a head size of Gemma 4)."""
    try:
        return getattr(config, name, default)
    except Exception as error:
        if "PerLayer" in type(error).__name__:
            return default
        raise
