"""Read files of text of known kinds, a piece or a record at a time.

The kind is told by the name, and the content must agree with it; nothing else is ever taken for text. Compressed files
are unpacked as far as they are read, and refused beyond :data:`MOST_UNPACKED` bytes.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from gemq.errors import CalibrationError

_KINDS = {
    ".txt": "text", ".text": "text", ".md": "text", "": "text", ".jsonl": "lines", ".ndjson": "lines",
    ".json": "json", ".parquet": "parquet",
}
_READ = (
    "read are plain text (.txt, .text, .md or no ending), .jsonl and .ndjson (a record a line), .json (a list of "
    "records), .gz of each, and .parquet"
)
MOST_UNPACKED = 1 << 30
# characters of one record, and bytes looked at to tell text from something else
_LONGEST = 1 << 27
_SNIFFED = 1 << 16
_CHARACTERS = 1 << 18
_SIGNS = (
    (b"\xff\xfe", "UTF-16 text; convert it to UTF-8"), (b"\xfe\xff", "UTF-16 text; convert it to UTF-8"),
    (b"PAR1", "Parquet; name it .parquet"), (b"\x1f\x8b", "gzip; name it .gz, after the ending of its content"),
    (b"PK\x03\x04", "a ZIP archive"), (b"%PDF", "a PDF"), (b"\x28\xb5\x2f\xfd", "Zstandard"), (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"), (b"\x7fELF", "a program"),
)


@dataclass(frozen=True)
class TextFile:
    """A regular file that is read as ``kind``: "text", "lines", "json" or "parquet"; ``packed`` by gzip."""

    path: Path
    kind: str
    packed: bool

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size


def text_file(name: str, known: Iterable[str] = ()) -> TextFile:
    """Find the file of a name; its kind is told by the name and by its first bytes.

    Raises :class:`CalibrationError` if there is none (``known`` names what else there is), it is no regular file, or
    of a kind that is not read.
    """
    path = Path(name)
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        raise CalibrationError(f"no text file {name!r}; known corpora: {', '.join(known)}") from None
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise CalibrationError(f"no text file {name!r}: it is {what}; text is read from regular files")
    ending = path.suffix.lower()
    packed = ending == ".gz"
    if packed:
        ending = Path(path.stem).suffix.lower()
    kind = _KINDS.get(ending)
    if kind is None or (packed and kind == "parquet"):
        raise CalibrationError(f"{path} is a {path.suffix.lower() or ending} file, which is not read as text; {_READ}")
    file = TextFile(path, kind, packed)
    _check_content(file)
    return file


def _check_content(file: TextFile) -> None:
    with failures(file.path), _opened(file) as stream:
        head = stream.read(_SNIFFED)
    if file.kind == "parquet":
        if head and not head.startswith(b"PAR1"):
            raise CalibrationError(f"{file.path} is not Parquet; {_READ}")
        return
    for sign, what in _SIGNS:
        if head.startswith(sign):
            raise CalibrationError(f"{file.path} holds {what}; {_READ}")
    check_characters(file.path, head)


def check_characters(path: Path, piece: str | bytes) -> None:
    """Raise :class:`CalibrationError` if a piece of a file has a byte that no text has."""
    if ("\0" in piece) if isinstance(piece, str) else (b"\0" in piece):
        raise CalibrationError(f"{path} is not text: it holds zero bytes; {_READ}")


@contextmanager
def failures(path: Path) -> Iterator[None]:
    """Turn what reading a file may raise into :class:`CalibrationError` that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise CalibrationError(f"{path} is not a whole gzip file ({error})") from None
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read ({error.strerror or error})") from None


@contextmanager
def _opened(file: TextFile) -> Iterator[BinaryIO]:
    with open(file.path, "rb") as raw:
        if not file.packed:
            yield raw
            return
        with gzip.GzipFile(fileobj=raw) as unpacked:
            yield io.BufferedReader(_Bounded(unpacked, file.path))


