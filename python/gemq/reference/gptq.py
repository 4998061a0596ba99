"""One group of GPTQ's column loop in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq.reference.grid import find_grid, round_to_grid


def gptq_group(
    block: Tensor, factor: Tensor, bits: Tensor, clip: str = "none", propagate_from: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the columns of one group, left to right, each error propagated to the later ones.

    Args:
        block: ``[E, n, g]`` float, one group of columns of every matrix, as earlier groups left them.
        factor: ``[E, g, g]``, that group's diagonal block of the upper Cholesky factor of the inverse Hessian.
        bits: ``[E]`` widths 1..8.
        clip: range search of :func:`gemq.reference.grid.find_grid`.
        propagate_from: smallest width whose errors are propagated inside the group (1: GPTQ as published).

    Returns:
        ``codes`` uint8 ``[E, n, g]``, ``meta`` float16 ``[E, n, 2]`` and ``errors`` ``[E, n, g]``, each column's
        ``(w - q) / factor_ii``, from which the later groups are updated.
    """
    block = block.clone()
    max_code = (2.0**bits - 1).view(-1, 1, 1).to(block.dtype)
    inside = (bits >= propagate_from).view(-1, 1).to(block.dtype)
    s, m = find_grid(block, max_code, clip)
    codes, errors = torch.empty_like(block, dtype=torch.uint8), torch.empty_like(block)
    for i in range(block.shape[-1]):
        column = block[..., i : i + 1]
        code = round_to_grid(column, s, m, max_code)
        error = (column - (code * s + m)).squeeze(-1) / factor[:, i, i, None]
        codes[..., i], errors[..., i] = code.squeeze(-1).to(torch.uint8), error
        block[..., i:] -= (error * inside)[..., None] * factor[:, None, i, i:]
    return codes, torch.cat([s, m], -1).to(torch.float16), errors
