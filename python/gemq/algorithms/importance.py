"""Measure how much the task loss rises if one expert is quantized: the coefficients of the paper's Eq. 6.

``c[l, i, b] = sum over tokens, d of (g_d * dz_d)^2`` with ``g = dL/dz`` at the output ``z`` of MoE layer ``l`` and
``dz = w_i * (E_i(x) - E_i^b(x))``, the change of that output when expert ``i`` is quantized to ``b`` bits. Only
tokens routed to an expert change, so only they are evaluated. ``L`` is the token-mean cross-entropy of a window;
coefficients are summed over windows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemq.algorithms.costs import Costs
from gemq.algorithms.layer_costs import LayerCosts
from gemq.models import MoeModel


@dataclass(frozen=True)
class ExpertStatistics:
    """Measurements from which allocations are computed, per MoE layer and expert.

    ``costs`` are Eq. 6; ``frequency`` the share of tokens routed to an expert ``[L, E]``, ``weight`` its mean
    routing weight over all tokens ``[L, E]``, ``error`` the Frobenius norm of ``dz`` summed over windows
    ``[L, E, B]`` (these three are what PMQ uses, and None where costs alone were measured).
    """

    costs: Costs
    frequency: np.ndarray | None = None
    weight: np.ndarray | None = None
    error: np.ndarray | None = None


def statistics_of(moe: MoeModel, rows: list[LayerCosts], candidates: tuple[int, ...]) -> ExpertStatistics:
    """The statistics of a model from its MoE layers' sums, in layer order. Raises :class:`gemq.errors.NumberError`
    for sums that are not finite."""
    for layer, row in zip(moe.moe, rows, strict=True):
        row.check(layer.index)
    matrices = [row.matrices for row in rows if row.matrices is not None]
    tokens = np.array([[row.tokens] for row in rows], dtype=float)
    costs = Costs(
        candidates=candidates,
        routed=np.stack([row.routed for row in rows]),
        shared=np.stack([row.shared for row in rows]) if moe.moe[0].shared is not None else None,
        shared_multiple=moe.shared_multiple,
        layers=tuple(layer.index for layer in moe.moe),
        matrices=np.stack(matrices) if matrices else None,
    )
    return ExpertStatistics(
        costs,
        np.stack([row.count for row in rows]) / tokens,
        np.stack([row.weight for row in rows]) / tokens,
        np.stack([row.error for row in rows]),
    )
