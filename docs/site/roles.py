"""Docstrings here use reStructuredText's roles and literal blocks; the site reads Markdown."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:func|class|mod|data|meth|attr):`~?\.?([^`]+)`")
_LITERAL = re.compile(r"::(\s*\n)")


def markdown(text: str) -> str:
    """``:func:`gemq.quantize``` as `gemq.quantize`, and ``::`` before an indented block as ``:``."""
    return _LITERAL.sub(r":\1", _ROLE.sub(r"`\1`", text))


class Roles(griffe.Extension):
    """Rewrites every docstring as it is collected."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Called by griffe for each module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
