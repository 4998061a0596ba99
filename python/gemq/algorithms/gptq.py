"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323) for a batch of same-shape matrices of mixed widths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gemq.format import GROUP_SIZES
from gemq.ops.gptq import gptq_group
from gemq.reference.grid import CLIPS, dequantize_codes, round_to_nearest


@dataclass(frozen=True)
class GptqConfig:
    """How matrices are quantized.

    ``group_size`` columns share a grid; ``clip`` is the range search of :func:`gemq.reference.grid.find_grid`;
    ``damping`` is added to the Hessian's diagonal in units of its mean. ``propagate_from`` is the smallest width
    whose rounding error is propagated inside a group: 1 is GPTQ, 4 is what the paper's scripts do.
    """

    group_size: int = 128
    clip: str = "paper"
    damping: float = 0.01
    propagate_from: int = 1
    min_tokens: int = 1

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {self.group_size}")
        if self.clip not in CLIPS:
            raise ValueError(f"clip must be one of {', '.join(CLIPS)}, got {self.clip!r}")
        if not 0 < self.damping < 1:
            raise ValueError(f"damping must be above 0 and below 1, got {self.damping}")

    @classmethod
    def for_recipe(cls, recipe: str, group_size: int = 128, damping: float = 0.01, clip: str | None = None):
        """``default``: errors propagated at every width. ``paper``: as the published scripts quantize, range
        factors 0.9 .. 1.1 and no propagation inside a group at 3 bits and below."""
        if recipe not in ("default", "paper"):
            raise ValueError(f"recipe must be default or paper, got {recipe!r}")
        options = {"default": (cls.clip, 1), "paper": ("paper", 4)}
        chosen, propagate_from = options[recipe]
        return cls(group_size, clip or chosen, damping, propagate_from)


@dataclass(frozen=True)
class GptqReport:
    """Per matrix: calibration ``tokens``, the ``damping`` that was needed, ``fallback`` ("" or "rtn": too few
    tokens, or no positive definite Hessian), and the relative output error ``tr(D H D') / tr(W H W')``."""

    tokens: int
    damping: float
    fallback: str
    error: float


def inverse_factor(hessian: Tensor, damping: float, retries: int = 4) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of ``(H + damping * mean(diag H) * I) ^ -1`` of Hessians ``[E, k, k]``.

    Matrices that are not positive definite are retried alone with ten times the damping. Returns the factors and
    the damping used per matrix; NaN where all retries failed.
    """
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    # a column that no token excites neither takes part in nor disturbs the propagation
    dead = torch.where(diagonal == 0, mean[:, None].clamp(min=1e-30), 0.0)
    factors = torch.full_like(hessian, float("nan"))
    used = torch.full_like(mean, float("nan"))
    todo = torch.arange(len(hessian), device=hessian.device)
    for attempt in range(retries + 1):
        level = damping * 10**attempt
        damped = hessian[todo]
        damped.diagonal(dim1=-2, dim2=-1).add_(dead[todo]).add_((level * mean[todo].clamp(min=1e-30))[:, None])
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        upper, info_inverse = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        done = (info == 0) & (info_inverse == 0) & torch.isfinite(upper).all(-1).all(-1)
        factors[todo[done]], used[todo[done]] = upper[done], level
        todo = todo[~done]
        if not len(todo):
            break
    return factors, used


def quantize_columns(
    weight: Tensor, factor: Tensor, bits: Tensor, config: GptqConfig, group_size: int
) -> tuple[Tensor, Tensor]:
    """The column loop: weights ``[E, n, k]``, inverse factors ``[E, k, k]``, widths ``[E]``.

    Returns codes uint8 ``[E, n, k]`` and metadata float16 ``[E, n, k // group_size, 2]``. The grid of a group is
    found on its columns as all earlier groups left them, so the group is also the block of lazy updates.
    """
    w = weight.clone()
    codes = torch.empty_like(w, dtype=torch.uint8)
    metas = []
    for start in range(0, w.shape[-1], group_size):
        stop = start + group_size
        block = factor[:, start:stop, start:stop]
        codes[..., start:stop], meta, errors = gptq_group(
            w[..., start:stop], block, bits, config.clip, config.propagate_from
        )
        metas.append(meta)
        # in place: the product is as large as the weights
        w[..., stop:].baddbmm_(errors, factor[:, start:stop, stop:], alpha=-1)
    return codes, torch.stack(metas, 2)


def gptq(
    weight: Tensor, hessian: Tensor, bits: list[int], tokens: list[int], config: GptqConfig, group_size: int
) -> tuple[Tensor, Tensor, list[GptqReport]]:
    """Quantize ``weight [E, n, k]``, one width from 1 to 8 per matrix, given ``hessian [E, k, k]`` (sum of x x').

    A matrix with fewer than ``config.min_tokens`` calibration tokens, or whose Hessian stays indefinite under
    1e4 times the damping, is rounded to nearest instead and reported so; none is ever dropped.

    Returns ``(codes uint8 [E, n, k], meta float16 [E, n, k // group_size, 2], reports)``.
    """
    weight, hessian = weight.float(), hessian.float()
    factor, damping, solved = solved_factor(hessian, tokens, config)
    widths = torch.tensor(bits, device=weight.device)
    codes, meta = quantize_columns(weight, factor, widths, config, group_size)
    for e in torch.where(~solved)[0].tolist():
        codes[e], meta[e] = round_to_nearest(weight[e], bits[e], group_size, config.clip)
    error = _relative_output_error(weight, dequantize_codes(codes, meta), hessian)
    reports = [
        GptqReport(tokens[e], float(damping[e]) if solved[e] else 0.0, "" if solved[e] else "rtn", float(error[e]))
        for e in range(len(bits))
    ]
    return codes, meta, reports


def solved_factor(hessian: Tensor, tokens: list[int], config: GptqConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Factors ``[E, k, k]`` and damping ``[E]`` of :func:`inverse_factor`, and which matrices GPTQ can take.

    Those with fewer than ``config.min_tokens`` tokens, or whose Hessian stays indefinite, are to be rounded to
    nearest; their factor is the identity, which propagates nothing.
    """
    factor, damping = inverse_factor(hessian, config.damping)
    enough = torch.tensor([t >= config.min_tokens for t in tokens], device=hessian.device)
    solved = enough & torch.isfinite(damping)
    factor[~solved] = torch.eye(hessian.shape[-1], device=hessian.device)
    return factor, damping, solved


def gptq_at_widths(
    weight: Tensor, hessian: Tensor, widths: Sequence[int], tokens: list[int], config: GptqConfig, group_size: int
) -> Iterator[Tensor]:
    """``weight [E, n, k]`` quantized to each width of 1..8 in turn and back, all matrices in one batch a width.

    As :func:`gptq`, but the Hessians ``[E, k, k]`` are factorised once for all widths.
    """
    weight = weight.float()
    factor, _, solved = solved_factor(hessian.float(), tokens, config)
    for width in widths:
        bits = torch.full((len(weight),), width, device=weight.device)
        codes, meta = quantize_columns(weight, factor, bits, config, group_size)
        for e in torch.where(~solved)[0].tolist():
            codes[e], meta[e] = round_to_nearest(weight[e], width, group_size, config.clip)
        yield dequantize_codes(codes, meta)


def _relative_output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    delta = weight - quantized
    lost = ((delta @ hessian) * delta).sum((-1, -2))
    return lost / ((weight @ hessian) * weight).sum((-1, -2)).clamp(min=1e-30)
