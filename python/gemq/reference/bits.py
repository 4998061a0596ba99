"""The canonical bit stream and ``w = q * s + m`` in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq.format import check_bits, row_bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes ``[..., k]`` to uint8 ``[..., ceil(k * bits / 8)]``, little-endian (:mod:`gemq.format`).

    Bits of a code above ``bits`` are dropped; the last byte is padded with zeros.
    """
    check_bits(bits)
    k = codes.shape[-1]
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes[..., None] >> shifts) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, row_bytes(k, bits) * 8 - k * bits))
    stream = stream.unflatten(-1, (row_bytes(k, bits), 8))
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=codes.device)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    """The inverse of :func:`pack`: uint8 ``[..., row_bytes]`` to codes ``[..., k]``."""
    check_bits(bits)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed[..., None] >> shifts) & 1).flatten(-2)[..., : k * bits]
    stream = stream.unflatten(-1, (k, bits))
    weights = torch.tensor([1 << i for i in range(bits)], dtype=torch.uint8, device=packed.device)
    return (stream * weights).sum(-1, dtype=torch.uint8)


def dequantize(
    packed: Tensor, meta: Tensor, bits: int, k: int, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights ``[n, k]`` of canonical codes ``[n, row_bytes]`` and metadata float16 ``[n, k // group_size, 2]``.

    ``q * s`` is exact in float32 and ``+ m`` rounds once, so every implementation agrees to the bit in
    float32; other dtypes are that float32 value rounded once.
    """
    q = unpack(packed, bits, k).unflatten(-1, (-1, group_size))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    s, m = meta.to(wide).unbind(-1)
    return (q.to(wide) * s[..., None] + m[..., None]).flatten(-2).to(dtype)
