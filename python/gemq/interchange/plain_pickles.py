"""Read a pickle of numbers in plain containers and numpy arrays without running anything that it names.

A pickle is a program: it can name any function of any module and call it. Here every name it mentions is looked up in
:data:`STAND_INS` alone. What stands for numpy's constructors below only notes sizes and bytes; an array is then made
from those by ``numpy.frombuffer``.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from gemq.errors import GemqError

LARGEST = 64 << 20
_KINDS = "iufb"


class PickleError(GemqError, ValueError):
    """A pickle holds something other than numbers, texts, plain containers and numpy arrays of numbers."""


class _Dtype:
    """Stands for ``numpy.dtype``: a kind, a size and a byte order."""

    def __init__(self, code: str = "", *_: Any):
        self.code, self.order = code, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = state[1]

    def value(self) -> np.dtype:
        if not isinstance(self.code, str) or self.code[:1] not in _KINDS or not self.code[1:].isdecimal():
            raise PickleError(f"arrays of {self.code!r} are not read, only of numbers")
        order: Any = "=" if self.order == "|" else self.order
        return np.dtype(self.code).newbyteorder(order)


def _from_bytes(raw: Any, dtype: Any, shape: Any, fortran: Any) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(raw, (bytes, bytearray)):
        raise PickleError("an array's contents are malformed")
    kind = dtype.value()
    plain = isinstance(shape, tuple) and all(type(n) is int and n >= 0 for n in shape)
    if not plain or math.prod(shape) * kind.itemsize != len(raw):
        raise PickleError(f"an array of shape {shape!r} does not hold {len(raw)} bytes")
    return np.frombuffer(raw, kind).reshape(shape, order="F" if fortran is True or fortran == "F" else "C")


class _Array:
    """Stands for an array under construction: protocols below 5 fill it in by a state."""

    value: np.ndarray | None = None

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _from_bytes(raw, dtype, shape, fortran)


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> np.ndarray:
    return _from_bytes(raw, dtype, shape, order)


def _scalar(dtype: Any, raw: Any) -> int | float:
    return _from_bytes(raw, dtype, (), False).item()


def _encode(text: Any, encoding: Any) -> bytes:
    """Encode bytes as pickle protocols below 3 store them: as latin-1 text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise PickleError("bytes are malformed")
    return text.encode("latin1")


class _NdarrayMark:
    """Stands for ``numpy.ndarray``, which is only ever passed on."""


STAND_INS = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _frombuffer for core in ("core", "_core")},
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _NdarrayMark,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): dict,
}


# the one written in Python: the C one allocates what a file's memo index says, up to 64 GB
class _Reader(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in STAND_INS:
            raise PickleError(f"it names {module}.{name}, which is neither a plain container nor an array of numpy")
        return STAND_INS[module, name]

    def get_extension(self, code: int) -> Any:
        raise PickleError(f"it names the registered extension {code}")


def _plain(value: Any, depth: int = 0) -> Any:
    if depth > 8:
        raise PickleError("it is nested more than 8 deep")
    if isinstance(value, dict):
        return {_plain(k, depth + 1): _plain(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, depth + 1) for v in value]
    if isinstance(value, _Array):
        value = value.value
    if isinstance(value, np.ndarray) or value is None or type(value) in (bool, int, float, str):
        return value
    raise PickleError(f"it holds a {type(value).__name__}")


def read_plain_pickle(path: Path) -> Any:
    """The contents of a pickle: dicts, lists, texts, numbers, and numpy arrays of numbers. Nothing in it is run.

    Raises :class:`PickleError` naming the file for anything else and for files above 64 MiB, ``OSError`` if it
    cannot be read.
    """
    size = path.stat().st_size
    if size > LARGEST:
        raise PickleError(f"{path}: {size} bytes are more than a bit allocation takes ({LARGEST})")
    try:
        with path.open("rb") as file:
            return _plain(_Reader(file).load())
    except PickleError as error:
        raise PickleError(f"{path}: {error}") from None
    except (OSError, KeyboardInterrupt):
        raise
    except (Exception, MemoryError) as error:
        # a malformed pickle fails anywhere in the reader: too few values on its stack, unhashable keys, ...
        raise PickleError(f"{path}: not a readable pickle ({type(error).__name__}: {str(error)[:200]})") from None
