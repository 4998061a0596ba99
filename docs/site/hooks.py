"""What the site needs beyond Markdown: links into the sources as plain names, and the commands' help as a page."""

from __future__ import annotations

import re
from typing import Any

# links that lead out of docs/ work on a code host, not in the site
_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./(?!\.\.)[^)]*\)")
_COMMANDS = "<!-- commands -->"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page before it is rendered."""
    if page.file.src_uri.count("/") == 0:
        markdown = _OUTSIDE.sub(r"\1", markdown)
    return markdown.replace(_COMMANDS, commands()) if _COMMANDS in markdown else markdown


def commands() -> str:
    """Every command with its help, options and defaults, from the application itself."""
    import typer

    from gemq.cli.app import app

    parts = []
    for name, command in typer.main.get_command(app).commands.items():
        text, _, examples = re.sub(r"\[/?dim\]", "", command.help or "").partition(f"gemq {name}")
        parts += [f"## gemq {name}", text.strip()]
        if examples:
            parts.append(f"```text\ngemq {name} {' '.join(examples.split())}\n```".replace(" gemq ", "\ngemq "))
        shown = (p for p in command.params if p.name != "help" and not getattr(p, "hidden", False))
        rows = [_row(parameter) for parameter in shown]
        parts.append("| | default | |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts)


def _row(parameter: Any) -> str:
    options = [o for o in (*parameter.opts, *parameter.secondary_opts) if o.startswith("-")]
    name = ", ".join(f"`{o}`" for o in options) or f"`{parameter.name.upper()}`"
    default = parameter.default
    shown = "" if default is None or default == [] or callable(default) or isinstance(default, bool) else (
        f"`{getattr(default, 'value', default)}`")
    if isinstance(default, bool) and parameter.secondary_opts:
        shown = "on" if default else "off"
    shown = "required" if parameter.required else shown
    return f"| {name} | {shown} | {' '.join((parameter.help or '').split()).replace('|', chr(92) + '|')} |"
