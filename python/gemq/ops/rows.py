"""Dequantize some rows of a packed matrix, in any layout: on every device, without a copy to the host, and of shapes
that depend on nothing but the number of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq import format as fmt
from gemq._core import core
from gemq.ops import checks
from gemq.ops.packing import dequantize


def dequantized_rows(
    codes: Tensor, meta: Tensor, rows: Tensor, bits: int, k: int, group_size: int, layout: str, dtype: torch.dtype
) -> Tensor:
    """``q * s + m`` in float32, rounded once to ``dtype``, of the rows ``rows`` int64 ``[T]``: ``[T, k]``.

    ``codes`` uint8 and ``meta`` float16 are the flat buffers of the matrix in ``layout``; ``gpu_tile`` with 3 bits is
    not read here. Rows are not checked: one beyond the matrix may read the padding.
    """
    fmt.check_layout(layout)
    if layout == "canonical":
        picked, pairs = codes.view(-1, fmt.row_bytes(k, bits))[rows], meta.view(-1, k // group_size, 2)[rows]
        kind = dtype if dtype in checks.FLOATS else torch.float32
        return dequantize(picked, pairs, bits, k, group_size, kind).to(dtype)
    q, pairs = (_cpu_tile if layout == "cpu_tile" else _gpu_tile)(codes, meta, rows, bits, k, group_size)
    s, m = pairs.float().unbind(-1)
    return (q.float().unflatten(-1, (-1, group_size)) * s[..., None] + m[..., None]).flatten(-2).to(dtype)


def cpu_rows(
    codes: Tensor, meta: Tensor, rows: Tensor, bits: int, n: int, k: int, group_size: int, layout: str
) -> Tensor:
    """Rows float32 ``[T, k]`` as :func:`dequantized_rows` of a matrix ``[n, k]`` on the CPU, canonical or in cpu_tile,
    by the compiled kernel. Raises ``ValueError`` for a row outside the matrix."""
    rows = rows.contiguous()
    out = torch.empty(len(rows), k)
    core().read_rows(
        codes=codes.data_ptr(), meta=meta.data_ptr(), rows=rows.data_ptr(), dst=out.data_ptr(), n=n, count=len(rows),
        k=k, bits=bits, group_size=group_size, tiled=layout == "cpu_tile", threads=torch.get_num_threads(),
    )
    return out


def _cpu_tile(
    codes: Tensor, meta: Tensor, rows: Tensor, bits: int, k: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """Codes ``[T, k]`` and pairs ``[T, groups, 2]`` of rows."""
    block, row = rows // fmt.CPU_ROWS, rows % fmt.CPU_ROWS
    groups = k // group_size
    vectors = codes.view(-1, groups * group_size * bits // 32, fmt.CPU_ROWS, 4)[block, :, row]
    vectors, found, at = vectors.unflatten(1, (groups, -1)), None, 0
    for width, shift in fmt.cpu_planes(bits):
        plane = vectors[:, :, at : at + group_size * width // 32]
        at += group_size * width // 32
        # [T, group, vector, field, j]
        fields = [plane >> (width * f) & (1 << width) - 1 for f in range(8 // width)]
        part = (torch.stack(fields, -2) if len(fields) > 1 else plane).flatten(1) << shift
        found = part if found is None else found | part
    assert found is not None
    return found, meta.view(-1, groups, 2, fmt.CPU_ROWS)[block, :, :, row]


def _gpu_tile(
    codes: Tensor, meta: Tensor, rows: Tensor, bits: int, k: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """Codes ``[T, k]`` and pairs ``[T, groups, 2]`` of rows."""
    tile, row = rows // fmt.GPU_ROWS, rows % fmt.GPU_ROWS
    bits = fmt.gpu_bits(bits)
    kw, (spans, _) = fmt.gpu_kw(k, bits), fmt.gpu_spans(k, bits)
    words = codes.view(torch.int32).view(-1, spans, fmt.GPU_WORDS[bits], fmt.GPU_ROWS, kw)[tile, :, :, row]
    # [T, span, word, field of the word, i, half]
    shifts = bits * torch.arange(16 // bits, device=codes.device)[:, None] + 16 * torch.arange(2, device=codes.device)
    fields = words[:, :, :, None, :, None] >> shifts[:, None, :].int() & (1 << bits) - 1
    return fields.flatten(1)[:, :k], meta.view(-1, k // group_size, fmt.GPU_ROWS, 2)[tile, :, row]
