"""Checks of a checkpoint's files: JSON, safetensors headers, the shard index, SHA-256 sums.

``gemq_manifest.json``, written with every checkpoint, records each file::

    {"version": 1, "files": {"model.safetensors": {"sha256": "9f2c...", "bytes": 1184}, "config.json": ...}}
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gemq.errors import CheckpointError
from gemq.folders import checkpoint_folder, is_companion, is_legal, lies_inside
from gemq.tensor_files import element_bits

MANIFEST_FILE = "gemq_manifest.json"
MANIFEST_VERSION = 1
EVALUATIONS_FILE = "gemq_evaluations.json"
CARD_FILE = "README.md"
RUN_FILE = "gemq_run.json"
# written for people, different from run to run or growing later, and read by no loader: in no manifest
NOTES = (EVALUATIONS_FILE, CARD_FILE, RUN_FILE)
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# the safetensors library takes headers of up to 100 MB; 32 MiB are some 300,000 tensors in one file
_MAX_HEADER = 32 << 20
# an index of a million tensors is as large
_MAX_JSON = 128 << 20
# files of these kinds are read, or run, by someone who loads the folder
_READ_SUFFIXES = (
    ".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf", ".py",
    ".so", ".jinja", ".model", ".tiktoken", ".spm", ".bpe",
)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, and refuse a key that occurs twice: readers differ in which of the two they take."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.200} comes twice")
        found[key] = value
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def read_bytes(file: Path, most: int = _MAX_JSON) -> bytes:
    """The contents of a regular file of at most ``most`` bytes.

    Raises :class:`CheckpointError` for one that is absent, longer, or a pipe or device, which may never end.
    """
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{file} is no regular file")
        if found.st_size > most:
            raise CheckpointError(f"{file} has {found.st_size:,} bytes, at most {most:,} are read")
        with file.open("rb") as handle:
            # files of /proc and the like have no size
            data = handle.read(most + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{file.parent} has no {file.name}") from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    if len(data) > most:
        raise CheckpointError(f"{file} has more than the {most:,} bytes that are read")
    return data


def parse_json(text: str | bytes, file: Path) -> Any:
    """The value of JSON in UTF-8 without a key that comes twice. Infinity and NaN are read, as configurations of
    published models hold them. Raises :class:`CheckpointError` naming ``file``."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        return json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON ({str(error)[:300]})") from None


