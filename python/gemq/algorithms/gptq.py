"""GPTQ (Frantar et al., ICLR 2023, arXiv 2210.17323) for a batch of same-shape matrices of mixed widths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gemq.algorithms.refinement import damping_of, refine, rescaled
from gemq.format import GROUP_SIZES
from gemq.ops.gptq import gptq_group
from gemq.reference.grid import CLIPS, dequantize_codes, round_to_nearest


@dataclass(frozen=True)
class GptqConfig:
    """Options of GPTQ for all matrices of a model.

    ``group_size`` columns share a grid; ``clip`` is the range search of :func:`gemq.reference.grid.find_grid`;
    ``damping`` is added to the Hessian's diagonal in units of its mean. ``propagate_from`` is the smallest width
    whose rounding error is propagated inside a group: 1 is GPTQ, 4 is what the paper's scripts do. ``refine`` is how
    often codes and grids are improved in turn once GPTQ has chosen them (:mod:`gemq.algorithms.refinement`; 0: GPTQ
    alone). ``compensate`` fits the down projections of routed experts to what their quantized gate and up projections
    give (:mod:`gemq.algorithms.compensation`). ``rescale`` gives every row's outputs the power back that quantizing
    took (:func:`gemq.algorithms.refinement.rescaled`).
    """

    group_size: int = 128
    clip: str = "mse"
    damping: float = 0.01
    propagate_from: int = 1
    min_tokens: int = 1
    refine: int = 2
    compensate: bool = True
    rescale: bool = True

    def __post_init__(self) -> None:
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {GROUP_SIZES}, got {self.group_size}")
        if self.clip not in CLIPS:
            raise ValueError(f"clip must be one of {', '.join(CLIPS)}, got {self.clip!r}")
        if not 0 < self.damping < 1:
            raise ValueError(f"damping must be above 0 and below 1, got {self.damping}")
        if isinstance(self.refine, bool) or not 0 <= self.refine <= 100:
            raise ValueError(f"refine must be a number of rounds in 0..100, got {self.refine!r}")

    @classmethod
    def for_recipe(
        cls, recipe: str, group_size: int = 128, damping: float = 0.01, clip: str | None = None,
        refine: int | None = None, compensate: bool | None = None, rescale: bool | None = None,
    ) -> GptqConfig:
        """``default``: ranges by squared error, errors propagated at every width, refined, compensated and rescaled.
        ``paper``: as the published scripts quantize, range factors 0.9 .. 1.1, no propagation inside a group at 3 bits
        and below, and GPTQ alone. What is given besides wins over the recipe."""
        if recipe not in ("default", "paper"):
            raise ValueError(f"recipe must be default or paper, got {recipe!r}")
        chosen = cls()
        if recipe == "paper":
            chosen = cls(clip="paper", propagate_from=4, refine=0, compensate=False, rescale=False)
        asked: dict[str, Any] = {"clip": clip, "refine": refine, "compensate": compensate, "rescale": rescale}
        given = {name: value for name, value in asked.items() if value is not None}
        return replace(chosen, group_size=group_size, damping=damping, **given)


@dataclass(frozen=True)
class GptqReport:
    """Per matrix: calibration ``tokens``, the ``damping`` that was needed, ``fallback`` ("" or "rtn": too few
    tokens, or no positive definite Hessian), and the relative output error ``tr(D H D') / tr(W H W')``."""

    tokens: int
    damping: float
    fallback: str
    error: float


@dataclass(frozen=True)
class Factor:
    """``H + diag(added) = R R'`` for Hessians ``[E, k, k]``, with R upper triangular, in blocks of ``g`` columns.

    R^-1 is the upper Cholesky factor of the inverse, which GPTQ propagates errors with. Of that the loop needs only
    the diagonal blocks, so nothing larger is inverted. ``root [E, k, k]`` is R on and above the diagonal blocks (below
    them it is not to be read), ``inverse [E, k // g, g, g]`` holds the inverses of those, ``added`` is ``[E, k]``,
    and ``damping [E]`` is NaN where no damping gave a positive definite matrix.
    """

    root: Tensor
    inverse: Tensor
    added: Tensor
    damping: Tensor

    @property
    def group_size(self) -> int:
        """Columns of a block."""
        return self.inverse.shape[-1]

    def before(self, x: Tensor, block: int) -> Tensor:
        """``x R`` in the columns of a block, of the columns before it: ``[E, n, g]`` of ``x [E, n, k]``."""
        start = block * self.group_size
        return x[..., :start] @ self.root[:, :start, start : start + self.group_size]

    def loss(self, x: Tensor) -> Tensor:
        """``tr(x H x')`` of ``x [E, n, k]``, ``[E]``."""
        total = -(x.square().sum(-2) * self.added).sum(-1)
        for start in range(0, x.shape[-1], self.group_size):
            stop = start + self.group_size
            total += (x[..., :stop] @ self.root[:, :stop, start:stop]).square().sum((-1, -2))
        return total.clamp(min=0)


def factorise(hessian: Tensor, damping: float, group_size: int, retries: int = 4) -> Factor:
    """The :class:`Factor` of ``hessian [E, k, k]`` with ``damping * mean(diag H)`` added to the diagonal.

    Matrices that are not positive definite are retried alone with ten times the damping.
    """
    added = damping_of(hessian, damping)
    root, inverse, done = _upper_root(hessian, added, group_size)
    used = torch.where(done, damping, float("nan"))
    for attempt in range(1, retries + 1):
        todo = torch.where(~done)[0]
        if not len(todo):
            break
        level = damping * 10**attempt
        added[todo] = damping_of(hessian[todo], level)
        root[todo], inverse[todo], done[todo] = _upper_root(hessian[todo], added[todo], group_size)
        used[todo[done[todo]]] = level
    return Factor(root, inverse, added, used)


def _upper_root(hessian: Tensor, added: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """``root`` and ``inverse`` of a :class:`Factor`, and which matrices are positive definite ``[E]``."""
    root = hessian.clone()
    root.diagonal(dim1=-2, dim2=-1).add_(added)
    size = root.shape[-1]
    inverse = root.new_empty(len(root), size // group_size, group_size, group_size)
    done = torch.ones(len(root), dtype=torch.bool, device=root.device)
    eye = torch.eye(group_size, device=root.device)
    for start in range(size - group_size, -1, -group_size):
        stop = start + group_size
        columns = root[:, :stop, start:stop]
        if stop < size:
            columns.baddbmm_(root[:, :stop, stop:], root[:, start:stop, stop:].mT, alpha=-1)
        # reversed in both directions a lower triangular factor is an upper one
        lower, info = torch.linalg.cholesky_ex(columns[:, start:].flip(-1, -2))
        block = lower.flip(-1, -2)
        turned = torch.linalg.solve_triangular(block, eye, upper=True)
        done &= (info == 0) & torch.isfinite(turned).all(-1).all(-1)
        inverse[:, start // group_size] = turned
        columns[:, start:] = block
        columns[:, :start] = columns[:, :start] @ turned.mT
    return root, inverse, done


def inverse_factor(hessian: Tensor, damping: float, retries: int = 4) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of ``(H + damping * mean(diag H) * I) ^ -1`` of Hessians ``[E, k, k]``, all of it.

    As :func:`factorise`; returns the factors and the damping used per matrix, NaN where all retries failed.
    """
    factor = factorise(hessian, damping, hessian.shape[-1], retries)
    factor.inverse[torch.isnan(factor.damping)] = float("nan")
    return factor.inverse[:, 0], factor.damping


def quantize_columns(
    weight: Tensor, factor: Factor, bits: Tensor, config: GptqConfig, loss: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The column loop: weights ``[E, n, k]``, widths ``[E]``.

    Returns codes uint8 ``[E, n, k]`` and metadata float16 ``[E, n, k // g, 2]``. To ``loss [E]``, if given, is added
    ``tr(D H D')`` of what was lost, D; the loop knows it where errors are propagated at every column. The grid of a
    group is found on its columns as all earlier groups left them.

    With errors E (lost / diag U, U = R^-1) textbook GPTQ takes ``E U`` off the columns that follow. Kept here is
    F = E U itself, so that ``F R = E``: in the columns of a block, ``F R`` of those before it, times the block's own
    inverse, is what they leave to it. Where errors are propagated, F is D, and the sum of E's squares its damped loss.
    """
    codes, carried = torch.empty_like(weight, dtype=torch.uint8), torch.empty_like(weight)
    metas, size = [], factor.group_size
    for block in range(weight.shape[-1] // size):
        here, inverse = slice(block * size, (block + 1) * size), factor.inverse[:, block]
        values = weight[..., here]
        left: Tensor | float = 0.0
        if block:
            left = factor.before(carried, block)
            values = torch.baddbmm(values, left, inverse)
        codes[..., here], meta, errors = gptq_group(values, inverse, bits, config.clip, config.propagate_from)
        metas.append(meta)
        torch.bmm(errors - left, inverse, out=carried[..., here])
        if loss is not None:
            loss += errors.square().sum((-1, -2))
            loss -= (carried[..., here].square().sum(-2) * factor.added[:, here]).sum(-1)
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
    factor, solved = solved_factor(hessian, tokens, config, group_size)
    widths = torch.tensor(bits, device=weight.device)
    loss, total = torch.zeros(len(bits), device=weight.device), factor.loss(weight)
    codes, meta = quantize_columns(weight, factor, widths, config, loss)
    for e in range(len(bits)):
        one = slice(e, e + 1)
        if not solved[e]:
            codes[e], meta[e] = round_to_nearest(weight[e], bits[e], group_size, config.clip)
            lost = weight[e] - dequantize_codes(codes[e], meta[e])
            loss[e], total[e] = _loss(lost, hessian[e]), _loss(weight[e], hessian[e])
            continue
        # one at a time: the result must not depend on what else is in the batch
        if config.refine:
            whole = hessian[e] + torch.diag(factor.added[e])
            codes[e], meta[e] = refine(weight[e], whole, codes[e], meta[e], bits[e], config.refine)
        if config.rescale:
            meta[e] = rescaled(weight[e], hessian[e], codes[e], meta[e])
        if config.refine or config.rescale or bits[e] < config.propagate_from:
            own = Factor(factor.root[one], factor.inverse[one], factor.added[one], factor.damping[one])
            loss[one] = own.loss(weight[one] - dequantize_codes(codes[one], meta[one]))
    error = loss.clamp(min=0) / total.clamp(min=1e-30)
    reports = [
        GptqReport(
            tokens[e], float(factor.damping[e]) if solved[e] else 0.0, "" if solved[e] else "rtn", float(error[e])
        )
        for e in range(len(bits))
    ]
    return codes, meta, reports


def _loss(x: Tensor, hessian: Tensor) -> Tensor:
    return ((x @ hessian) * x).sum()


def solved_factor(hessian: Tensor, tokens: list[int], config: GptqConfig, group_size: int) -> tuple[Factor, Tensor]:
    """:func:`factorise`, and which matrices GPTQ can take, ``[E]``.

    Those with fewer than ``config.min_tokens`` tokens, or whose Hessian stays indefinite, are to be rounded to
    nearest; their factor is the identity, which propagates nothing.
    """
    factor = factorise(hessian, config.damping, group_size)
    enough = torch.tensor([t >= config.min_tokens for t in tokens], device=hessian.device)
    solved = enough & torch.isfinite(factor.damping)
    if not bool(solved.all()):
        factor.root[~solved] = torch.eye(hessian.shape[-1], device=hessian.device)
        factor.inverse[~solved] = torch.eye(group_size, device=hessian.device)
    return factor, solved


def gptq_at_widths(
    weight: Tensor, hessian: Tensor, widths: Sequence[int], tokens: list[int], config: GptqConfig, group_size: int
) -> Iterator[Tensor]:
    """``weight [E, n, k]`` quantized to each width of 1..8 in turn and back, all matrices in one batch a width.

    As :func:`gptq`, but the Hessians ``[E, k, k]`` are factorised once for all widths.
    """
    weight = weight.float()
    factor, solved = solved_factor(hessian.float(), tokens, config, group_size)
    for width in widths:
        bits = torch.full((len(weight),), width, device=weight.device)
        codes, meta = quantize_columns(weight, factor, bits, config)
        for e in torch.where(~solved)[0].tolist():
            codes[e], meta[e] = round_to_nearest(weight[e], width, group_size, config.clip)
        yield dequantize_codes(codes, meta)
