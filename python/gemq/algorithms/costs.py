"""The coefficients that allocations are solved from, and their file.

Measured once and saved, any budget is solved from them::

    {"format": "gemq-costs", "version": 2, "candidates": [1, 2, 3], "layers": [0, 1], "shared": null,
     "shared_multiple": 0.0, "routed": [[[0.9, 0.2, 0.1], [0.5, 0.3, 0.1]], [[0.1, 0.0, 0.0], [0.7, 0.2, 0.0]]],
     "matrices": null}
"""

from __future__ import annotations

import itertools
import json
import operator
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from gemq import durable
from gemq.format import check_bits

# 2: with matrices
FORMAT, VERSION = "gemq-costs", 2


def _array(name: str, value: Any, ndim: int) -> np.ndarray:
    """``value`` as a read-only float64 array of ``ndim`` dimensions, finite and >= 0, else ``ValueError``."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must have {ndim} dimensions, got rows of different lengths") from error
    if array.dtype.kind not in "iuf" or array.ndim != ndim or not array.size:
        raise ValueError(f"{name} must hold numbers in {ndim} dimensions, got {array.dtype} {array.shape}")
    array = array.astype(np.float64)
    bad = np.argwhere(~(np.isfinite(array) & (array >= 0)))
    if len(bad):
        index = tuple(bad[0].tolist())
        raise ValueError(f"{name}{list(index) or ''} must be finite and >= 0, got {array[index]}")
    array.setflags(write=False)
    return array


def _integers(name: str, values: Any) -> tuple[int, ...]:
    """``values`` as Python integers >= 0, strictly ascending, else ``ValueError``."""
    try:
        integers = tuple(-1 if isinstance(v, bool) else operator.index(v) for v in values)
    except TypeError:
        integers = ()
    if not integers or integers[0] < 0 or any(a >= b for a, b in itertools.pairwise(integers)):
        raise ValueError(f"{name} must be ascending, distinct integers >= 0, at least one, got {values!r}")
    return integers


@dataclass(frozen=True, eq=False)
class Costs:
    """Loss increases of Eq. 6 for every expert and candidate width. Raises ``ValueError`` for any value outside:

    ``candidates``
        B widths in bits, ascending, each in 0..8.
    ``routed`` ``[L, E, B]`` float64
        Predicted increase of the calibration loss when that expert of that MoE layer has that width; >= 0.
        Used as given: a width that costs more than a narrower one stays so.
    ``layers``
        Decoder layer index of each of the L rows, ascending.
    ``shared`` ``[L, B]`` float64 or None
        The same for the shared experts of a layer merged into one. None when the family has none, or when
        their width is not to be chosen (then :func:`solve` needs ``fixed_shared_bits``).
    ``shared_multiple``
        S, the width of the merged shared expert over that of a routed one (2 in DeepSeek-V2-Lite); 0 if none.
    ``matrices`` ``[L, E, 2, B]`` float64 or None
        As ``routed``, if only the gate and up projections of the expert (index 0), or only its down projection
        (index 1), have that width and the rest is as it was. None if it was not measured.
    """

    candidates: tuple[int, ...]
    routed: np.ndarray
    layers: tuple[int, ...]
    shared: np.ndarray | None = None
    shared_multiple: float = 0.0
    matrices: np.ndarray | None = None

    def __post_init__(self) -> None:
        candidates = _integers("candidates", self.candidates)
        for bits in candidates:
            check_bits(bits, allow_zero=True, name="candidates")
        routed = _array("routed", self.routed, 3)
        num_layers, _, num_widths = routed.shape
        if num_widths != len(candidates):
            raise ValueError(f"routed must be [L, E, {len(candidates)}] for candidates {candidates}: {routed.shape}")
        layers = _integers("layers", self.layers)
        if len(layers) != num_layers:
            raise ValueError(f"layers must name the {num_layers} layers of routed, got {len(layers)}: {layers}")
        multiple = float(_array("shared_multiple", self.shared_multiple, 0))
        if self.shared is not None:
            shared = _array("shared", self.shared, 2)
            if shared.shape != (num_layers, num_widths):
                raise ValueError(f"shared must be [L, B] = {(num_layers, num_widths)}, got {shared.shape}")
            if multiple == 0:
                raise ValueError("shared_multiple must be > 0 when shared is given, got 0")
            object.__setattr__(self, "shared", shared)
        if self.matrices is not None:
            matrices = _array("matrices", self.matrices, 4)
            expected = (*routed.shape[:2], 2, num_widths)
            if matrices.shape != expected:
                raise ValueError(f"matrices must be [L, E, 2, B] = {expected}, got {matrices.shape}")
            object.__setattr__(self, "matrices", matrices)
        for name, value in zip(("candidates", "routed", "layers"), (candidates, routed, layers), strict=True):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "shared_multiple", multiple)

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values; doubles are restored exactly."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v.tolist() if isinstance(v, np.ndarray) else v for name, v in values.items()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Costs:
        """The inverse of :meth:`to_json`."""
        return cls(**data)

    def save(self, path: str | os.PathLike) -> None:
        """Write the JSON of the module's docstring; an interrupted write leaves ``path`` as it was."""
        content = {"format": FORMAT, "version": VERSION, **self.to_json()}
        durable.replace(Path(path), (json.dumps(content, allow_nan=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Costs:
        """Read what :meth:`save` wrote.

        Raises ``ValueError`` naming the file if it is not such JSON or has another version, ``OSError`` if unreadable.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise ValueError(f"not a {FORMAT} file")
            version = content.get("version")
            if type(version) is not int or not 1 <= version <= VERSION:
                raise ValueError(f"version must be in 1..{VERSION}, got {version!r}")
            names = {field.name for field in fields(cls)} - ({"matrices"} if version == 1 else set())
            if content.keys() != names | {"format", "version"}:
                raise ValueError(f"missing or unknown keys: {sorted(content.keys() ^ (names | {'format', 'version'}))}")
            return cls(**{name: content[name] for name in names})
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error
