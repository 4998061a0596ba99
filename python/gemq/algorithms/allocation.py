"""Global bit allocation: one binary program over every expert of the model (GEMQ, arXiv 2605.23078, Eq. 7).

With ``c[i, b]`` the loss increase that Eq. 6 predicts when expert ``i`` is stored at ``b`` bits, and
``x[i, b]`` 1 where it is, the program is::

    minimise    sum c[i, b] * x[i, b]
    subject to  sum_b x[i, b] = 1              each expert has one width
                sum b * x[i, b] <= total       the budget, over all layers at once
                per layer, at least one routed expert at the highest width and one at the second highest

or the same with two rows an expert, its gate and up projections, which count two thirds of a bit each, and its down
projection, which counts one third (not in the paper; ``granularity``).

Solved with python-mip, by HiGHS or CBC.
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gemq.algorithms.costs import Costs
from gemq.algorithms.program import Program
from gemq.format import UNQUANTIZED, by_weight, check_bits

# widths, counted from the highest down, that a routed expert of each layer must take (the paper's Table 17)
PER_LAYER, SOLVERS = {"c2c3": (1, 2), "c2": (1,), "c3": (2,), "none": ()}, ("auto", "highs", "cbc")
# share of the budget that a shared expert counts: the bits it takes, or as in the paper's experiments
ACCOUNTINGS = ("exact", "paper")
# units that have a width of their own: an expert, or its gate and up projections and its down projection
GRANULARITIES = ("auto", "expert", "matrix")
# shares of an expert's weights: gate and up two thirds, down one third
_THIRDS = (2.0, 1.0)
# A real budget times an expert count may miss a whole number of bits by rounding.
BUDGET_SLACK = 1e-6


@dataclass(frozen=True, eq=False)
class Allocation:
    """A width for every expert.

    ``bits`` is the width of each routed expert and ``shared_bits`` that of each layer's merged shared expert, if
    there is one. Where ``down_bits`` is given, those are the widths of the down projections, and ``bits`` are those of
    gate and up. ``budget`` is in bits per expert, as asked for. ``objective`` sums the coefficients of the chosen
    widths of the experts that were variables, and ``gap`` is its proven distance to the optimum,
    ``(objective - the solver's lower bound) / objective``.
    """

    bits: np.ndarray  # [L, E] int64
    shared_bits: np.ndarray | None  # [L] int64
    budget: float
    objective: float
    gap: float
    seconds: float
    solver: str  # "highs", "cbc", or the name of a rule
    shared_multiple: float = 0.0  # S of Costs if the budget covers the shared experts, else 0
    down_bits: np.ndarray | None = None  # [L, E] int64

    @property
    def widths(self) -> tuple[np.ndarray, np.ndarray]:
        """Widths of gate and up, and of down, ``[L, E]`` each."""
        return self.bits, self.bits if self.down_bits is None else self.down_bits

    @property
    def bits_per_expert(self) -> float:
        """Mean bits over the expert-sized units that the budget covers; at most ``budget``."""
        total, units = sum(by_weight(*(w.ravel().tolist() for w in self.widths))) / 3, float(self.bits.size)
        if self.shared_bits is not None:
            total += self.shared_multiple * float(self.shared_bits.sum())
            units += self.shared_multiple * self.shared_bits.size
        return total / units


class _Units(NamedTuple):
    """Units of a layer's budget: how many experts it is averaged over, how much a bit of the shared expert counts, and
    the bits that are set aside before the program is solved."""

    experts: float
    shared: float
    reserved: float

    @classmethod
    def of(cls, costs: Costs, count_shared: bool, accounting: str) -> _Units:
        """Return the units for an ``accounting``. Raises ``ValueError`` for an unknown name."""
        if accounting not in ACCOUNTINGS:
            raise ValueError(f"accounting must be one of {', '.join(ACCOUNTINGS)}, got {accounting!r}")
        num_experts, multiple = float(costs.routed.shape[1]), costs.shared_multiple
        if costs.shared is None or not count_shared:
            return cls(num_experts, 0.0, 0.0)
        if accounting == "exact":
            return cls(num_experts + multiple, multiple, 0.0)
        return cls(num_experts + multiple, 1.0, max(0.0, multiple - 1) * costs.candidates[-1])


def joined(parts: Sequence[Allocation], budget: float, seconds: float) -> Allocation:
    """Join the allocations of single layers into one of all layers, for ``budget`` bits per expert."""
    objective = sum(part.objective for part in parts)
    slack = sum(part.gap * part.objective for part in parts)
    return Allocation(
        bits=np.concatenate([part.bits for part in parts]),
        shared_bits=None,
        budget=float(budget),
        objective=objective,
        gap=slack / objective if objective else 0.0,
        seconds=seconds,
        solver=parts[0].solver,
    )


def total_bits(budget: float, costs: Costs, *, count_shared: bool = True, accounting: str = "exact") -> float:
    """The right-hand side of the budget constraint for ``budget`` bits per expert, rounded down to whole bits unless
    sizes are fractions.

    Without shared experts it is ``budget * R * L`` for R routed experts in each of L layers. With them (and
    ``count_shared``) a layer holds ``R + S`` expert-sized units: it is ``budget * (R + S) * L``, of which the shared
    expert takes S times its width. With the ``"paper"``'s accounting, that of its experiments, it is ``(budget * (R
    + S) - max(0, S - 1) * max(candidates)) * L``: the S shared ones are one variable whose bits are counted once, and
    the other ``S - 1`` units are charged the highest width in advance. That is exact when the shared expert takes the
    highest width, and leaves a part of the budget unspent when it takes a lower one.
    """
    units = _Units.of(costs, count_shared, accounting)
    total = (budget * units.experts - units.reserved) * costs.routed.shape[0] + BUDGET_SLACK
    return math.floor(total) if units.shared.is_integer() else total


def _shared_is_variable(costs: Costs, fixed_shared_bits: int | None) -> bool:
    if fixed_shared_bits is None:
        if costs.shared is None and costs.shared_multiple > 0:
            raise ValueError("fixed_shared_bits is needed: there are shared experts, and no costs to choose by")
        return costs.shared is not None
    if fixed_shared_bits != UNQUANTIZED:
        check_bits(fixed_shared_bits, allow_zero=True, name="fixed_shared_bits")
    if costs.shared_multiple == 0:
        raise ValueError(f"fixed_shared_bits must be None without shared experts, got {fixed_shared_bits}")
    return False


def _minimum_bits(costs: Costs, per_layer: str, shared_units: float) -> float:
    """The fewest bits that one layer can take."""
    num_experts, low = costs.routed.shape[1], costs.candidates[0]
    bits = (num_experts + shared_units) * low
    kept = PER_LAYER[per_layer] if len(costs.candidates) > 1 else ()
    if num_experts < len(kept):
        raise ValueError(f"per_layer='c2c3' needs at least 2 routed experts a layer, got {num_experts}; use 'none'")
    return bits + sum(costs.candidates[-back] - low for back in kept)


def feasible_range(
    costs: Costs, *, per_layer: str = "none", fixed_shared_bits: int | None = None, accounting: str = "exact"
) -> tuple[float, float]:
    """The ``(lowest, highest)`` budget in bits per expert that :func:`solve` accepts with these options.

    The lowest is what the narrowest widths and the per-layer constraints take. The highest is the widest
    candidate; with ``c2c3`` or ``c3`` a little of it stays unspent, since each layer keeps one expert below it.
    """
    if per_layer not in PER_LAYER:
        raise ValueError(f"per_layer must be one of {', '.join(PER_LAYER)}, got {per_layer!r}")
    units = _Units.of(costs, _shared_is_variable(costs, fixed_shared_bits), accounting)
    low = (_minimum_bits(costs, per_layer, units.shared) + units.reserved) / units.experts
    return low, float(costs.candidates[-1])


def _pick_solver(solver: str) -> str:
    """Return the name of a solver that loads: the requested one, or for ``auto`` the first of HiGHS and CBC."""
    names = SOLVERS[1:] if solver == "auto" else (solver,)
    for name in names:
        if getattr(importlib.import_module(f"mip.{name}"), f"has_{name}"):
            return name
    raise RuntimeError(f"python-mip cannot load {' or '.join(names)}; install its package: highsbox or cbcbox")


def solve(
    costs: Costs,
    budget: float,
    *,
    per_layer: str = "none",
    max_gap: float = 1e-4,
    time_limit: float = 60.0,
    solver: str = "auto",
    fixed_shared_bits: int | None = None,
    accounting: str = "exact",
    granularity: str = "auto",
) -> Allocation:
    """The widths with the least predicted loss increase within ``budget`` bits per expert (Eq. 7).

    ``per_layer="c2c3"`` keeps, in each layer, at least one routed expert at the highest and one at the second
    highest candidate (``"c2"``: only the first, ``"c3"``: only the second; ``"none"``, or one candidate: neither).
    The search ends at a relative gap of ``max_gap`` or after ``time_limit`` seconds, then with the gap it reached:
    see ``Allocation.gap``. ``solver`` is ``"highs"``, ``"cbc"`` or ``"auto"``, HiGHS if it loads and CBC otherwise. The
    same input gives the same allocation, ties included, unless the time limit ends the search.

    With ``fixed_shared_bits`` the shared experts have that width, and the budget and the objective cover the
    routed experts only; otherwise ``accounting`` says what they count: see :func:`total_bits`.

    ``granularity="expert"`` gives an expert one width, ``"matrix"`` one to its gate and up projections and one to its
    down projection, by ``costs.matrices``; the constraints of a layer then hold for either. ``"auto"`` is
    ``"matrix"`` where these were measured and no candidate is 0.

    Raises ``ValueError`` for an unknown option or a budget outside :func:`feasible_range`, and ``RuntimeError``
    if no solver loads, the time limit passes without an allocation, or the solver's answer breaks a constraint.
    """
    start = time.monotonic()
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if not (max_gap >= 0 and time_limit > 0):
        raise ValueError(f"max_gap must be >= 0 and time_limit > 0 seconds, got {max_gap} and {time_limit}")
    low, high = feasible_range(
        costs, per_layer=per_layer, fixed_shared_bits=fixed_shared_bits, accounting=accounting
    )
    shared = _shared_is_variable(costs, fixed_shared_bits)
    units = _Units.of(costs, shared, accounting).shared
    per_matrix = is_per_matrix(granularity, costs)
    num_layers, num_experts, _ = costs.routed.shape
    within = 0 <= budget <= high + 1e-9
    total = total_bits(budget, costs, count_shared=shared, accounting=accounting) if within else -1
    if total < num_layers * _minimum_bits(costs, per_layer, units):
        raise ValueError(f"budget must be in {low:.6g}..{high:.6g} bits per expert for these costs, got {budget}")

    program, thirds = _program(costs, per_matrix, units if shared else 0.0, total, per_layer)
    name = _pick_solver(solver)
    chosen, objective, bound = program.solve(name, max_gap, time_limit)
    bits = np.asarray(costs.candidates, dtype=np.int64)[chosen]
    routed = bits[: num_layers * num_experts * len(thirds)].reshape(len(thirds), num_layers, num_experts)
    fixed = None if fixed_shared_bits is None else np.full(num_layers, fixed_shared_bits, dtype=np.int64)
    return Allocation(
        bits=routed[0],
        shared_bits=bits[routed.size :] if shared else fixed,
        budget=float(budget),
        objective=objective,
        gap=max(0.0, objective - bound) / objective if objective else 0.0,
        seconds=time.monotonic() - start,
        solver=name,
        shared_multiple=costs.shared_multiple if shared else 0.0,
        down_bits=routed[1] if per_matrix else None,
    )


def wants_matrices(granularity: str, candidates: Sequence[int]) -> bool:
    """Return True if gate and up together, and down, get widths of their own. ``auto`` does so unless a candidate is 0
    bits: an expert of 0 bits has no separate widths.

    Raises ``ValueError`` for an unknown name, and for ``matrix`` with a candidate of 0.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    possible = min(candidates, default=0) > 0
    if granularity == "matrix" and not possible:
        raise ValueError(f"granularity 'matrix' needs candidates above 0 bits, got {candidates}")
    return granularity != "expert" and possible


