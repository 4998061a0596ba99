"""Flat buffers of a layer's experts, of widths that may differ: build them, take them apart, change their layout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from gemq import format as fmt
from gemq.ops import checks, cpu
from gemq.ops.packed_stack import PackedStack
from gemq.ops.packing import pack, repack, unpack


def layout_for(device: torch.device | str) -> str:
    """The layout whose kernels serve ``device``: ``cpu_tile``, ``gpu_tile``, else ``canonical``."""
    return {"cpu": "cpu_tile", "cuda": "gpu_tile"}.get(torch.device(device).type, "canonical")


def pack_experts(
    codes: list[Tensor | None], meta: list[Tensor | None], bits: list[int], n: int, k: int, group_size: int = 128,
    layout: str = "canonical",
) -> tuple[Tensor, Tensor]:
    """Flat ``(codes uint8, meta float16)`` of a stack of experts.

    ``codes[e]`` is uint8 ``[n, k]`` and ``meta[e]`` float16 ``[n, k // group_size, 2]``; both are ``None`` for an
    expert of 0 bits. Offsets are those of :func:`gemq.format.expert_layout`. Raises ``TypeError`` or ``ValueError``
    if a length, a width, a dtype or a shape does not fit.
    """
    plan = fmt.expert_layout(bits, n, k, group_size, layout)
    if not len(codes) == len(meta) == len(bits):
        raise ValueError(f"codes, meta and bits must be equally long, got {len(codes)}, {len(meta)}, {len(bits)}")
    device = next((c.device for c in codes if c is not None), torch.device("cpu"))
    flat = torch.empty(plan.code_bytes, dtype=torch.uint8, device=device)
    flat_meta = torch.empty(plan.meta_elements, dtype=torch.float16, device=device)
    for e, (width, plain, pairs, at, meta_at) in enumerate(
        zip(bits, codes, meta, plan.code_offsets, plan.meta_offsets, strict=True)
    ):
        if width == 0:
            continue
        plain, pairs = _checked_expert(e, plain, pairs, n, k, group_size)
        packed, tiled = pack(plain, width).flatten(), pairs.contiguous().flatten()
        if layout != "canonical":
            packed, tiled = repack(packed, tiled, width, n, k, group_size, target=layout)
        flat[at : at + packed.numel()] = packed
        flat_meta[meta_at : meta_at + tiled.numel()] = tiled
    return flat, flat_meta


def _checked_expert(
    e: int, codes: Tensor | None, meta: Tensor | None, n: int, k: int, group_size: int
) -> tuple[Tensor, Tensor]:
    codes, meta = cast(Tensor, codes), cast(Tensor, meta)  # the checks refuse None
    checks.tensor(f"codes[{e}]", codes, dtype=torch.uint8, dim=2)
    if tuple(codes.shape) != (n, k):
        raise ValueError(f"codes[{e}] must have shape {[n, k]}, got {list(codes.shape)}")
    checks.metadata(f"meta[{e}]", meta, n, k, group_size)
    return codes, meta


def convert_experts(
    codes: Tensor, meta: Tensor, bits: list[int], n: int, k: int, group_size: int, source: str, target: str
) -> tuple[Tensor, Tensor]:
    """Flat buffers of a stack in another layout, expert by expert."""
    old = fmt.expert_layout(bits, n, k, group_size, source)
    new = fmt.expert_layout(bits, n, k, group_size, target)
    allocate = cpu.empty if target == "cpu_tile" else partial(torch.empty, device=codes.device)
    out, out_meta = allocate(new.code_bytes, dtype=torch.uint8), allocate(new.meta_elements, dtype=torch.float16)
    for e, width in enumerate(bits):
        if width == 0:
            continue
        size = fmt.codes_bytes(n, k, width, source)
        pairs = fmt.meta_elements(n, k, width, group_size, source)
        part, part_meta = repack(
            codes[old.code_offsets[e] : old.code_offsets[e] + size],
            meta[old.meta_offsets[e] : old.meta_offsets[e] + pairs],
            width, n, k, group_size, source=source, target=target,
        )
        out[new.code_offsets[e] : new.code_offsets[e] + part.numel()] = part
        out_meta[new.meta_offsets[e] : new.meta_offsets[e] + part_meta.numel()] = part_meta
    return out, out_meta


def unpack_experts(
    codes: Tensor, meta: Tensor, bits: list[int], n: int, k: int, group_size: int = 128, layout: str = "canonical"
) -> list[tuple[Tensor, Tensor] | None]:
    """The inverse of :func:`pack_experts`: per expert ``(codes [n, k], meta [n, groups, 2])``, ``None`` at 0 bits."""
    if layout != "canonical":
        codes, meta = convert_experts(codes, meta, bits, n, k, group_size, layout, "canonical")
    plan = fmt.expert_layout(bits, n, k, group_size, "canonical")
    out: list[tuple[Tensor, Tensor] | None] = []
    for width, at, meta_at in zip(bits, plan.code_offsets, plan.meta_offsets, strict=True):
        if width == 0:
            out.append(None)
            continue
        packed = codes[at : at + fmt.codes_bytes(n, k, width)].view(n, -1)
        pairs = meta[meta_at : meta_at + fmt.meta_elements(n, k, width, group_size)]
        out.append((unpack(packed, width, k), pairs.view(n, k // group_size, 2)))
    return out


def expert_tables(
    bits: list[int], n: int, k: int, group_size: int = 128, layout: str = "canonical",
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(expert_bits int32, expert_offsets int64, meta_offsets int64)``, each ``[E]``, of a stack that
    :func:`pack_experts` packed."""
    plan = fmt.expert_layout(bits, n, k, group_size, layout)
    return (
        torch.tensor(plan.bits, dtype=torch.int32, device=device),
        torch.tensor(plan.code_offsets, dtype=torch.int64, device=device),
        torch.tensor(plan.meta_offsets, dtype=torch.int64, device=device),
    )


def pack_stack(
    codes: Sequence[Tensor | None], meta: Sequence[Tensor | None], bits: Sequence[int], group_size: int = 128,
    layout: str = "canonical",
) -> PackedStack:
    """Pack experts ``codes[e]`` uint8 ``[n, k]`` with ``meta[e]`` float16 ``[n, k // group_size, 2]``.

    Both are ``None`` for an expert of 0 bits. Raises ``TypeError`` or ``ValueError`` if a length, a width, a dtype or a
    shape does not fit, or if every expert has 0 bits.
    """
    first = next((c for c in codes if c is not None), None)
    if first is None:
        raise ValueError("codes must hold at least one expert of more than 0 bits, got none")
    n, k = first.shape
    buffers = pack_experts(list(codes), list(meta), list(bits), n, k, group_size, layout)
    tables = expert_tables(list(bits), n, k, group_size, layout, first.device)
    return PackedStack(*buffers, *tables, n, k, group_size, layout)
