"""``--format md|json|jsonl|csv``: one set of rows, for people or for the next program."""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any

import typer

from gemq.cli import display
from gemq.cli.escapes import printable
from gemq.plain_json import dumps, plain

# what begins a formula in a spreadsheet (OWASP, CSV injection); a number does not
_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_MARKUP = re.compile(r"[\\|\[\]`]")


class Format(StrEnum):
    """Formats of printed tables."""

    table = "table"
    md = "md"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"


FormatOption = Annotated[Format, typer.Option("--format", help="Format of what is printed.")]


@dataclass(frozen=True)
class Column:
    """A column: its heading for people, its key in records, and how a value is shown."""

    title: str
    key: str
    show: Callable[[Any], str] = str

    def cell(self, record: dict[str, Any]) -> str:
        """The value for people; empty where there is none."""
        value = record.get(self.key)
        missing = value is None or (isinstance(value, float) and not math.isfinite(value))
        return "" if missing else self.show(value)


def emit(title: str, columns: Sequence[Column], records: Sequence[dict[str, Any]], form: Format) -> None:
    """Print ``records`` to standard output: the columns as a table or Markdown, all their fields otherwise.

    JSON and CSV hold raw numbers; a number that is not finite is null, or empty.
    """
    if form is Format.table:
        rows = [[column.cell(record) for column in columns] for record in records]
        display.output().print(display.table(title, [c.title for c in columns], rows))
    elif form is Format.md:
        print(markdown([c.title for c in columns], [[c.cell(r) for c in columns] for r in records]))
    elif form is Format.json:
        print(dumps(records, indent=1))
    elif form is Format.jsonl:
        for record in records:
            print(dumps(record))
    else:
        flat = [_flat(record) for record in records]
        names = list(dict.fromkeys(name for record in flat for name in record))
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(csv_cell(name) for name in names)
        writer.writerows([csv_cell(record.get(name, "")) for name in names] for record in flat)


def csv_cell(value: Any) -> Any:
    """A value for CSV: a text that a spreadsheet would take for a formula gets an apostrophe, numbers stay."""
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text.startswith(_FORMULA) and not _NUMBER.fullmatch(text) else text


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, ready to paste: first column left, the others right."""
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(markdown_cell, cells)) + " |"

    return "\n".join([line(titles), "|---" + "|---:" * (len(titles) - 1) + "|", *map(line, rows)])


def markdown_cell(text: str) -> str:
    """Text in a cell that is read as it is: no markup, HTML, links or line ends of a stranger's name."""
    plain = printable(text.replace("\n", " "), keep="").replace("&", "&amp;").replace("<", "&lt;")
    return _MARKUP.sub(r"\\\g<0>", plain)


def _flat(record: dict[str, Any]) -> dict[str, Any]:
    """Nested fields as ``outer.inner``, lists as JSON."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            found |= {f"{key}.{inner}": item for inner, item in _flat(value).items()}
        elif isinstance(value, (list, tuple)):
            found[key] = dumps(value)
        else:
            found[key] = "" if plain(value) is None else plain(value)
    return found
