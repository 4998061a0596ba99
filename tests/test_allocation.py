"""Bit allocation against enumeration and an independent bound."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
from allocation_by_hand import (
    GAP,
    SOLVERS,
    best_by_bits,
    check_constraints,
    feasible_range,
    selected,
    solve,
    total_by_hand,
)
from random_costs import make_costs

from gemq.algorithms.allocation import curve, pareto, total_bits
from gemq.algorithms.costs import Costs
from gemq.algorithms.program import Program
from gemq.algorithms.reduction import reduce

# shared units in a layer
MODES = {"routed": 0.0, "shared1": 1.0, "shared2": 2.0, "shared2.5": 2.5, "paper2": 2.0, "paper2.5": 2.5, "fixed": 2.0}
SHAPES = [(1, 2, (1, 2)), (2, 3, (1, 2, 3)), (3, 3, (0, 1, 2, 4)), (3, 2, (2, 4, 8)), (1, 3, (0, 8)), (2, 2, (0, 4, 8))]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("per_layer", ["c2c3", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"L{s[0]}-E{s[1]}-b{''.join(map(str, s[2]))}")
def test_equals_enumeration(shape, per_layer, mode, solver):
    multiple = MODES[mode]
    shared, options = mode not in ("routed", "fixed"), {"per_layer": per_layer}
    accounting = options["accounting"] = "paper" if mode.startswith("paper") else "exact"
    if mode == "fixed":
        options["fixed_shared_bits"] = 4
    for seed in range(2):
        costs = make_costs(seed, *shape, multiple=multiple)
        least = best_by_bits(costs, per_layer, shared, multiple if accounting == "exact" else 1.0)
        low, high = feasible_range(costs, **options)
        assert total_by_hand(costs, low, shared, accounting) == pytest.approx(min(least))
        for budget in (low, low + 0.3 * (high - low), low + 0.7 * (high - low), high):
            result = solve(costs, budget, solver=solver, max_gap=GAP, **options)
            total = total_by_hand(costs, budget, shared, accounting) + 1e-6
            optimum = min(cost for bits, cost in least.items() if bits <= total)
            check_constraints(costs, result, per_layer)
            assert result.objective == pytest.approx(selected(costs, result))
            assert optimum * (1 - 1e-9) <= result.objective <= optimum * (1 + GAP)
            assert 0 <= result.gap <= GAP
            assert result.objective * (1 - result.gap) <= optimum * (1 + 1e-9)
            assert (result.solver, result.budget) == (solver, budget)
            assert (result.shared_bits is None) == (multiple == 0)
            assert mode != "fixed" or result.shared_bits.tolist() == [4] * shape[0]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("decades", [3, 9, 15])
def test_coefficients_over_many_decades(decades, solver):
    for seed in range(8):
        costs = make_costs(seed, 3, 3, (0, 1, 2, 3), decades=decades)
        for factor in (1e-12, 1.0, 1e3):
            scaled = Costs(costs.candidates, costs.routed * factor, costs.layers)
            least = best_by_bits(scaled, "c2c3", False)
            optimum = min(cost for bits, cost in least.items() if bits <= 18)
            assert solve(scaled, 2.0, solver=solver).objective == pytest.approx(optimum, rel=GAP)


@pytest.mark.parametrize("solver", SOLVERS)
def test_objective_far_below_the_largest_coefficient(solver):
    costs = make_costs(0, 3, 3, (0, 2, 3))
    routed = costs.routed.copy()
    routed[..., 0], routed[..., 1:] = 1e6, routed[..., 1:] * 1e-9
    routed[0, 0, 1:] = 2 * routed[..., 1].sum()  # most of the objective, and not to be dropped for it
    costs = Costs(costs.candidates, routed, costs.layers)
    optimum = min(cost for bits, cost in best_by_bits(costs, "c2c3", False).items() if bits <= 23)
    result = solve(costs, 23 / 9, solver=solver)
    assert result.objective == pytest.approx(optimum, rel=GAP)
    assert result.gap <= GAP


def lagrangian_bound(costs, total):
    """A lower bound on Eq. 7 with c2c3: for any price of a bit, each layer's least priced cost less the budget's."""
    widths = np.asarray(costs.candidates, dtype=float)

    def dual(price):
        priced = costs.routed + price * widths
        least = priced.min(axis=-1)
        value = least.sum() - price * total
        for top, second in zip(priced[..., -1] - least, priced[..., -2] - least, strict=True):
            first, other = np.argsort(top)[:2], np.argsort(second)[:2]
            value += min(top[i] + second[j] for i in first for j in other if i != j)
        return value

    prices = np.geomspace(costs.routed.max() * 1e-12, costs.routed.max(), 100)
    best = int(np.argmax([dual(p) for p in prices]))
    low, high = prices[max(best - 1, 0)], prices[min(best + 1, 99)]
    for _ in range(30):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (a, high) if dual(a) < dual(b) else (low, b)
    return dual((low + high) / 2)


@pytest.mark.parametrize("kept", [(), (1,), (2,), (1, 2)])
@pytest.mark.parametrize("candidates", [(1, 2, 3), (0, 2, 8), (0, 4)])
@pytest.mark.parametrize("decades", [0, 9])
def test_bounds_hold_and_the_optimum_is_left(kept, candidates, decades):
    per_layer = {(): "none", (1,): "c2", (2,): "c3", (1, 2): "c2c3"}[kept]
    for seed in range(6):
        costs = make_costs(seed, 2, 3, candidates, decades=decades)
        routed = np.array(costs.routed)
        if seed == 5:
            routed = routed.round(1)  # ties, and experts that cost nothing
        costs = Costs(candidates, routed, costs.layers)
        rows = routed.reshape(6, -1)
        least = {}
        for choice in itertools.product(range(len(candidates)), repeat=6):
            at = np.array(choice)
            if all((at.reshape(2, 3) == len(candidates) - back).any(axis=1).all() for back in kept):
                total = int(np.asarray(candidates)[at].sum())
                least.setdefault(total, []).append((rows[np.arange(6), at].sum(), choice))
        low, high = (round(6 * b) for b in feasible_range(costs, per_layer=per_layer))
        for total in {low, (2 * low + high) // 3, (low + 2 * high) // 3, high}:
            optimum, choice = min(best for bits, found in least.items() if bits <= total for best in found)
            sizes = np.broadcast_to(np.asarray(candidates, dtype=float), rows.shape)
            found = reduce(rows, sizes, (2, 3), total, kept)
            assert found.bound <= optimum * (1 + 1e-9) and optimum <= found.objective * (1 + 1e-9)
            Program(rows, candidates, (2, 3), np.ones(6), total, kept).check(np.eye(len(candidates))[found.chosen])
            assert rows[np.arange(6), found.chosen].sum() == pytest.approx(found.objective)
            if optimum < found.objective * (1 - 1e-9):
                assert found.keep[np.arange(6), list(choice)].all()


def test_nearly_all_widths_of_a_large_model_are_ruled_out():
    costs = make_costs(0, 48, 128, (1, 2, 3), spread=1.5)
    for budget in (1.25, 2.0, 2.75):
        rows = costs.routed.reshape(-1, 3)
        sizes = np.broadcast_to(np.array([1.0, 2.0, 3.0]), rows.shape)
        found = reduce(rows, sizes, (48, 128), round(budget * 48 * 128), (1, 2))
        assert found.objective * (1 - 1e-2) < found.bound <= found.objective
        assert found.keep.sum() - len(found.keep) < 0.1 * found.keep.size


@pytest.mark.parametrize("spread", [1.0, 3.0, 6.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_48_layers_of_128_experts(solver, spread):
    costs = make_costs(0, 48, 128, (1, 2, 3), spread=spread)
    start = time.process_time()  # of the solver alone, whatever else the machine does
    result = solve(costs, 2.0, solver=solver)
    seconds = time.process_time() - start
    print(f"{solver}, spread {spread}: {seconds:.2f} s, gap {result.gap:.1e}")
    assert seconds < 30
    assert result.gap <= GAP
    check_constraints(costs, result, "c2c3")
    assert result.objective * (1 - GAP) <= lagrangian_bound(costs, 2 * 48 * 128)


def test_solvers_agree_with_shared_experts():
    costs = make_costs(7, 8, 16, (1, 2, 3), multiple=2.0)
    values = [solve(costs, 2.0, solver=s, max_gap=0.0).objective for s in SOLVERS]
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_auto_falls_back_to_cbc(monkeypatch):
    import mip.cbc
    import mip.highs

    costs = make_costs(0)
    assert solve(costs, 2.0).solver == "highs"
    monkeypatch.setattr(mip.highs, "has_highs", False)
    assert solve(costs, 2.0).solver == "cbc"
    with pytest.raises(RuntimeError, match="cannot load highs"):
        solve(costs, 2.0, solver="highs")
    monkeypatch.setattr(mip.cbc, "has_cbc", False)
    with pytest.raises(RuntimeError, match="highs or cbc"):
        solve(costs, 2.0)


@pytest.mark.parametrize("solver", SOLVERS)
def test_ties_give_the_same_allocation_each_time(solver):
    routed = np.tile([3.0, 2.0, 1.0], (3, 8, 1))
    results = [solve(Costs((1, 2, 3), routed, (0, 1, 2)), 2.0, solver=solver) for _ in range(3)]
    assert results[0].objective == pytest.approx(48.0)
    for result in results[1:]:
        np.testing.assert_array_equal(result.bits, results[0].bits)


@pytest.mark.parametrize("solver", SOLVERS)
def test_idle_experts(solver):
    costs = Costs((0, 4, 8), np.zeros((2, 4, 3)), (0, 1))
    result = solve(costs, 4.0, solver=solver)
    assert (result.objective, result.gap) == (0.0, 0.0)
    check_constraints(costs, result, "c2c3")
    routed = make_costs(0, 2, 4).routed.copy()
    routed[:, 1:] = 0.0  # one busy expert a layer takes the highest width
    result = solve(Costs((1, 2, 3), routed, (0, 1)), 2.0, solver=solver)
    assert (result.bits[:, 0] == routed[:, 0].argmin(axis=1) + 1).all()


def test_one_candidate_is_that_width():
    result = solve(Costs((4,), np.ones((2, 1, 1)), (0, 1)), 4.0)
    assert result.bits.tolist() == [[4], [4]]


def test_nothing_is_printed(capfd):
    for solver in SOLVERS:
        solve(make_costs(0), 2.0, solver=solver)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("budget", [1.6, 0.0, -1.0, 3.5, math.nan, math.inf, -math.inf])
def test_infeasible_budget_names_the_range(budget):
    costs = make_costs(0)  # 3 experts of widths 1, 2, 3: at least (3 + 2 + 1) / 3
    assert feasible_range(costs) == (2.0, 3.0)
    with pytest.raises(ValueError, match=r"budget must be in 2\.\.3 bits per expert.*got"):
        solve(costs, budget)
    assert solve(costs, 2.0).bits_per_expert == 2.0


def test_budget_accounting():
    # DeepSeek-V2-Lite: 26 MoE layers of 64 routed experts, 2 shared; the paper charges the 66th unit in advance.
    costs = Costs((1, 2, 3), np.ones((26, 64, 3)), tuple(range(1, 27)), np.ones((26, 3)), 2.0)
    assert total_bits(2.0, costs) == 26 * 2 * 66
    assert total_bits(2.0, costs, accounting="paper") == 26 * (2 * 66 - 3)
    assert total_bits(2.0, costs, count_shared=False) == 26 * 64 * 2
    assert total_bits(2.05, make_costs(0, 2, 3)) == 12
    assert total_bits(0.1 + 0.2, make_costs(0, 10, 1)) == 3
    full = solve(make_costs(0, 2, 4, multiple=2.0), 3.0, per_layer="none")
    assert full.bits_per_expert == 3.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per_layer": "c4"}, "per_layer must be one of c2c3, c2, c3, none"),
        ({"solver": "gurobi"}, "solver must be one of auto, highs, cbc"),
        ({"max_gap": math.nan}, "max_gap must be >= 0"),
        ({"time_limit": 0.0}, "time_limit > 0"),
        ({"fixed_shared_bits": 4}, "without shared experts"),
        ({"accounting": "once"}, "accounting must be one of exact, paper, got 'once'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        solve(make_costs(0), 2.0, **options)


def test_shared_experts_without_costs_need_a_width():
    routed = np.ones((2, 3, 3))
    costs = Costs((1, 2, 3), routed, (0, 1), None, 2.0)
    with pytest.raises(ValueError, match="fixed_shared_bits is needed"):
        solve(costs, 2.0)
    with pytest.raises(ValueError, match="fixed_shared_bits must be an integer"):
        solve(costs, 2.0, fixed_shared_bits=9)
    assert solve(costs, 2.0, fixed_shared_bits=8).shared_bits.tolist() == [8, 8]


def test_the_exact_accounting_spends_the_budget():
    # shared experts that hardly matter: they get one bit, and four units of two bits are left to the others
    costs = make_costs(3, 4, 16, multiple=4.0)
    costs = Costs(costs.candidates, costs.routed, costs.layers, costs.shared * 1e-6, 4.0)
    found = {kind: solve(costs, 2.0, per_layer="none", accounting=kind) for kind in ("exact", "paper")}
    assert all((one.shared_bits == 1).all() for one in found.values())
    assert found["exact"].bits_per_expert == 2.0 and found["paper"].bits_per_expert == pytest.approx(2 - 6 / 20)
    assert found["exact"].objective < found["paper"].objective


def test_one_expert_cannot_meet_the_per_layer_constraint():
    costs = make_costs(0, 2, 1)
    with pytest.raises(ValueError, match="at least 2 routed experts"):
        feasible_range(costs)
    assert solve(costs, 2.0, per_layer="none").bits_per_expert <= 2.0


@pytest.mark.parametrize("solver", SOLVERS)
def test_time_limit_is_kept(solver):
    costs = make_costs(0, 24, 64, (1, 2, 3, 4))
    start = time.monotonic()
    try:
        result = solve(costs, 2.0, time_limit=0.01, max_gap=0.0, solver=solver)
        check_constraints(costs, result, "c2c3")
    except RuntimeError as error:
        assert "time_limit" in str(error)
    assert time.monotonic() - start < 10


def test_a_wrong_answer_of_the_solver_is_refused():
    program = Program(np.ones((4, 2)), (1, 2), (2, 2), np.ones(4), total=6, kept=(1, 2))
    good = np.array([[1, 0], [0, 1], [0, 1], [1, 0]], dtype=float)
    assert program.check(good).tolist() == [0, 1, 1, 0]
    for rows, message in [
        ([[1, 0], [0, 1], [0, 1], [0, 1]], "over the budget"),
        ([[1, 0], [1, 0], [0, 1], [1, 0]], "per-layer"),
        ([[1, 0], [0, 1], [0, 1], [1, 1]], "one width"),
        ([[1, 0], [0, 1], [0, 1], [0.7, 0.3]], "one width"),
        ([[1, 0], [0, 1], [0, 1], [0, math.nan]], "one width"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            program.check(np.array(rows, dtype=float))


def test_pareto_falls_with_the_budget():
    curve = pareto(make_costs(3, 4, 8), [1.5, 2.0, 2.5, 3.0], max_gap=0.0)
    assert [a.budget for a in curve] == [1.5, 2.0, 2.5, 3.0]
    assert all(a.objective >= b.objective for a, b in itertools.pairwise(curve))


def test_a_curve_spans_the_feasible_range():
    costs = make_costs(3, 4, 8, multiple=2.0)
    found = curve(costs, 6, fixed_shared_bits=4, per_layer="c2c3")
    low, high = feasible_range(costs, fixed_shared_bits=4)
    assert [a.budget for a in found] == pytest.approx(np.linspace(low, high, 6).tolist())
    assert all(a.objective >= b.objective for a, b in itertools.pairwise(found))
    assert all(a.gap <= GAP for a in found)
    with pytest.raises(ValueError, match="points must be at least 2, got 1"):
        curve(costs, 1)


def test_a_curve_of_a_large_model_takes_seconds():
    start = time.monotonic()
    found = curve(make_costs(1, 24, 64, (1, 2, 3), spread=1.5), 12)
    assert time.monotonic() - start < 60
    assert all(a.gap <= GAP and a.objective >= b.objective for a, b in itertools.pairwise(found))
