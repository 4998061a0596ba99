"""The ``quantization_config`` in the ``config.json`` of a packed checkpoint: the width of everything.

``digest`` is the SHA-256 of the other fields: widths that were edited or exchanged do not fit it, even where the sizes
still do.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from dataclasses import dataclass, fields
from typing import Any

from gemq import __version__
from gemq.errors import CheckpointError
from gemq.format import END_BITS, GROUP_SIZES, MAX_BITS, UNQUANTIZED
from gemq.widths import Widths

# the fields of the widths as they are stored
STORED = {
    "expert_bits": "experts", "shared_bits": "shared", "attention_bits": "attention", "dense_bits": "dense",
    "router_bits": "router", "linear_bits": "linears", "down_bits": "down",
    "head_bits": "head", "embedding_bits": "embedding",
}
# 2: with linear_bits, 3: with down_bits, 4: with head_bits and embedding_bits; a checkpoint is written as the lowest
# that it needs
FORMAT_VERSION = 4
_ENDS = ("head_bits", "embedding_bits")


@dataclass(frozen=True)
class PackedConfig:
    """The ``quantization_config`` of a checkpoint: its widths, and how it was made.

    ``group_size`` is the preferred one: a matrix whose columns it does not divide uses the next smaller. Stored, the
    widths are ``expert_bits``, ``shared_bits``, ``attention_bits``, ``dense_bits``, ``router_bits``, ``linear_bits``
    (format version 2), ``down_bits`` (format version 3), ``head_bits`` and ``embedding_bits`` (format version 4, both
    where one is below 16): see :class:`gemq.widths.Widths`.
    """

    widths: Widths
    group_size: int = 128
    version: int = 1
    budget: float | None = None
    method: str | None = None
    gemq_version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Convert to the stored form, with string keys and the digest."""
        data = {name: getattr(self.widths, part) for name, part in STORED.items()}
        data |= {f.name: getattr(self, f.name) for f in fields(self) if f.name != "widths"}
        for name in ("expert_bits", "shared_bits", "down_bits"):
            data[name] = {str(k): v for k, v in data[name].items()}
        for name, version in (("linear_bits", 2), ("down_bits", 3)):
            if data[name]:
                data["version"] = version
            else:
                del data[name]
        if all(data[name] == UNQUANTIZED for name in _ENDS):
            for name in _ENDS:
                del data[name]
        else:
            data["version"] = 4
        return {"quant_method": "gemq", **data, "digest": _digest(data)}

    @classmethod
    def from_dict(cls, data: Any) -> PackedConfig:
        """Parse and validate a stored ``quantization_config``; :class:`CheckpointError` says what is wrong."""
        if not isinstance(data, dict) or data.get("quant_method") != "gemq":
            other = data.get("quant_method") if isinstance(data, dict) else None
            raise CheckpointError(
                "this is not a gemq checkpoint: config.json has no quantization_config of gemq"
                + (f" but one of {other!r}" if other else "")
            )
        version = data.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise CheckpointError(f"quantization_config.version must be a positive integer, got {version!r}")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"the checkpoint has format version {version}, this gemq {__version__} reads up to {FORMAT_VERSION}; "
                f"upgrade gemq"
            )
        known = {*STORED, *(f.name for f in fields(cls) if f.name != "widths")}
        stored: dict[str, Any] = {k: v for k, v in data.items() if k in known}
        values = dict(stored)
        values["expert_bits"] = _layer_bits("expert_bits", data.get("expert_bits"), list)
        values["shared_bits"] = _layer_bits("shared_bits", data.get("shared_bits", {}), int)
        if "down_bits" in data:
            values["down_bits"] = _layer_bits("down_bits", data["down_bits"], list)
        _check_fields(values)
        if data.get("digest") != _digest(stored):
            raise CheckpointError("quantization_config does not match its digest: it was edited after it was written")
        down = values.get("down_bits", values["expert_bits"])
        if {k: len(v) for k, v in down.items()} != {k: len(v) for k, v in values["expert_bits"].items()}:
            _refuse("down_bits", "of the layers and experts of expert_bits", down)
        widths = Widths(**{STORED[name]: values.pop(name) for name in STORED if name in values})
        return cls(widths, **values)


def _digest(stored: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(stored, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _refuse(name: str, expected: str, value: Any) -> None:
    raise CheckpointError(f"quantization_config.{name} must be {expected}, got {reprlib.repr(value)}")


def _check_fields(values: dict[str, Any]) -> None:
    for name in ("attention_bits", "dense_bits", "router_bits"):
        _check_width(name, values.get(name, UNQUANTIZED), 1)
    if type(values.get("group_size")) is not int or values["group_size"] not in GROUP_SIZES:
        _refuse("group_size", f"one of {GROUP_SIZES}", values.get("group_size"))
    linears = values.get("linear_bits", {})
    if not isinstance(linears, dict) or (linears and values["version"] < 2):
        _refuse("linear_bits", "a map from module paths to bits, of format version 2", linears)
    for path, width in linears.items():
        _check_width(f"linear_bits[{path}]", width, 1)
    if "down_bits" in values and values["version"] < 3:
        _refuse("down_bits", "absent before format version 3", values["down_bits"])
    for name in _ENDS:
        if name in values and values["version"] < 4:
            _refuse(name, "absent before format version 4", values[name])
        _check_width(name, values.get(name, UNQUANTIZED), END_BITS[0])
    budget = values.get("budget")
    if budget is not None and (type(budget) not in (int, float) or not math.isfinite(budget)):
        _refuse("budget", "a number", budget)
    for name in ("method", "gemq_version"):
        if not isinstance(values.get(name), (str, type(None))):
            _refuse(name, "a string", values[name])


def _check_width(name: str, width: Any, low: int) -> None:
    if type(width) is not int or not (low <= width <= MAX_BITS or (low and width == UNQUANTIZED)):
        _refuse(name, f"bits in {low}..{MAX_BITS}" + (f" or {UNQUANTIZED}" if low else ""), width)


def _layer_bits(name: str, value: Any, kind: type[Any]) -> dict[int, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"quantization_config.{name} must map layers to bits, got {type(value).__name__}")
    result = {}
    for key, widths in value.items():
        if not re.fullmatch("0|[1-9][0-9]{0,5}", str(key)) or type(widths) is not kind or widths == []:
            raise CheckpointError(
                f"quantization_config.{name}[{reprlib.repr(key)}] is malformed: {reprlib.repr(widths)}"
            )
        for width in widths if kind is list else [widths]:
            _check_width(f"{name}[{key}]", width, 0 if kind is list else 1)
        result[int(key)] = widths
    if kind is list and not result:
        raise CheckpointError(f"quantization_config.{name} names no layer")
    return result
