"""Random packed expert stacks for the tests."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq import format as fmt
from gemq import reference


def random_stack(
    bits: list[int] | tuple[int, ...], n: int, k: int, group_size: int, layout: str, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``len(bits)`` experts of ``n`` x ``k`` with random codes and metadata, packed in ``layout``.

    Returns ``(qweight uint8, meta float16, expert_bits int32, expert_offsets int64, meta_offsets int64)``.
    Weights come out centred, with a standard deviation near ``k ** -0.5`` at every width.
    """
    generator = torch.Generator().manual_seed(seed)
    where = fmt.expert_layout(bits, n, k, group_size, layout)
    qweight = torch.zeros(where.code_bytes, dtype=torch.uint8)
    meta = torch.zeros(where.meta_elements, dtype=torch.float16)
    for width, code_at, meta_at in zip(where.bits, where.code_offsets, where.meta_offsets, strict=True):
        if width == 0:
            continue
        codes = torch.randint(0, 1 << width, (n, k), generator=generator).to(torch.uint8)
        top = (1 << width) - 1
        s = (0.5 + torch.rand(n, k // group_size, generator=generator)) * 3.5 / (top * k**0.5)
        m = -s * top * (0.4 + 0.2 * torch.rand(n, k // group_size, generator=generator))
        pairs = torch.stack([s, m], -1).to(torch.float16)
        tile, tiled_meta = reference.to_layout(reference.pack(codes, width), pairs, width, k, group_size, layout)
        qweight[code_at : code_at + tile.numel()] = tile
        meta[meta_at : meta_at + tiled_meta.numel()] = tiled_meta
    return (
        qweight,
        meta,
        torch.tensor(where.bits, dtype=torch.int32),
        torch.tensor(where.code_offsets, dtype=torch.int64),
        torch.tensor(where.meta_offsets, dtype=torch.int64),
    )
