"""GPTQ tensors as AutoGPTQ and GPTQModel store them, and their exact form in gemq's format.

A quantized linear of such a checkpoint, ``k`` columns in and ``n`` rows out, is

* ``qweight`` int32 ``[k * bits / 32, n]``: the codes of a row are a little-endian bit stream down a column;
* ``qzeros`` int32 ``[k / group, n * bits / 32]``: zero points as such a stream along a row, stored less one in format
  "gptq" (modulo ``2 ** bits``) and as they are in "gptq_v2";
* ``scales`` float16 ``[k / group, n]``, and ``g_idx`` int32 ``[k]``, the group of each column.

``w = scales * (q - z)``. The stream of a transposed ``qweight`` is gemq's canonical one byte for byte, so codes are
copied and never rounded; ``s = scales`` and ``m = -scales * z`` rounded to float16. Where that product is exact, as
with any zero point that is a power of two (all symmetric checkpoints), so are the weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gemq.errors import CheckpointError
from gemq.format import GROUP_SIZES, default_group_size
from gemq.ops import unpack

PARTS = ("qweight", "qzeros", "scales", "g_idx")
WIDTHS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class GptqShape:
    """One quantized linear: rows ``n``, columns ``k``, width, and columns that share a scale."""

    n: int
    k: int
    bits: int
    group: int


def checkpoint_format(quantization: dict) -> str:
    """ "gptq" or "gptq_v2" of a ``quantization_config``; :class:`CheckpointError` for anything else."""
    method = quantization.get("quant_method", "gptq")
    if method != "gptq":
        raise CheckpointError(f"quant_method must be gptq, got {method!r}")
    found = quantization.get("checkpoint_format", quantization.get("format", "gptq"))
    if found not in FORMATS or quantization.get("is_marlin_format"):
        raise CheckpointError(f"the GPTQ checkpoint_format must be {' or '.join(FORMATS)}, got {found!r}")
    return found


def shape_of(name: str, shapes: dict[str, list[int]], n: int, k: int) -> GptqShape:
    """The width and group of the linear ``name`` by the shapes of its tensors (keys of :data:`PARTS`).

    Raises :class:`CheckpointError` for tensors that do not make up an ``n`` x ``k`` matrix.
    """
    missing = [part for part in PARTS[:3] if part not in shapes]
    if missing:
        raise CheckpointError(f"{name} has no {missing[0]}")
    rows = shapes["qweight"][0] if len(shapes["qweight"]) == 2 else 0
    bits = rows * 32 // k
    if bits not in WIDTHS or bits * k != rows * 32:
        raise CheckpointError(
            f"{name}.qweight has shape {shapes['qweight']}, which is none of the widths {WIDTHS} for {k} columns"
        )
    groups = shapes["scales"][0] if shapes["scales"] else 0
    if groups < 1 or k % groups:
        raise CheckpointError(f"{name}.scales has shape {shapes['scales']}: {groups} groups do not divide {k} columns")
    wanted = {"qweight": [rows, n], "qzeros": [groups, n * bits // 32], "scales": [groups, n], "g_idx": [k]}
    if n * bits % 32:
        raise CheckpointError(f"{name}: {n} zero points of {bits} bits do not fill words of 32 bits")
    for part, shape in shapes.items():
        if shape != wanted[part]:
            raise CheckpointError(f"{name}.{part} has shape {shape}, expected {wanted[part]}")
    return GptqShape(n, k, bits, k // groups)


def common_group_size(shapes: list[GptqShape]) -> int:
    """The largest preferred group size whose groups lie inside those of every matrix.

    Raises :class:`CheckpointError` if there is none.
    """
    for size in sorted(GROUP_SIZES, reverse=True):
        if all(s.k % min(GROUP_SIZES) == 0 and s.group % default_group_size(s.k, size) == 0 for s in shapes):
            return size
    groups = sorted({s.group for s in shapes})
    raise CheckpointError(f"groups of {groups} columns cannot be kept: gemq's have {', '.join(map(str, GROUP_SIZES))}")


def convert(
    name: str, parts: dict[str, Tensor], shape: GptqShape, group_size: int, form: str
) -> tuple[Tensor, Tensor, int]:
    """``(codes, meta, zero points that wrapped)`` of one linear in gemq's canonical layout, flat.

    ``group_size`` divides the checkpoint's: its scales are repeated. The last number counts zero points stored as
    ``2 ** bits - 1`` in format "gptq", which AutoGPTQ reads as 0 and some kernels as ``2 ** bits``.

    Raises :class:`CheckpointError` for columns in activation order and for scales that gemq's format cannot hold.
    """
    n, k, bits = shape.n, shape.k, shape.bits
    for part, dtype in (("qweight", torch.int32), ("qzeros", torch.int32)):
        if parts[part].dtype != dtype:
            raise CheckpointError(f"{name}.{part} must be int32, got {str(parts[part].dtype).removeprefix('torch.')}")
    if "g_idx" in parts and not torch.equal(parts["g_idx"].long(), torch.arange(k) // shape.group):
        raise CheckpointError(
            f"{name} was quantized in activation order (desc_act): its groups are not runs of columns, which gemq's "
            "format needs; quantize it with desc_act=false"
        )
    codes = parts["qweight"].t().contiguous().view(torch.uint8).flatten()
    zeros = unpack(parts["qzeros"].contiguous().view(torch.uint8), bits, n).int()
    wrapped = 0
    if form == "gptq":
        wrapped = int((zeros == 2**bits - 1).sum())
        zeros = (zeros + 1) & (2**bits - 1)
    scales = parts["scales"].to(torch.float16)
    offsets = (-(scales.float() * zeros)).to(torch.float16)
    _check_metadata(name, parts["scales"], scales, offsets)
    meta = torch.stack([scales, offsets], -1).transpose(0, 1)  # [n, groups, 2]
    return codes, meta.repeat_interleave(shape.group // group_size, dim=1).flatten(), wrapped


def _check_metadata(name: str, given: Tensor, scales: Tensor, offsets: Tensor) -> None:
    if not bool(torch.isfinite(given).all()) or not bool((given > 0).all()):
        smallest = float(given.float().nan_to_num(-math.inf).min())
        raise CheckpointError(f"{name}.scales must be finite and above zero for gemq, the smallest is {smallest:g}")
    if not torch.equal(scales.to(given.dtype), given):
        raise CheckpointError(f"{name}.scales are {str(given.dtype).removeprefix('torch.')} and not exact in float16")
    if not bool(torch.isfinite(offsets).all()):
        raise CheckpointError(f"{name}: scale times zero point is beyond float16's range")
