"""Documents out of files of records: the text of each, of some fields or of a conversation."""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Iterator
from typing import Any

from gemq.algorithms.conversations import FIELDS, has_template, messages_of, render
from gemq.algorithms.text_files import TextFile, records
from gemq.errors import CalibrationError

_log = logging.getLogger("gemq")

DEFAULT = "text"
_JOINERS = {"+": "", "&": " "}
# characters of documents that are kept rather than read again
_KEPT = 1 << 26


class Documents:
    """The documents of a file, in its order: iterate over them, or :meth:`scan` the file and take them in another.

    Records that are null, or have null where the text should be, are left out; how many is told by a warning. Raises
    :class:`CalibrationError` that names the record for others without text.
    """

    def __init__(self, file: TextFile, fields: str, tokenizer: Any):
        self.file, self.fields, self.tokenizer = file, fields, tokenizer
        self.names = re.split(r"([+&])", fields)
        self.lengths, self.blank, self.told = array("q"), True, False
        self.kept: list[str] | None = None

    def __iter__(self) -> Iterator[str]:
        columns, skipped, number = {*self.names, *(FIELDS if self.fields == DEFAULT else ())}, 0, 0
        for where, record in records(self.file, columns):
            number += 1
            text = self._document(where, record)
            if text is None:
                skipped += 1
            else:
                yield text
        if skipped and not self.told:
            self.told = True
            _log.warning(f"{self.file.path}: {skipped} of {number} records are null or have no text in "
                         f"{self.fields!r}, and were left out")

    def scan(self) -> Documents:
        """Read all once: their number is known then, their ``lengths`` in characters, and if all are ``blank``."""
        kept, total = [], 0
        for text in self:
            self.lengths.append(len(text))
            self.blank = self.blank and not text.strip()
            total += len(text)
            if total <= _KEPT:
                kept.append(text)
        self.kept = kept if total <= _KEPT else None
        return self

    def __len__(self) -> int:
        return len(self.lengths)

    def in_order(self, order: list[int], characters: int) -> Iterator[str]:
        """The documents ``order`` lists, after a scan; some ``characters`` at a time are held."""
        if self.kept is not None:
            yield from (self.kept[index] for index in order)
            return
        at = 0
        while at < len(order):
            end, held = at, 0
            while end < len(order) and (end == at or held < characters):
                held += self.lengths[order[end]]
                end += 1
            wanted = frozenset(order[at:end])
            found = {index: text for index, text in enumerate(self) if index in wanted}
            yield from (found[index] for index in order[at:end])
            at = end

    def _document(self, where: str, record: Any) -> str | None:
        """The text of a record; None for null."""
        try:
            text = self._text(record)
            if text is not None:
                text.encode()
            return text
        except UnicodeEncodeError:
            why = "the text holds half a surrogate pair"
        except (TypeError, ValueError) as error:
            why = str(error)
        raise CalibrationError(f"{self.file.path}, {where}: no JSON record with {self.fields!r} ({why})")

    def _text(self, record: Any) -> str | None:
        if record is None:
            return None
        if not isinstance(record, dict):
            raise TypeError(f"it is a {type(record).__name__}, not an object")
        names = self.names
        if self.fields == DEFAULT and DEFAULT not in record:
            names = [next((name for name in FIELDS if name in record), DEFAULT)]
        parts = [_JOINERS[name] if name in _JOINERS else self._field(record, name) for name in names]
        text = [part for part in parts if part is not None]
        return "".join(text) if len(text) == len(parts) else None

    def _field(self, record: dict[str, Any], name: str) -> str | None:
        if name not in record:
            there = ", ".join(sorted(map(repr, record))[:10]) or "none"
            raise ValueError(f"it has no field {name!r}; its fields: {there:.300}")
        value = record[name]
        if isinstance(value, list):
            messages = messages_of(value)
            return None if messages is None else self._conversation(name, messages)
        if value is not None and not isinstance(value, str):
            raise TypeError(f"{name!r} is not a string")
        return value

    def _conversation(self, name: str, messages: list[dict]) -> str:
        if not has_template(self.tokenizer):
            raise ValueError(f"the messages of {name!r} need the tokenizer's chat template, and it has none; name a "
                             "field of text (FILE#FIELD)")
        return render(self.tokenizer, messages, prompt=False)