def read_json(file: Path, most: int = _MAX_JSON) -> dict[str, Any]:
    """The object in a JSON file of at most ``most`` bytes. Raises :class:`CheckpointError` if there is none."""
    data = parse_json(read_bytes(file, most), file)
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} must hold a JSON object, got {type(data).__name__}")
    return data


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors header: dtype as it is spelled there, shape, bytes, and where they start in the
    file."""

    dtype: str
    shape: list[int]
    bytes: int
    start: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of a safetensors file, whose header and size must agree to the byte.

    Raises :class:`CheckpointError` for a file that is truncated, malformed, or whose tensors overlap.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size - 8:
                raise CheckpointError(f"{file.name} is truncated or corrupt: its header claims {length} bytes")
            if length > _MAX_HEADER:
                raise CheckpointError(f"{file.name} has a header of {length:,} bytes, at most {_MAX_HEADER:,} are read")
            text = handle.read(length).decode("utf-8")
            header = json.loads(text, object_pairs_hook=_distinct, parse_constant=_no_constant)
            notes = header.pop("__metadata__", None)
            if notes is not None and not all(isinstance(note, str) for note in notes.values()):
                raise ValueError("__metadata__ must map names to texts")
            entries = {name: _entry(entry, 8 + length) for name, entry in header.items()}
    except CheckpointError:
        raise
    except (struct.error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file.name} has no readable safetensors header ({error})") from None
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].bytes)):
        if entry.start != end:
            raise CheckpointError(f"{file.name} is corrupt: the tensor {name} does not follow the one before it")
        end += entry.bytes
    if end != size:
        raise CheckpointError(f"{file.name} is truncated or corrupt: {size} bytes, its header says {end}")
    return entries


def _entry(entry: dict[str, Any], begin: int) -> TensorEntry:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not all(type(extent) is int and extent >= 0 for extent in [*shape, start, end]):
        raise ValueError(f"shape {shape} at {start}..{end}")
    bits = element_bits(dtype) * math.prod(shape)
    size = bits // 8
    if end - start != size or bits % 8:
        raise ValueError(f"{dtype} {shape} is {size} bytes, not {end - start}")
    return TensorEntry(dtype, shape, size, begin + start)


def weight_files(folder: str | os.PathLike, named: str | None = None) -> list[Path]:
    """The safetensors files that a checkpoint folder is loaded from, by its index or the single file.

    ``named`` is the file that a config names instead (``transformers_weights``). Names and links that lead out of the
    folder are refused before a weight file is opened. Raises :class:`CheckpointError`.
    """
    folder = Path(folder)
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if named is not None:
        _check_name("transformers_weights of config.json", named.removesuffix(".index.json"))
        single = index = folder / named
    if single.is_file() and not single.name.endswith(".json"):
        _refuse_link(single)
        return [single]
    if not index.is_file():
        raise CheckpointError(_no_weights(folder, named))
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} has no weight_map from tensors to files")
    for name in set(names.values()):
        _check_name(index.name, name)
    files = [folder / name for name in sorted(set(names.values()))]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise CheckpointError(f"{folder} lacks {', '.join(missing[:5])}{more}, which {INDEX_FILE} names")
    for file in files:
        _refuse_link(file)
    return files


def _check_name(where: str, name: str) -> None:
    if PurePosixPath(name).name != name or name == ".." or not name.endswith(".safetensors"):
        raise CheckpointError(f"{where} names {name!r}, which is not a .safetensors file of the folder")


def _no_weights(folder: Path, named: str | None) -> str:
    """Message for a folder without the weights that are read: it names what is there instead."""
    missing = f"{folder} holds neither {WEIGHTS_FILE} nor {INDEX_FILE}" if named is None else (
        f"{folder} lacks {named}, which config.json names")
    pickles = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    if pickles:
        return (f"{missing}, but {pickles[0]}, a pickle, which may run any code and is never opened: load the model "
                f"with transformers where you trust it and save it again, as safetensors")
    if others:
        return f"{missing}; there is {others[0]}: rename it, or name it in the index"
    return missing


def _refuse_link(file: Path) -> None:
    """Raise :class:`CheckpointError` for a link that leads out of its folder; the hub's cache links to its blobs."""
    real, folder = file.resolve(), file.parent.resolve()
    blobs = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if real.parent not in (folder, blobs):
        raise CheckpointError(f"{file.name} is a link to {real}, which is not in the folder of the checkpoint")


def check_inside(files: list[Path], folder: str | os.PathLike) -> None:
    """Refuse files that a checkpoint names but that do not lie in its folder."""
    for file in files:
        local = Path(folder).is_dir()
        inside = file.relative_to(folder) if local and file.is_relative_to(folder) else file
        escapes = ".." in inside.parts or (local and inside is file)
        if escapes or file.suffix != ".safetensors":
            raise CheckpointError(f"{INDEX_FILE} names {str(file)!r}, which is not a .safetensors file of the folder")
        _refuse_link(file)


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_manifest(folder: Path, later: dict[str, bytes]) -> None:
    """Record every file of ``folder``, and those of ``later`` that are about to be written, by name."""
    files = {
        path.relative_to(folder).as_posix(): {"sha256": _sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*")) if path.is_file() and path.relative_to(folder).as_posix() not in NOTES
    }
    for name, content in later.items():
        files[name] = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    text = json.dumps({"version": MANIFEST_VERSION, "files": files}, indent=1) + "\n"
    (folder / MANIFEST_FILE).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Verification:
    """Result of :func:`verify`: the number of files it read, and their bytes."""

    files: int
    bytes: int


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    if not (folder / MANIFEST_FILE).is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST_FILE}, so it cannot be verified: save_pretrained of transformers writes none"
        )
    manifest = read_json(folder / MANIFEST_FILE)
    files = manifest.get("files")
    if manifest.get("version") != MANIFEST_VERSION or not isinstance(files, dict) or not files:
        raise CheckpointError(f"{folder / MANIFEST_FILE} is not a manifest of version {MANIFEST_VERSION}")
    for name, entry in files.items():
        if not _is_name(name) or not _is_entry(entry):
            raise CheckpointError(f"{folder / MANIFEST_FILE} is malformed at {name!r:.200}")
    return files


