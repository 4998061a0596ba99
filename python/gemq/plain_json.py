"""Write JSON that every reader accepts: numbers that are not finite become null, values of other types become text."""

from __future__ import annotations

import json
import math
from typing import Any


def plain(value: Any) -> Any:
    """``value`` with keys as texts, tuples as lists, and None for a number that is not finite."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def dumps(value: Any, indent: int | None = None) -> str:
    """``value`` as strict JSON."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)
