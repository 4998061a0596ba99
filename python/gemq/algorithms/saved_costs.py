"""Load coefficients that an earlier run measured, so that they need not be measured again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gemq.algorithms.costs import Costs
from gemq.algorithms.importance import ExpertStatistics
from gemq.algorithms.method import MethodConfig
from gemq.models import MoeModel


def saved_statistics(costs: Costs, moe: MoeModel, method: MethodConfig) -> ExpertStatistics:
    """Convert ``costs`` to the first statistics of a progression over ``method.candidates``.

    Raises ``ValueError`` if they are of another shape of model, lack a candidate width, or ``method`` is not gemq:
    PMQ needs what the file does not hold, and uniform needs nothing.
    """
    if method.name != "gemq":
        raise ValueError(f"costs are for method gemq, got {method.name!r}")
    expected = (tuple(layer.index for layer in moe.moe), moe.num_experts, moe.shared_multiple)
    found = (costs.layers, costs.routed.shape[1], costs.shared_multiple)
    for name, want, got in zip(("layers", "experts a layer", "shared experts"), expected, found, strict=True):
        if want != got:
            raise ValueError(f"costs are of another model: {name} {got}, the model has {want}")
    missing = sorted(set(method.candidates) - set(costs.candidates))
    if missing:
        raise ValueError(f"costs have no width {missing[0]}: they were measured at {list(costs.candidates)}")
    kept = [costs.candidates.index(b) for b in method.candidates]
    shared = None if costs.shared is None else costs.shared[:, kept]
    matrices = None if costs.matrices is None else costs.matrices[..., kept]
    chosen = replace(
        costs, candidates=method.candidates, routed=costs.routed[..., kept], shared=shared, matrices=matrices
    )
    unknown = np.full(costs.routed.shape[:2], np.nan)
    return ExpertStatistics(chosen, unknown, unknown, np.full(chosen.routed.shape, np.nan))
