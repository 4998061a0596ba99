"""``gemq auto-import``: whether transformers finds gemq by itself."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from gemq import auto_import as hook
from gemq.cli import display


class Switch(StrEnum):
    """Actions of ``gemq auto-import``."""

    on = "on"
    off = "off"
    status = "status"


def auto_import(
    switch: Annotated[Switch, typer.Argument(help="on, off or status.")] = Switch.status,
) -> None:
    """Let transformers load gemq checkpoints in programs that never import gemq (a hook in site-packages).

    [dim]gemq auto-import on[/dim]
    """
    if switch is Switch.on:
        paths = hook.turn_on()
        text = f"on: wrote {' and '.join(map(str, paths))}"
    elif switch is Switch.off:
        paths = hook.turn_off()
        text = f"off: removed {' and '.join(map(str, paths))}" if paths else "off: there was nothing to remove"
    else:
        text = f"{'on' if hook.is_on() else 'off'} ({hook.folder()})"
    display.output().print(text, markup=False, highlight=False, soft_wrap=True)
