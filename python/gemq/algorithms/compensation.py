"""Fit down projections to the outputs of the quantized gate and up projections.

An expert computes ``W h`` with ``h = SiLU(gate(x)) * up(x)``. Once gate and up are quantized it is given ``g`` instead
of ``h``, and the ``V`` that minimises the sum over its tokens of ``|W h - V g|^2`` is no longer ``W``. With ``H`` the
sum of ``g g'``, ``C`` the sum of ``h g'`` and a damping ``d`` that pulls ``V`` to ``W``::

    V = W (C + d) (H + d)^-1

which GPTQ then quantizes on ``H``. The closed form is that of asymmetric calibration (GPTAQ, arXiv 2504.02692) within
one expert: ``h`` and ``g`` are of the same inputs, so that no second model runs beside the quantized one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gemq.activation import SILU, Inner
from gemq.algorithms.layerwise import Hessian, expert_hidden
from gemq.algorithms.refinement import damped


class InnerStatistics:
    """``H`` and ``C`` of one expert, summed over its tokens."""

    def __init__(self, size: int, device: torch.device):
        self.hessian = Hessian(size, device)
        self.cross = torch.zeros(size, size, device=device)

    def add(
        self, gate_up: Tensor, quantized: Tensor, x: Tensor, scale: Tensor | float = 1.0, inner: Inner = SILU
    ) -> None:
        """Add tokens ``x [t, H]``, each counted ``scale ** 2`` times; ``gate_up`` and ``quantized`` are ``[2I, H]``."""
        if len(x):
            given = expert_hidden(quantized, x, inner) * scale
            self.hessian.add(given)
            self.cross.addmm_((expert_hidden(gate_up, x, inner) * scale).float().T, given.float())

    def fitted(self, weight: Tensor, damping: float) -> Tensor:
        """``V`` of the module's text for ``weight [n, I]``, in its dtype; ``weight`` itself where there is no token, or
        ``H`` cannot be factorised."""
        if not self.hessian.tokens:
            return weight
        value = self.hessian.value
        padded = damped(value, damping)
        lower, info = torch.linalg.cholesky_ex(padded)
        if int(info):
            return weight
        right = weight.float() @ (self.cross + (padded - value))
        found = torch.cholesky_solve(right.T, lower).T
        return found.to(weight.dtype) if bool(torch.isfinite(found).all()) else weight


def fit_down(
    down: Tensor, bits: list[int], original: Tensor, quantized: Tensor,
    rows: Iterable[list[tuple[Tensor, Tensor | float]]], damping: float, inner: Sequence[Inner] | None = None,
) -> tuple[Tensor, list[Hessian]]:
    """Fit the projections ``down [G, H, I]`` of some experts to their quantized gate and up projections.

    ``original`` and ``quantized`` are those projections ``[G, 2I, H]``; ``rows`` gives per batch, and for each of the
    experts, its inputs and their scales; ``inner`` are their activations (SiLU). An expert of 0 ``bits`` stays as it
    is. Returns the fitted projections, and the Hessians to quantize on.
    """
    found, acts = [InnerStatistics(down.shape[-1], down.device) for _ in down], inner or [SILU] * len(down)
    for batch in rows:
        for one, before, after, act, (x, scale) in zip(found, original, quantized, acts, batch, strict=True):
            one.add(before, after, x, scale, act)
    fitted = [one.fitted(w, damping) if width else w for one, w, width in zip(found, down, bits, strict=True)]
    return torch.stack(fitted), [one.hessian for one in found]