def is_per_matrix(granularity: str, costs: Costs) -> bool:
    """Return :func:`wants_matrices` for the candidates of ``costs``; False if the costs of single matrices were not
    measured.

    Raises ``ValueError`` as :func:`wants_matrices` does, and for ``matrix`` if they were not measured.
    """
    wanted = wants_matrices(granularity, list(costs.candidates))
    if granularity == "matrix" and costs.matrices is None:
        raise ValueError("granularity 'matrix' needs costs of single matrices, which these are not: measure again")
    return wanted and costs.matrices is not None


def _program(
    costs: Costs, per_matrix: bool, shared_units: float, total: float, per_layer: str
) -> tuple[Program, tuple[float, ...]]:
    """Eq. 7 of these costs, and what a bit of each of an expert's rows counts; ``total`` bits are for all experts.

    Per matrix the constraints of a layer hold for either matrix, and all is counted in thirds of a bit.
    """
    num_layers, num_experts, num_widths = costs.routed.shape
    thirds: tuple[float, ...]
    if per_matrix:
        assert costs.matrices is not None
        thirds, whole = _THIRDS, 3.0
        parts = [costs.matrices[:, :, which].reshape(-1, num_widths) for which in range(2)]
    else:
        thirds, whole = (1.0,), 1.0
        parts = [costs.routed.reshape(-1, num_widths)]
    units = [np.full(len(part), third) for part, third in zip(parts, thirds, strict=True)]
    if shared_units:
        assert costs.shared is not None
        parts.append(costs.shared)
        units.append(np.full(num_layers, shared_units * whole))
    program = Program(
        coefficients=np.concatenate(parts),
        widths=costs.candidates,
        shape=(num_layers * len(thirds), num_experts),
        units=np.concatenate(units),
        total=total * whole,
        kept=PER_LAYER[per_layer] if num_widths > 1 else (),
    )
    return program, thirds


def pareto(costs: Costs, budgets: Sequence[float], **options: Any) -> list[Allocation]:
    """:func:`solve` for each of ``budgets`` with the same ``options``: the curve of objective against bits."""
    return [solve(costs, budget, **options) for budget in budgets]


def curve(costs: Costs, points: int = 20, **options: Any) -> list[Allocation]:
    """:func:`pareto` at ``points`` budgets, evenly spaced over :func:`feasible_range`, both ends among them.

    Raises ``ValueError`` for fewer than 2 points, and what :func:`solve` raises.
    """
    if points < 2:
        raise ValueError(f"points must be at least 2, got {points}")
    within = {k: v for k, v in options.items() if k in ("per_layer", "fixed_shared_bits", "accounting")}
    low, high = feasible_range(costs, **within)
    return pareto(costs, np.linspace(low, high, points).tolist(), **options)
