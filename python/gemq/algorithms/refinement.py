"""Improve GPTQ's result. GPTQ chooses codes column by column, for a grid that was chosen before them.

With codes ``q`` and weights ``w`` of a row, the output error is ``(w - A p) H (w - A p)'``, where ``A p`` is the
dequantized row, linear in its scales and offsets ``p`` when the codes are fixed. A round improves either given the
other: every code in turn (:func:`gemq.ops.gptq.descend_codes`), then all scales and offsets of the row together, by
least squares. Neither raises the error.

What is left of the error makes outputs smaller: of a least-squares solution ``q`` the power ``q H q'`` is ``w H w'``
less the error, in every layer again. :func:`rescaled` gives a row its power back, at the price of a little error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gemq.ops.gptq import descend_codes
from gemq.reference.grid import dequantize_codes

# floats of the normal equations that are solved at a time, in rows of one matrix
NORMAL_FLOATS = 1 << 22
# keeps the equations of a group whose codes are all alike solvable; of the unit diagonal they are scaled to
RIDGE = 1e-6


def damped(hessian: Tensor, damping: float) -> Tensor:
    """Return ``hessian [..., k, k]`` with :func:`damping_of` added to its diagonal."""
    found = hessian.float().clone()
    found.diagonal(dim1=-2, dim2=-1).add_(damping_of(hessian, damping))
    return found


def damping_of(hessian: Tensor, damping: float) -> Tensor:
    """Return what GPTQ adds to the diagonal of ``hessian [..., k, k]``: ``[..., k]``, ``damping`` times the diagonal's
    mean. A column that no token excites (diagonal 0) gets the mean as well, so that it takes no part in the
    propagation."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True).clamp(min=1e-30)
    return torch.where(diagonal == 0, mean, 0.0) + damping * mean


def refine(
    weight: Tensor, hessian: Tensor, codes: Tensor, meta: Tensor, bits: int, rounds: int
) -> tuple[Tensor, Tensor]:
    """Lower the output error of one quantized matrix by ``rounds`` of descent over its codes and a fit of its grids.

    Args:
        weight: float32 ``[n, k]``.
        hessian: ``[k, k]`` positive definite, as :func:`damped` gives it.
        codes: uint8 ``[n, k]``.
        meta: float16 ``[n, groups, 2]``.
        bits: width of the codes.
        rounds: each costs two products with the Hessian and one solution of ``2 * groups`` unknowns a row.

    Returns:
        New ``(codes, meta)``; no row's error is larger than it was, up to rounding.
    """
    for _ in range(rounds):
        codes = descend(weight, hessian, codes, meta, bits)
        meta = fit_grids(weight, hessian, codes, meta)
    return codes, meta


def descend(weight: Tensor, hessian: Tensor, codes: Tensor, meta: Tensor, bits: int) -> Tensor:
    """One pass over all columns of :func:`refine`'s arguments: the new codes."""
    found, groups = codes.clone(), meta.shape[-2]
    size = weight.shape[-1] // groups
    residual = weight - dequantize_codes(codes, meta)
    widths = torch.tensor([bits], device=weight.device)
    for group in range(groups):
        at = slice(group * size, (group + 1) * size)
        products = residual @ hessian[:, at]
        new = descend_codes(
            products[None], hessian[None, at, at], found[None, :, at], meta[None, :, group], widths
        )[0]
        residual[:, at] -= (new.float() - found[:, at].float()) * meta[:, group, :1].float()
        found[:, at] = new
    return found


def rescaled(weight: Tensor, hessian: Tensor, codes: Tensor, meta: Tensor) -> Tensor:
    """Multiply each row's scales and offsets by one number, so that its outputs on the calibration text regain their
    original sum of squares ``w H w'``. Returns float16 ``[n, groups, 2]``; arguments as of :func:`refine`.

    A row without outputs, or whose numbers would leave float16's range, keeps ``meta``.
    """
    quantized = dequantize_codes(codes, meta)
    before, after = (((x @ hessian) * x).sum(-1) for x in (weight, quantized))
    factor = torch.where((before > 0) & (after > 0), before / after, 1.0).sqrt()
    new = (meta.float() * factor[:, None, None]).to(torch.float16)
    fine = torch.isfinite(new).flatten(1).all(-1) & (new[..., 0] > 0).all(-1)
    return torch.where(fine[:, None, None], new, meta)


def fit_grids(weight: Tensor, hessian: Tensor, codes: Tensor, meta: Tensor) -> Tensor:
    """Fit scales and offsets float16 ``[n, groups, 2]`` to the given codes by least output error.

    A row whose solution is not better after rounding to float16, or has a scale that is not positive, keeps ``meta``.
    """
    groups = meta.shape[-2]
    of_ones = hessian.unflatten(0, (groups, -1)).sum(1)  # 1_g' H: [groups, k]
    rows = max(1, NORMAL_FLOATS // (2 * groups) ** 2)
    found = [
        _fit_rows(hessian, of_ones, *part)
        for part in zip(weight.split(rows), codes.split(rows), meta.split(rows), strict=True)
    ]
    return torch.cat(found)


def _fit_rows(hessian: Tensor, of_ones: Tensor, weight: Tensor, codes: Tensor, meta: Tensor) -> Tensor:
    groups = meta.shape[-2]
    n, k = weight.shape
    size = k // groups
    q, residual = codes.float().unflatten(-1, (groups, size)), weight - dequantize_codes(codes, meta)
    normal = torch.empty(n, 2 * groups, 2 * groups, device=weight.device)
    for group in range(groups):
        at = slice(group * size, (group + 1) * size)
        against = (q[:, group] @ hessian[at]).unflatten(-1, (groups, size))
        normal[:, group, :groups], normal[:, group, groups:] = (against * q).sum(-1), against.sum(-1)
    normal[:, groups:, :groups] = normal[:, :groups, groups:].mT
    normal[:, groups:, groups:] = of_ones.unflatten(-1, (groups, size)).sum(-1)
    products = (residual @ hessian).unflatten(-1, (groups, size))
    right = torch.cat([(products * q).sum(-1), products.sum(-1)], -1)
    unit = normal.diagonal(dim1=-2, dim2=-1).clamp(min=1e-30).rsqrt()
    normal *= unit[:, :, None] * unit[:, None, :]
    normal.diagonal(dim1=-2, dim2=-1).add_(RIDGE)
    # symmetric and positive; MKL's LU, which a general solver takes, fails on larger ones after set_num_threads
    lower, info = torch.linalg.cholesky_ex(normal.double())
    step = torch.cholesky_solve((right * unit).double()[..., None], lower)[..., 0].float() * unit
    step = torch.where(info[:, None] == 0, step, float("nan"))
    new = (meta.float() + torch.stack([step[:, :groups], step[:, groups:]], -1)).to(torch.float16)
    fine = torch.isfinite(new).flatten(1).all(-1) & (new[..., 0] > 0).all(-1)
    new = torch.where(fine[:, None, None], new, meta)
    better = _row_errors(weight, new, codes, hessian) < _row_errors(weight, meta, codes, hessian)
    return torch.where(better[:, None, None], new, meta)


def _row_errors(weight: Tensor, meta: Tensor, codes: Tensor, hessian: Tensor) -> Tensor:
    delta = weight - dequantize_codes(codes, meta)
    return ((delta @ hessian) * delta).sum(-1)
