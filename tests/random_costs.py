"""Random coefficients."""

from __future__ import annotations

import numpy as np

from gemq.algorithms.costs import Costs


def make_costs(seed, layers=2, experts=3, candidates=(1, 2, 3), multiple=0.0, spread=1.0, decades=0.0, matrices=False):
    """Random coefficients that mostly fall with the width, over ``decades`` powers of ten; those of single ``matrices``
    sum up to less or more than an expert's."""
    rng = np.random.default_rng(seed)
    fall = np.exp(-np.asarray(candidates, dtype=float))
    size = np.exp(rng.normal(0, spread, (layers, experts, 1))) * 10 ** rng.uniform(-decades, 0, (layers, experts, 1))
    routed = size * fall * rng.uniform(0.5, 2.0, (layers, experts, len(candidates)))
    shared = 5 * fall * rng.uniform(0.5, 2.0, (layers, len(candidates))) if multiple else None
    parts = rng.uniform(0.2, 0.9, (layers, experts, 2, len(candidates))) * routed[:, :, None] if matrices else None
    return Costs(candidates, routed, tuple(range(1, layers + 1)), shared, multiple, parts)
