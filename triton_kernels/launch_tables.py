"""Read measured launch parameters: the places of the tables, the contents of an entry, and the entry that serves a
product.

A table is JSON, one file a device. ``gemq tune`` writes it to :func:`user_table`; tables that ship lie in ``tuned/``::

    {"version": 1, "device": "NVIDIA H100 80GB HBM3", "entries": [
      {"kind": "decode.ffn", "n": 14336, "k": 4096, "experts": 8, "top_k": 2, "up_to": 1,
       "parameters": {"columns": 8, "warps": 4, "ahead": 2}, "us": 51.2}]}

``kind`` and the parameters are those of ``tuned/search_space.json``. ``n`` and ``k`` are the product's rows and
columns (``ffn``: gate and up together count once). ``up_to`` is a number of tokens in decode, of tokens per expert in
prefill: an amount takes the smallest ``up_to`` that holds it, else the largest.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path

TABLES = Path(__file__).parent / "tuned"
DEFAULT = "default"
VERSION = 1
# shapes further apart than this, as the sum of |log2| of the ratios of n, k, experts and top_k, share nothing
FAR = 2.0
SHAPE = ("n", "k", "experts", "top_k")

logger = logging.getLogger(__name__)
_forced: dict[str, dict] = {}
_searching: list[None] = []


def table_name(device_name: str) -> str:
    """The file name, without ``.json``, of a device's table: ``NVIDIA H100 80GB HBM3`` is ``nvidia_h100_80gb_hbm3``."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


def user_table(device_name: str) -> Path | None:
    """Path of the user's own table for a device: below ``$XDG_CACHE_HOME`` or ``~/.cache``; None without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(base) if base else Path.home() / ".cache"
    except RuntimeError:
        return None
    return folder / "gemq" / "tuned" / f"{table_name(device_name)}.json"


@cache
def search_space() -> dict[str, dict[str, list]]:
    """Candidate values by kind and launch parameter; the first is where a search starts if nothing else is known."""
    return json.loads((TABLES / "search_space.json").read_text())


@lru_cache
def sections(device_name: str) -> dict:
    """Parameters of no particular shape: the device's shipped table over ``default.json``, section by section."""
    found = json.loads((TABLES / f"{DEFAULT}.json").read_text())
    path = TABLES / f"{table_name(device_name)}.json"
    if device_name != DEFAULT and path.exists():
        own = json.loads(path.read_text())
        for name in found:
            value = own.get(name, found[name])
            found[name] = found[name] | value if isinstance(value, dict) else value
    return found


def check_entry(entry: dict) -> None:
    """Raise ``ValueError`` if an entry names a kind, a parameter or a value that this version cannot launch."""
    space = search_space()
    kind = entry.get("kind")
    if kind not in space:
        raise ValueError(f"kind {kind!r} is none of {', '.join(space)}")
    for name in (*SHAPE, "up_to"):
        value = entry.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value!r}")
    if not isinstance(entry.get("parameters"), dict):
        raise ValueError("parameters must be an object")
    for name, value in entry["parameters"].items():
        allowed = space[kind].get(name, [])
        if not any(value == a and type(value) is type(a) for a in allowed):
            raise ValueError(f"{kind} {name}={value!r} is not in the search space {allowed}")


def read_entries(path: Path) -> list[dict]:
    """Read the entries of a table; a file that cannot be used is reported and ignored."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict) or content.get("version", VERSION) != VERSION:
            raise ValueError(f"not a launch table of version {VERSION}")
        entries = content.get("entries", [])
        for entry in entries:
            check_entry(entry)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        logger.warning("launch table %s is not used: %s; `gemq tune` writes a new one", path, error)
        return []
    return entries


@lru_cache
def _entries(device_name: str) -> list[dict]:
    """Yield the entries of the user's table, then of the shipped one."""
    paths = [user_table(device_name), TABLES / f"{table_name(device_name)}.json"]
    return [entry for path in paths if path is not None and path.exists() for entry in read_entries(path)]


def distance(entry: dict, shape: tuple[int, int, int, int]) -> float:
    """Sum of ``|log2|`` of the ratios of the two shapes' ``n``, ``k``, ``experts`` and ``top_k``."""
    return sum(abs(math.log2(entry[name] / max(value, 1))) for name, value in zip(SHAPE, shape, strict=True))


@cache
def _nearest(device_name: str, kind: str, shape: tuple[int, int, int, int]) -> tuple[tuple[float, dict], ...]:
    """``(up_to, parameters)`` ascending, of the nearest shape that was tuned; empty if none is near."""
    entries = [e for e in _entries(device_name) if e["kind"] == kind]
    best = min(entries, key=lambda e: distance(e, shape), default=None)
    if best is None or distance(best, shape) > FAR:
        return ()
    chosen: dict[float, dict] = {}
    for entry in entries:
        if all(entry[name] == best[name] for name in SHAPE):
            # the user's entries come first and win
            chosen.setdefault(entry["up_to"], entry["parameters"])
    return tuple(sorted(chosen.items()))


def tune_command(kind: str, shape: tuple[int, int, int, int]) -> str:
    """Command that measures a product; a layer is named ``hidden x ffn x experts x top_k``."""
    n, k, experts, top_k = shape
    hidden, ffn = (n, k) if kind.endswith(".gemm") else (k, n)
    return f"gemq tune --shape {hidden}x{ffn}x{experts}x{top_k}"


@cache
def _say_once(level: int, device_name: str, command: str) -> None:
    logger.log(level, "no tuned launch parameters for this shape on %s: defaults are used; `%s` measures them",
               device_name, command)  # fmt: skip


def _say_miss(device_name: str, kind: str, shape: tuple[int, int, int, int]) -> None:
    # dense matrices (one expert) come in many shapes, and defaults serve them
    level = logging.WARNING if shape[2] > 1 else logging.INFO
    _say_once(level, device_name, tune_command(kind, shape))


def parameters(device_name: str, kind: str, shape: tuple[int, int, int, int], amount: float, default: dict) -> dict:
    """``default`` overlaid with what was measured for the nearest shape, and with what a search forces.

    ``shape`` is ``(n, k, experts, top_k)``, ``amount`` tokens (decode) or tokens per expert (prefill).
    """
    found = default
    if device_name != DEFAULT:
        near = _nearest(device_name, kind, shape)
        if near:
            found = default | next((p for up_to, p in near if amount <= up_to), near[-1][1])
        elif not _searching:
            _say_miss(device_name, kind, shape)
    return found | _forced[kind] if kind in _forced else found


@contextmanager
def forced(by_kind: dict[str, dict]) -> Iterator[None]:
    """Launch with these parameters in this block, whatever the tables hold. For searching, so a missing entry is not
    reported."""
    before = dict(_forced)
    _forced.update(by_kind)
    _searching.append(None)
    try:
        yield
    finally:
        _searching.pop()
        _forced.clear()
        _forced.update(before)


def forget() -> None:
    """Discard the cached tables, so that the next launch reads them again."""
    for function in (sections, _entries, _nearest, _say_once):
        function.cache_clear()
