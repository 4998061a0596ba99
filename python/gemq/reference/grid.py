"""The quantization grid ``w = q * s + m`` of a group, and rounding to it."""

from __future__ import annotations

import torch
from torch import Tensor

CLIPS = ("none", "paper", "mse")
_FP16_MAX = 65504.0
_FP16_TINY = 2.0**-24


def _factors(clip: str) -> tuple[list[float], float]:
    """Scalings of the range that are tried, the unclipped one first, and the norm of the error."""
    if clip == "none":
        return [1.0], 2.0
    if clip == "paper":
        # the authors' scripts: 0.9 .. 1.1 in steps of 0.002, |error| ** 2.4
        return [1.0, *(1 + 0.002 * i for i in range(1, 51)), *(1 - 0.002 * i for i in range(1, 51))], 2.4
    if clip == "mse":
        return [1 - 0.02 * i for i in range(41)], 2.0
    raise ValueError(f"clip must be one of {', '.join(CLIPS)}, got {clip!r}")


def _fp16(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(x.dtype)


def check_weights(w: Tensor) -> None:
    """Raise ``ValueError`` unless all of ``w`` is finite and within float16's range."""
    if not bool(torch.isfinite(w).all()) or float(w.abs().max()) > _FP16_MAX:
        raise ValueError(f"weights must be finite and within +-{_FP16_MAX:g} to be quantized")


def round_to_grid(w: Tensor, s: Tensor, m: Tensor, max_code: Tensor) -> Tensor:
    """Codes of ``w`` as floats; ``max_code`` 1 takes the sign, as a binary expert does."""
    codes = torch.clamp(torch.round((w - m) / s), min=0).minimum(max_code)
    return torch.where(max_code == 1, (w >= 0).to(w.dtype), codes)


def find_grid(w: Tensor, max_code: Tensor, clip: str = "none") -> tuple[Tensor, Tensor]:
    """``(s, m)`` of groups ``w [..., group]``, each ``[..., 1]``, already rounded to float16.

    ``max_code`` (``2 ** bits - 1``) broadcasts against ``[..., 1]``. Above one bit the range is that of the group
    and zero, scaled by the factor of ``clip`` with the least error ("none": 1; "paper": 0.9 .. 1.1 under the
    2.4-norm; "mse": 1.0 down to 0.2, squared). One bit: ``s = 2 * mean|w|``, ``m = -s / 2``.

    Raises ``ValueError`` for weights beyond float16's range, NaN or infinity.
    """
    check_weights(w)
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    factors, norm = _factors(clip)
    best = torch.full_like(low, float("inf"))
    scale, offset = torch.ones_like(low), torch.zeros_like(low)
    for factor in factors:
        s = _fp16(factor * (high - low) / max_code).clamp(min=_FP16_TINY)
        m = _fp16(factor * low)
        if len(factors) == 1:
            scale, offset = s, m
            break
        error = (round_to_grid(w, s, m, max_code) * s + m - w).abs().pow(norm).sum(-1, keepdim=True)
        better = error < best
        best, scale, offset = (torch.where(better, a, b) for a, b in ((error, best), (s, scale), (m, offset)))
    binary = _fp16(2 * w.abs().mean(-1, keepdim=True)).clamp(min=_FP16_TINY)
    one_bit = max_code == 1
    return torch.where(one_bit, binary, scale), torch.where(one_bit, _fp16(-binary / 2), offset)


def round_to_nearest(weight: Tensor, bits: int, group_size: int, clip: str = "none") -> tuple[Tensor, Tensor]:
    """Quantize ``weight [..., n, k]`` group by group with no error propagation (RTN).

    Returns ``(codes uint8 [..., n, k], meta float16 [..., n, k // group_size, 2])``.
    """
    w = weight.float().unflatten(-1, (-1, group_size))
    max_code = torch.tensor(float(2**bits - 1), device=w.device)
    s, m = find_grid(w, max_code, clip)
    codes = round_to_grid(w, s, m, max_code).to(torch.uint8).flatten(-2)
    return codes, torch.cat([s, m], -1).to(torch.float16)


def dequantize_codes(codes: Tensor, meta: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``q * s + m`` in float32, rounded once to ``dtype``: codes ``[..., n, k]``, meta ``[..., n, groups, 2]``."""
    groups = meta.shape[-2]
    s, m = meta.float().unbind(-1)
    return (codes.float().unflatten(-1, (groups, -1)) * s[..., None] + m[..., None]).flatten(-2).to(dtype)