class _Bounded(io.RawIOBase):
    """A stream of which no more than :data:`MOST_UNPACKED` bytes are read: a small file can unpack to any size."""

    def __init__(self, stream: gzip.GzipFile, path: Path):
        self.stream, self.path, self.left = stream, path, MOST_UNPACKED

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.stream.read(min(len(buffer), self.left + 1))
        if len(data) > self.left:
            raise CalibrationError(f"{self.path} unpacks to more than {MOST_UNPACKED >> 20} MiB; unpack it first")
        self.left -= len(data)
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def _text(file: TextFile) -> Iterator[TextIO]:
    """UTF-8 with or without its mark; line ends of every system become one newline, as Python reads text."""
    with failures(file.path), _opened(file) as stream:
        yield io.TextIOWrapper(stream, encoding="utf-8-sig")


def pieces(file: TextFile) -> Iterator[str]:
    """Yield a plain text from its beginning, up to a quarter of a million characters at a time."""
    with _text(file) as stream:
        while piece := stream.read(_CHARACTERS):
            check_characters(file.path, piece)
            yield piece


def records(file: TextFile, columns: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield ``(location, record)`` of a file of records; of a Parquet file, with those of ``columns`` that it has."""
    if file.kind == "parquet":
        yield from _rows(file, frozenset(columns))
        return
    with _text(file) as stream:
        yield from (_lines if file.kind == "lines" else _values)(file.path, stream)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r:.60} comes twice")
    return found


# no number is read as text, so that none needs all its digits
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=float)


def _lines(path: Path, stream: TextIO) -> Iterator[tuple[str, Any]]:
    number = 0
    while line := stream.readline(_LONGEST + 1):
        number += 1
        if len(line) > _LONGEST:
            raise CalibrationError(f"{path}, line {number}: longer than {_LONGEST >> 20} million characters")
        if line.isspace():
            continue
        try:
            yield f"line {number}", _DECODER.decode(line.lstrip("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{path}, line {number}: no JSON record ({_why(error)})") from None


def _why(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _values(path: Path, stream: TextIO) -> Iterator[tuple[str, Any]]:
    """Yield the elements of a JSON list, or values one after another, without holding the whole."""
    reader = _Reader(path, stream)
    listed = reader.next_character() == "["
    if listed:
        reader.at += 1
    while (character := reader.next_character()) and not (listed and character == "]"):
        yield f"record {reader.count}", reader.value()
        if listed and (character := reader.next_character()) != "]":
            if character != ",":
                reader.fail("expected a comma or the end of the list")
            reader.at += 1
    if listed:
        reader.at += 1
        if not character or reader.next_character():
            reader.fail("expected the end of the list, and nothing after it")


class _Reader:
    """Reader of JSON values from a stream."""

    def __init__(self, path: Path, stream: TextIO):
        self.path, self.stream, self.buffer, self.at, self.count, self.ended = path, stream, "", 0, 1, False

    def fail(self, why: str) -> None:
        raise CalibrationError(f"{self.path}, record {self.count}: no JSON record ({why})")

    def more(self, least: int) -> bool:
        """Read at least ``least`` more characters; returns False at the end."""
        new = self.stream.read(max(_CHARACTERS, least))
        self.buffer, self.at = self.buffer[self.at :] + new, 0
        self.ended = not new
        return bool(new)

    def next_character(self) -> str:
        """Return the next character that is not blank, without consuming it; empty at the end."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in " \t\n\r":
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more(0):
                return ""

    def value(self) -> Any:
        """Read the value that begins here."""
        while True:
            try:
                found, self.at = _DECODER.raw_decode(self.buffer, self.at)
                self.count += 1
                return found
            except (ValueError, RecursionError) as error:
                held = len(self.buffer) - self.at
                if held > _LONGEST:
                    self.fail(f"longer than {_LONGEST >> 20} million characters")
                if not self._unfinished(error) or not self.more(held):
                    self.fail(_why(error))

    def _unfinished(self, error: Exception) -> bool:
        """Tell if the value may be incomplete because the text read so far ends in it."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        return error.msg.startswith("Unterminated string") or error.pos > len(self.buffer) - 16


def _rows(file: TextFile, columns: frozenset[str]) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    with failures(file.path):
        try:
            with pyarrow.parquet.ParquetFile(file.path) as table:
                names = table.schema_arrow.names
                # without any of them, the names tell what there is
                wanted = [name for name in names if name in columns] or names
                number = 0
                for batch in table.iter_batches(batch_size=256, columns=wanted):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"row {number}", row
        except pyarrow.ArrowException as error:
            raise CalibrationError(f"{file.path} is no Parquet file that can be read ({error})") from None
