"""GPTQ inside one group of columns, in plain torch: the column loop, and descent over the codes that it chose."""

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


def descend_codes(products: Tensor, hessian: Tensor, codes: Tensor, meta: Tensor, bits: Tensor) -> Tensor:
    """Coordinate descent over the codes of one group: left to right, each becomes the best one for the output error
    ``tr(D H D')`` of ``D = weights - quantized`` when all other codes stay (QuantEase, arXiv 2309.01885, Eq. 13).

    Args:
        products: ``[E, n, g]`` float, ``D H`` of the whole matrices in this group's columns.
        hessian: ``[E, g, g]``, the group's block on the diagonal, its own diagonal positive.
        codes: uint8 ``[E, n, g]`` as they are.
        meta: float16 ``[E, n, 2]``, ``(s, m)`` with positive ``s``.
        bits: ``[E]`` widths 1..8.

    Returns:
        New ``codes`` uint8 ``[E, n, g]``; the error is never larger than before.
    """
    products, found = products.clone(), codes.to(products.dtype)
    scale = meta[..., 0].to(products.dtype)
    most = (2.0**bits - 1).view(-1, 1).to(products.dtype)
    for i in range(products.shape[-1]):
        old = found[..., i].clone()
        best = old + products[..., i] / (hessian[:, i, i, None] * scale)
        found[..., i] = torch.round(best.clamp(min=0).minimum(most))
        change = (found[..., i] - old) * scale
        products[..., i:] -= change[..., None] * hessian[:, None, i, i:]
    return found.to(torch.uint8)
