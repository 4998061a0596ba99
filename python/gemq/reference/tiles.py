"""The kernels' tile layouts of :mod:`gemq.format`, built index by index: slow, and plain to check."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq import format as fmt
from gemq.reference.bits import pack, unpack


def _pad_rows(x: Tensor, block: int) -> Tensor:
    extra = -x.shape[0] % block
    return torch.nn.functional.pad(x, (0, 0) * (x.dim() - 1) + (0, extra))


def _cpu_codes(codes: Tensor, bits: int, group_size: int) -> Tensor:
    """Codes ``[n, k]`` to the bytes of ``cpu_tile``."""
    codes = _pad_rows(codes, fmt.CPU_ROWS)
    k = codes.shape[1]
    groups = codes.reshape(-1, fmt.CPU_ROWS, k // group_size, group_size).permute(0, 2, 1, 3)
    planes = []
    for width, shift in fmt.cpu_planes(bits):
        part = (groups >> shift) & ((1 << width) - 1)
        fields = 8 // width
        # [block, group, row, vector, field, j] -> [block, group, vector, row, j, field]
        part = part.unflatten(-1, (-1, fields, 4)).permute(0, 1, 3, 2, 5, 4)
        weights = torch.tensor([1 << (width * f) for f in range(fields)], dtype=torch.uint8)
        planes.append((part * weights).sum(-1, dtype=torch.uint8).flatten(2))
    return torch.cat(planes, -1).flatten()


def _cpu_codes_inverse(tile: Tensor, bits: int, n: int, k: int, group_size: int) -> Tensor:
    blocks = -(-n // fmt.CPU_ROWS)
    tile = tile.reshape(blocks, k // group_size, -1)
    codes = torch.zeros(blocks, k // group_size, fmt.CPU_ROWS, group_size, dtype=torch.uint8)
    at = 0
    for width, shift in fmt.cpu_planes(bits):
        size = fmt.CPU_ROWS * group_size * width // 8
        part = tile[..., at : at + size].reshape(blocks, k // group_size, -1, fmt.CPU_ROWS, 4)
        at += size
        fields = torch.stack([(part >> (width * f)) & ((1 << width) - 1) for f in range(8 // width)], -1)
        codes |= fields.permute(0, 1, 3, 2, 5, 4).flatten(3) << shift
    return codes.permute(0, 2, 1, 3).reshape(-1, k)[:n]


def _gpu_fields(bits: int) -> list[list[tuple[int, int, int]]]:
    """List the pieces of each field, ``(word, bit in the half, bit of the code, ...)``, one bit at a time."""
    if bits == 3:
        whole = [[(f // 5, 3 * (f % 5) + b, b) for b in range(3)] for f in range(15)]
        return [*whole, [(b, 15, b) for b in range(3)]]
    per_word = 16 // bits
    fields = fmt.GPU_FIELDS[bits]
    return [[(f // per_word, bits * (f % per_word) + b, b) for b in range(bits)] for f in range(fields)]


def _gpu_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes ``[n, k]`` to the bytes of ``gpu_tile``."""
    k = codes.shape[1]
    bits = fmt.gpu_bits(bits)
    kw, (spans, span) = fmt.gpu_kw(k, bits), fmt.gpu_spans(k, bits)
    codes = torch.nn.functional.pad(_pad_rows(codes, fmt.GPU_ROWS), (0, spans * span - k)).to(torch.int64)
    # [tile, row, span, field, i, half] -> [tile, span, field, row, i, half]
    codes = codes.reshape(-1, fmt.GPU_ROWS, spans, fmt.GPU_FIELDS[bits], kw, 2).permute(0, 2, 3, 1, 4, 5)
    words = torch.zeros(codes.shape[0], spans, fmt.GPU_WORDS[bits], fmt.GPU_ROWS, kw, dtype=torch.int64)
    for field, pieces in enumerate(_gpu_fields(bits)):
        for word, bit, code_bit in pieces:
            for half in (0, 1):
                words[:, :, word] |= ((codes[:, :, field, ..., half] >> code_bit) & 1) << (bit + 16 * half)
    as_int32 = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return as_int32.flatten().view(torch.uint8)


def _gpu_codes_inverse(tile: Tensor, bits: int, n: int, k: int) -> Tensor:
    bits = fmt.gpu_bits(bits)
    kw, (spans, span) = fmt.gpu_kw(k, bits), fmt.gpu_spans(k, bits)
    words = tile.clone().view(torch.int32).to(torch.int64)
    words = words.reshape(-1, spans, fmt.GPU_WORDS[bits], fmt.GPU_ROWS, kw)
    codes = torch.zeros(words.shape[0], spans, fmt.GPU_FIELDS[bits], fmt.GPU_ROWS, kw, 2, dtype=torch.int64)
    for field, pieces in enumerate(_gpu_fields(bits)):
        for word, bit, code_bit in pieces:
            for half in (0, 1):
                codes[:, :, field, ..., half] |= ((words[:, :, word] >> (bit + 16 * half)) & 1) << code_bit
    return codes.permute(0, 3, 1, 2, 4, 5).reshape(-1, spans * span)[:n, :k].to(torch.uint8)


def to_layout(
    packed: Tensor, meta: Tensor, bits: int, k: int, group_size: int, layout: str
) -> tuple[Tensor, Tensor]:
    """Canonical codes ``[n, row_bytes]`` and metadata ``[n, groups, 2]`` as flat buffers of ``layout``.

    Returns ``(codes uint8 [codes_bytes], meta float16 [meta_elements])``.
    """
    fmt.check_layout(layout)
    fmt.check_group_size(group_size, k)
    if layout == "canonical":
        return packed.flatten(), meta.flatten()
    codes = unpack(packed, bits, k)
    if layout == "cpu_tile":
        padded = _pad_rows(meta, fmt.CPU_ROWS)
        # [block, row, group, 2] -> [block, group, 2, row]
        tiled = padded.reshape(-1, fmt.CPU_ROWS, k // group_size, 2).permute(0, 2, 3, 1).flatten()
        return _cpu_codes(codes, bits, group_size), tiled
    padded = _pad_rows(meta, fmt.GPU_ROWS)
    tiled = padded.reshape(-1, fmt.GPU_ROWS, k // group_size, 2).permute(0, 2, 1, 3).flatten()
    return _gpu_codes(codes, bits), tiled


def from_layout(
    codes: Tensor, meta: Tensor, bits: int, n: int, k: int, group_size: int, layout: str
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`to_layout`: canonical codes ``[n, row_bytes]`` and metadata ``[n, groups, 2]``."""
    fmt.check_layout(layout)
    fmt.check_group_size(group_size, k)
    groups = k // group_size
    if layout == "canonical":
        return codes.reshape(n, -1), meta.reshape(n, groups, 2)
    if layout == "cpu_tile":
        plain = _cpu_codes_inverse(codes, bits, n, k, group_size)
        rows = meta.reshape(-1, groups, 2, fmt.CPU_ROWS).permute(0, 3, 1, 2)
        return pack(plain, bits), rows.reshape(-1, groups, 2)[:n]
    plain = _gpu_codes_inverse(codes, bits, n, k)
    rows = meta.reshape(-1, groups, fmt.GPU_ROWS, 2).permute(0, 2, 1, 3)
    return pack(plain, bits), rows.reshape(-1, groups, 2)[:n]
