"""Eq. 7 as a binary program for python-mip."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gemq.algorithms.reduction import reduce

# The solvers' tolerances are absolute, about 1e-6. With coefficients that reach 1 they call a solution optimal
# that is 1e-3 off when the coefficients spread over ten decades, and with 1e6 they do not.
COEFFICIENT_SCALE = 1e6
# Below this fraction of the largest coefficient an objective is too close to the tolerances: see Program.solve.
RESCALE_BELOW = 1e-2


@dataclass(frozen=True)
class Program:
    """Eq. 7 with one row an expert: the routed ones layer after layer, then one shared expert a layer if chosen.

    A bit of a row counts ``units`` bits of the ``total``. ``kept`` are the widths, counted from the highest down, that
    a routed expert of each layer must take.
    """

    coefficients: np.ndarray  # [rows, B]
    widths: tuple[int, ...]
    shape: tuple[int, int]  # layers, routed experts a layer
    units: np.ndarray  # [rows]
    total: float
    kept: tuple[int, ...]

    @property
    def sizes(self) -> np.ndarray:
        """``[rows, B]`` bits of the total that a row takes at a width."""
        return self.units[:, None] * np.asarray(self.widths, dtype=float)

    def build(self, solver: str, scale: float, keep: np.ndarray) -> tuple[Any, np.ndarray]:
        """Build the python-mip model over the widths ``keep`` ``[rows, B]``. Returns it with the variable of each
        width, -1 where there is none. A row with one width left has no variable: its bits are subtracted from the
        budget."""
        from mip import BINARY, EQUAL, GREATER_OR_EQUAL, LESS_OR_EQUAL, LinExpr, Model

        model = Model(solver_name=solver.upper())
        model.verbose = 0
        free = keep & (keep.sum(axis=1, keepdims=True) > 1)
        settled = keep & ~free
        index = np.full(keep.shape, -1)
        index[free] = np.arange(int(free.sum()))
        for value in (self.coefficients[free] * scale).tolist():
            model.add_var(obj=value, var_type=BINARY)
        variables = list(model.vars)

        def constrain(indices: np.ndarray, factors: Sequence[float], sense: str, right: float) -> None:
            model.add_constr(LinExpr([variables[i] for i in indices.tolist()], factors, -right, sense))

        for row in index[free.any(axis=1)]:
            chosen = row[row >= 0]
            constrain(chosen, [1.0] * len(chosen), EQUAL, 1.0)
        left = float(self.total - self.sizes[settled].sum())
        constrain(index[free], self.sizes[free].tolist(), LESS_OR_EQUAL, left)
        routed = math.prod(self.shape)
        layers, done = index[:routed].reshape(*self.shape, -1), settled[:routed].reshape(*self.shape, -1)
        for (layer, held), back in itertools.product(zip(layers, done, strict=True), self.kept):
            if not held[:, -back].any():
                chosen = layer[layer[:, -back] >= 0, -back]
                constrain(chosen, [1.0] * len(chosen), GREATER_OR_EQUAL, 1.0)
        return model, index

    def check(self, values: np.ndarray) -> np.ndarray:
        """The chosen width index by row, from a solution ``[rows, B]``; ``RuntimeError`` if it breaks a constraint."""
        chosen = values.argmax(axis=1)
        routed = chosen[: math.prod(self.shape)].reshape(self.shape)
        if np.abs(values - values.round()).max() > 1e-4 or (values.round().sum(axis=1) != 1).any():
            raise RuntimeError("the solver returned an allocation without one width for each expert")
        if np.take_along_axis(self.sizes, chosen[:, None], axis=1).sum() > self.total + 1e-6:
            raise RuntimeError(f"the solver returned an allocation over the budget of {self.total:g} bits")
        for back in self.kept:
            if not (routed == len(self.widths) - back).any(axis=1).all():
                raise RuntimeError("the solver returned an allocation that breaks a per-layer constraint")
        return chosen

    def _chosen(self, model: Any, index: np.ndarray, keep: np.ndarray) -> np.ndarray:
        values = (keep & (index < 0)).astype(float)
        solution = np.array([v.x for v in model.vars], dtype=float)
        values[index >= 0] = solution[index[index >= 0]]
        return self.check(values)

    def solve(self, solver: str, max_gap: float, time_limit: float) -> tuple[np.ndarray, float, float]:
        """``(chosen width index by row, objective, lower bound)``.

        Widths that a bound rules out are dropped first (:mod:`gemq.algorithms.reduction`). None of the coefficients is
        negative, so one above the objective of any solution is in no optimum either: where such dwarf the objective
        (an expert that must not have 0 bits), they are dropped, the rest scaled up and re-solved.
        """
        end = time.monotonic() + time_limit
        known = reduce(self.coefficients, self.sizes, self.shape, self.total, self.kept)
        best, objective, bound = known.chosen, known.objective, known.bound
        keep = known.keep & (self.coefficients <= objective)
        while (keep.sum(axis=1) > 1).any():
            free = keep & (keep.sum(axis=1, keepdims=True) > 1)
            settled = float(self.coefficients[keep & ~free].sum())
            largest = float(self.coefficients[free].max())
            scale = COEFFICIENT_SCALE / largest if largest > 0 else 1.0
            model, index = self.build(solver, scale, keep)
            # of the whole objective, of which the solver sees the part that is not settled
            model.max_mip_gap, model.max_mip_gap_abs = max_gap, max(1e-10, max_gap * bound * scale)
            status = model.optimize(max_seconds=max(end - time.monotonic(), 1e-3))
            if model.num_solutions:
                chosen = self._chosen(model, index, keep)
                value = float(np.take_along_axis(self.coefficients, chosen[:, None], axis=1).sum())
                best, objective = (chosen, value) if value < objective else (best, objective)
                bound = max(bound, model.objective_bound / scale + settled)
            elif time.monotonic() < end:
                raise RuntimeError(f"{solver} found no allocation where there is one ({status.name})")
            if objective == 0 or objective >= RESCALE_BELOW * largest or time.monotonic() >= end:
                break
            keep &= self.coefficients <= objective
        return best, objective, min(bound, objective)