def _is_name(name: str) -> bool:
    """Tell if a text is the path of a file inside the folder, spelled in the one way that a manifest uses."""
    path = PurePosixPath(name)
    plain = name == str(path) and not path.is_absolute() and ".." not in path.parts
    return plain and name not in ("", ".") and "\0" not in name and name != MANIFEST_FILE


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or entry["bytes"] < 0:
        return False
    return isinstance(entry.get("sha256"), str) and re.fullmatch("[0-9a-f]{64}", entry["sha256"]) is not None


def _difference(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    file = folder / name
    try:
        if not lies_inside(file, folder):
            return f"is a link to {file.resolve()}, out of the folder"
        if not file.is_file():
            return "is missing"
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"has {size} bytes, not {entry['bytes']}"
        return None if _sha256(file) == entry["sha256"] else "differs from its SHA-256"
    except (OSError, RuntimeError, UnicodeError) as error:
        # a name too long for the file system, links in a circle, no right to read
        return f"cannot be read ({getattr(error, 'strerror', None) or error})"


def _added(folder: Path, recorded: dict[str, Any]) -> Iterator[str]:
    """Yield a message for each file of the folder that is not recorded but that a program that loads it would read or
    run."""
    for place, folders, files in os.walk(folder):
        here = Path(place).relative_to(folder)
        for name in sorted(folders):
            if (Path(place) / name).is_symlink():
                yield f"{(here / name).as_posix()} was added, a link to a folder"
        for name in sorted(files):
            path = (here / name).as_posix()
            if path == MANIFEST_FILE or path in recorded:
                continue
            if not lies_inside(folder / path, folder):
                yield f"{path} is a link to {(folder / path).resolve()}, out of the folder"
            elif path not in NOTES and not is_legal(path) and (
                is_companion(path) or path.lower().endswith(_READ_SUFFIXES)
            ):
                yield f"{path} was added"


def recorded_files(path: str | os.PathLike) -> list[str]:
    """The names of the files that a checkpoint's manifest records. Raises :class:`CheckpointError`."""
    return list(_read_manifest(checkpoint_folder(path)))


def verify(path: str | os.PathLike) -> Verification:
    """Compare every file of a checkpoint folder with the SHA-256 sums recorded when it was saved.

    ``path`` is a folder or the name of a hub repository. All that loading reads must be recorded, in sub-folders too.
    Raises :class:`CheckpointError` that names each file that is missing, changed, not recorded, a link out of the
    folder, or was added and would be read.
    """
    folder = checkpoint_folder(path)
    recorded = _read_manifest(folder)
    found = ((name, _difference(folder, name, entry)) for name, entry in recorded.items())
    differences = [f"{name} {difference}" for name, difference in found if difference]
    problems = differences + list(_added(folder, recorded))
    if not problems:
        # all that is there is recorded: does it make a checkpoint?
        weight_files(folder)
        problems = [] if "config.json" in recorded else ["config.json is missing"]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        again = f" (if save_pretrained of transformers wrote into it: that leaves an old {MANIFEST_FILE}, delete it)"
        raise CheckpointError(
            f"{folder} does not match its manifest: {'; '.join(problems[:5])}{more}{again if differences else ''}"
        )
    return Verification(len(recorded), sum(entry["bytes"] for entry in recorded.values()))
