"""Bit allocations in files: the authors' pickles and gemq's own JSON.

What is read, all of it as ``{decoder layer: widths}`` or ``[layer, expert]``:

* the pickles in ``configs/`` of the authors' repository (github.com/jndeng/GEMQ): ``{layer: {expert: bits}}``, decoder
  layers by their index (DeepSeek-V2-Lite's begin at 1), experts from 0; where a model has shared experts, one more
  entry, with the index after the last routed expert, for the layer's merged shared expert;
* ``{layer: [bits, ...]}``, and arrays ``[L, E]`` or ``[L, E + 1]``, in pickles and in JSON;
* what ``gemq allocate --json`` prints, and the ``config.json`` of a checkpoint of gemq (or its folder).
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from gemq.algorithms.given_allocation import GivenAllocation
from gemq.folders import file_or_folder
from gemq.format import UNQUANTIZED
from gemq.interchange.plain_pickles import read_plain_pickle

# digits of a layer's or expert's number
_LONGEST_NUMBER = 10
_PICKLES = (".pkl", ".pickle")


def read_allocation(path: str | os.PathLike, budget: float | None = None) -> GivenAllocation:
    """The allocation in a file, or in a checkpoint of gemq, a folder or hub name.

    ``budget`` picks one of several that ``gemq allocate --json`` printed. Raises ``ValueError`` that names the file and
    what is wrong with it, ``OSError`` if it cannot be read. Pickles are read without running anything in them.
    """
    file = file_or_folder(path)
    if file.is_dir():
        file = file / "config.json"
    if file.suffix in _PICKLES:
        content = read_plain_pickle(file)
    else:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: neither JSON nor a pickle (.pkl): {error}") from None
    try:
        return _parse(str(file), content, budget)
    except _Malformed as error:
        raise ValueError(f"{file}: {error}") from None


class _Malformed(ValueError):
    pass


def _parse(source: str, content: Any, budget: float | None) -> GivenAllocation:
    if isinstance(content, dict) and isinstance(content.get("quantization_config"), dict):
        content = content["quantization_config"]
    if isinstance(content, list) and content and all(isinstance(r, dict) and "expert_bits" in r for r in content):
        content = _pick(content, budget)
    if isinstance(content, dict) and "expert_bits" in content:
        layers, rows = _table(content["expert_bits"])
        solved = content.get("budget")
        if solved is not None and type(solved) not in (int, float):
            raise _Malformed(f"budget must be a number, got {solved!r}")
        down = None
        if content.get("down_bits"):
            of, down = _table(content["down_bits"])
            if of != layers:
                raise _Malformed("down_bits and expert_bits name different layers")
        return GivenAllocation(source, rows, layers, _shared(content.get("shared_bits"), layers), solved, down)
    layers, rows = _table(content)
    return GivenAllocation(source, rows, layers)


def _pick(records: list[dict], budget: float | None) -> dict:
    if len(records) == 1:
        return records[0]
    budgets = [r.get("budget") for r in records]
    if budget is None or budgets.count(budget) != 1:
        raise _Malformed(f"it holds allocations for the budgets {budgets}; say which with --bits")
    return records[budgets.index(budget)]


def _table(content: Any) -> tuple[tuple[int, ...] | None, tuple[tuple[int, ...], ...]]:
    """Decoder layers, if they are named, and a row of widths for each."""
    if isinstance(content, list) or (isinstance(content, np.ndarray) and content.ndim == 2):
        return None, tuple(_row(f"row {i}", row) for i, row in enumerate(content))
    if not isinstance(content, dict) or not content:
        raise _Malformed("it maps no layers to widths ({layer: {expert: bits}}, {layer: [bits]} or [layer, expert])")
    by_layer = {_index("layer", key): row for key, row in content.items()}
    if len(by_layer) != len(content):
        raise _Malformed("a layer comes twice")
    layers = tuple(sorted(by_layer))
    return layers, tuple(_row(f"layer {layer}", by_layer[layer]) for layer in layers)


def _row(name: str, row: Any) -> tuple[int, ...]:
    if isinstance(row, dict):
        by_expert = {_index("expert", key): width for key, width in row.items()}
        missing = set(range(len(row))) - set(by_expert)
        if missing:
            raise _Malformed(f"{name} has no width for expert {min(missing)}")
        row = [by_expert[e] for e in range(len(row))]
    plain = isinstance(row, list) or (isinstance(row, np.ndarray) and row.ndim == 1)
    if not plain or not len(row):
        raise _Malformed(f"{name} must be widths by expert, got {_shown(row)}")
    return tuple(_width(name, width) for width in row)


def _width(name: str, value: Any) -> int:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole and not (isinstance(value, (float, np.floating)) and float(value).is_integer()):
        raise _Malformed(f"{name} must have whole numbers of bits, got {_shown(value)}")
    if not 0 <= value <= UNQUANTIZED:
        raise _Malformed(f"{name} must have widths in 0..{UNQUANTIZED}, got {_shown(value)}")
    return int(value)


def _index(name: str, key: Any) -> int:
    text = isinstance(key, str) and key.isdecimal() and len(key) < _LONGEST_NUMBER
    if text or (isinstance(key, (int, np.integer)) and key >= 0):
        return int(key)
    raise _Malformed(f"{name}s must be numbered, got {_shown(key)}")


def _shared(value: Any, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if value is None or value == {} or value == []:
        return None
    if isinstance(value, dict):
        by_layer = {_index("layer", key): width for key, width in value.items()}
        if layers is None or set(by_layer) != set(layers):
            raise _Malformed("shared_bits and expert_bits name different layers")
        value = [by_layer[layer] for layer in layers]
    if not isinstance(value, list):
        raise _Malformed(f"shared_bits must be widths by layer, got {_shown(value)}")
    return tuple(_width("shared_bits", width) for width in value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
