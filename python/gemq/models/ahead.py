"""Layers of multi-token prediction: in published checkpoints, and in no model of transformers."""

from __future__ import annotations

import re
from typing import Any


def is_ahead(model: Any, name: str) -> bool:
    """True for a tensor of a checkpoint that is of such a layer by its name: ``mtp.``, or what the family's class says.

    transformers ignores them by ``_keys_to_ignore_on_load_unexpected``; a text model's class ignores its wrapper's
    vision tower there as well, which is none of them.
    """
    if name.startswith("mtp."):
        return True
    patterns = getattr(type(model), "_keys_to_ignore_on_load_unexpected", None) or ()
    return any("visual" not in pattern and re.search(pattern, name) for pattern in patterns)
