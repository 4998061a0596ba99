"""Dtype names and tensor layout of safetensors files, for reading and writing piece by piece."""

from __future__ import annotations

import json

import torch
from torch import Tensor

from gemq.errors import NumberError

# in the order in which the library writes a file's tensors
DTYPES = {
    "U64": torch.uint64, "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "U32": torch.uint32,
    "I32": torch.int32, "BF16": torch.bfloat16, "F16": torch.float16, "U16": torch.uint16, "I16": torch.int16,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
# other dtypes that the library reads, in bits an element: stored by other quantizers, never by gemq
OTHER_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "C64": 64,
}
# the types that weights are read in
WEIGHTS = ("F64", "F32", "F16", "BF16")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


def element_bits(name: str) -> int:
    """Bits of an element of a dtype as safetensors files spell it. Raises ``ValueError`` for an unknown one."""
    if name in DTYPES:
        return 8 * DTYPES[name].itemsize
    if name in OTHER_BITS:
        return OTHER_BITS[name]
    raise ValueError(f"the dtype {name!r:.40} is not known")


def check_finite(name: str, value: Tensor) -> Tensor:
    """``value``, which is about to be written. Raises :class:`NumberError` if it holds NaN or infinity."""
    if not value.is_floating_point() or not value.numel() or value.is_meta:
        return value
    # NaN passes through the extremes, which are several times as fast to find as what is not finite
    if not bool(torch.isfinite(torch.stack(torch.aminmax(value))).all()):
        raise NumberError(f"{name} is not finite ({str(value.dtype).removeprefix('torch.')}), so it is not written")
    return value


def file_head(tensors: dict[str, Tensor]) -> tuple[bytes, dict[str, int]]:
    """Return the bytes before the data of a file with these tensors, and the offset in the file at which each tensor
    begins."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for name in sorted(tensors, key=lambda n: (_RANK[tensors[n].dtype], n)):
        value, offsets[name] = tensors[name], end
        end += value.nbytes
        header[name] = {
            "dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [offsets[name], end]
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + at for name, at in offsets.items()}
