"""Widths of their own for gate and up, and for down: the program against enumeration, and the way to a checkpoint."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from packed_models import logits, quantized
from random_costs import make_costs

import gemq
from gemq.algorithms.allocation import Allocation, feasible_range, solve
from gemq.algorithms.costs import Costs
from gemq.algorithms.given_allocation import GivenAllocation
from gemq.algorithms.method import MethodConfig
from gemq.checkpoint import load_packed_config, save_packed
from gemq.checkpoint_summary import summarize
from gemq.cli.run import run
from gemq.engine.fingerprint import of_costs
from gemq.packed_config import PackedConfig
from gemq.widths import Widths

KEPT = {"none": (), "c2": (3,), "c3": (2,), "c2c3": (2, 3)}


def enumerated(costs: Costs, budget: float, per_layer: str) -> float:
    """The least cost of all widths of gate and up, of down, and of shared experts: layer by layer, then together."""
    layers, experts, _ = costs.routed.shape
    units = 3 * costs.shared_multiple if costs.shared is not None else 0.0
    totals = {0.0: 0.0}
    for layer in range(layers):
        one = {}
        for chosen in itertools.product((1, 2, 3), repeat=2 * experts):
            parts = chosen[:experts], chosen[experts:]
            if any(width not in part for width in KEPT[per_layer] for part in parts):
                continue
            cost = sum(costs.matrices[layer, e, p, b - 1] for p, part in enumerate(parts) for e, b in enumerate(part))
            size = 2 * sum(parts[0]) + sum(parts[1])
            for shared in (1, 2, 3) if units else (0,):
                whole = cost + (costs.shared[layer, shared - 1] if units else 0.0)
                at = size + units * shared
                one[at] = min(whole, one.get(at, math.inf))
        joined = {}
        for (s0, c0), (s1, c1) in itertools.product(totals.items(), one.items()):
            joined[s0 + s1] = min(c0 + c1, joined.get(s0 + s1, math.inf))
        totals = joined
    limit = 3 * budget * layers * (experts + units / 3) + 1e-6
    return min(cost for size, cost in totals.items() if size <= limit)


@pytest.mark.parametrize("multiple", [0.0, 2.0])
@pytest.mark.parametrize("per_layer", KEPT)
def test_the_program_finds_the_best_of_all(per_layer, multiple):
    for seed in range(3):
        costs = make_costs(seed, 2, 3, multiple=multiple, spread=2.0, matrices=True)
        low, high = feasible_range(costs, per_layer=per_layer)
        for budget in (low, (low + high) / 2, high):
            # whole bits of the model, as the budget's right-hand side is
            budget = math.floor(budget * 2 * (3 + multiple) + 1e-6) / (2 * (3 + multiple))
            found = solve(costs, max(budget, low), per_layer=per_layer, max_gap=0.0)
            assert found.objective == pytest.approx(enumerated(costs, max(budget, low), per_layer), rel=1e-9)
            check(costs, found, per_layer)


def check(costs: Costs, found: Allocation, per_layer: str) -> None:
    assert found.bits.shape == found.down_bits.shape == costs.routed.shape[:2]
    for part in (found.bits, found.down_bits):
        assert set(part.flat) <= set(costs.candidates)
        assert all(set(KEPT[per_layer]) <= set(row) for row in part.tolist())
    total = 2 * found.bits.sum() + found.down_bits.sum()
    units = 3 * found.bits.size
    if found.shared_bits is not None:
        total = total + 3 * costs.shared_multiple * found.shared_bits.sum()
        units += 3 * costs.shared_multiple * len(found.shared_bits)
    assert found.bits_per_expert == pytest.approx(total / units) and found.bits_per_expert <= found.budget + 1e-9


def test_it_is_never_worse_where_costs_add_up():
    """Every allocation of experts is one of matrices, of the same size and then of the same cost."""
    for seed in range(5):
        costs = make_costs(seed, 3, 6, spread=1.5, decades=3, matrices=True)
        costs = replace(costs, routed=costs.matrices.sum(2))
        for budget in (1.5, 2.0, 2.5):
            whole, apart = (solve(costs, budget, per_layer="none", max_gap=0.0, granularity=g)
                            for g in ("expert", "matrix"))
            assert apart.objective <= whole.objective * (1 + 1e-9)
            assert whole.down_bits is None and whole.bits_per_expert <= budget


def test_auto_takes_what_the_costs_allow():
    costs = make_costs(0, matrices=True)
    assert solve(costs, 2.0).down_bits is not None
    assert solve(costs, 2.0, granularity="expert").down_bits is None
    assert solve(replace(costs, matrices=None), 2.0).down_bits is None
    # an expert of no bits is one decision
    with_zero = make_costs(0, candidates=(0, 1, 2), matrices=True)
    assert solve(with_zero, 1.7).down_bits is None
    with pytest.raises(ValueError, match=r"granularity 'matrix' needs candidates above 0 bits, got \[0, 1, 2\]"):
        solve(with_zero, 1.7, granularity="matrix")
    with pytest.raises(ValueError, match="granularity 'matrix' needs costs of single matrices"):
        solve(replace(costs, matrices=None), 2.0, granularity="matrix")
    with pytest.raises(ValueError, match="granularity must be one of auto, expert, matrix, got 'row'"):
        solve(costs, 2.0, granularity="row")


def test_the_method_says_what_it_measures():
    assert MethodConfig().per_matrix and not MethodConfig(granularity="expert").per_matrix
    assert not MethodConfig(method="pmq").per_matrix and not MethodConfig(candidates=(0, 1, 2)).per_matrix
    with pytest.raises(ValueError, match=r"granularity 'matrix' needs candidates above 0 bits, got \(0, 1\)"):
        MethodConfig(granularity="matrix", candidates=(0, 1))
    with pytest.raises(ValueError, match="granularity 'matrix' is for method gemq, got 'pmq', which is of experts"):
        MethodConfig(granularity="matrix", method="pmq")
    with pytest.raises(ValueError, match="granularity must be one of auto, expert, matrix, got 'both'"):
        MethodConfig(granularity="both")


def test_costs_of_matrices_are_part_of_what_a_run_starts_from():
    costs = make_costs(0, matrices=True)
    other = replace(costs, matrices=costs.matrices * 2)
    assert len({of_costs(costs), of_costs(other), of_costs(replace(costs, matrices=None))}) == 3


@pytest.fixture(scope="module", params=["mixtral", "deepseek_v2"])
def made(request):
    shared = {"mixtral": None, "deepseek_v2": (3, 2)}[request.param]
    given = GivenAllocation("here", ((2, 1, 3, 2), (1, 2, 4, 1)), shared=shared, down=((3, 2, 1, 2), (2, 4, 1, 1)))
    return quantized(request.param, budget=3.0, tune=False, given=given)


def test_a_checkpoint_has_both_and_runs_the_same(made, tmp_path):
    config = made.config
    assert config.widths.down and config.widths.down != config.widths.experts
    save_packed(made.packed, config, tmp_path / "model", dtype=torch.float32)
    stored = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert stored["version"] == 3 and stored["down_bits"] == {str(k): v for k, v in config.widths.down.items()}
    loaded = gemq.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(made.packed))
    # against the dequantized weights, which transformers runs
    expected = logits(made.dense)
    assert float((logits(loaded) - expected).norm() / expected.norm()) < 0.02
    for layer, experts in ((k, loaded.get_submodule(f"model.layers.{k}.mlp.experts")) for k in config.widths.experts):
        assert tuple(experts.bits.values()) == config.widths.of_experts(layer)
        assert "down_bits=" in repr(experts)
    gate_up, down = (np.array(list(rows.values())) for rows in (config.widths.experts, config.widths.down))
    mean = float((2 * gate_up.sum() + down.sum()) / (3 * gate_up.size))
    assert summarize(tmp_path / "model").expert_bits == pytest.approx(mean)
    assert PackedConfig.from_dict(stored).to_dict() == stored == config.to_dict()


def test_uniform_checkpoints_stay_version_1():
    assert PackedConfig(Widths({0: [2, 3]})).to_dict()["version"] == 1
    assert PackedConfig(Widths({0: [2, 3]}, linears={"x": 8})).to_dict()["version"] == 2
    assert PackedConfig(Widths({0: [2, 3]}, down={0: [3, 3]})).to_dict()["version"] == 3


def test_from_costs_to_an_allocation_to_a_checkpoint(tmp_path, model_folder, text_file, capsys):
    """``allocate --json`` and ``quantize --allocation`` are the same widths as quantizing at once."""
    replace(make_costs(1, 2, 4, spread=2.0, matrices=True), layers=(0, 1)).save(tmp_path / "costs.json")
    options = ["--calibration", str(text_file), "--samples", "6", "--length", "24", "--no-tune-routers", "-q"]
    once = tmp_path / "once"
    command = ["quantize", str(model_folder), "--bits", "1.75", "--constraints", "none", *options,
               "--costs", str(tmp_path / "costs.json")]
    assert run([*command, "-o", str(once)]) == 0
    capsys.readouterr()
    solve_again = ["allocate", str(once), "--bits", "1.75", "--constraints", "none"]
    assert run([*solve_again, "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)
    config = load_packed_config(once)
    assert config.widths.down and config.widths.down != config.widths.experts
    assert {int(k): v for k, v in record["expert_bits"].items()} == config.widths.experts
    assert {int(k): v for k, v in record["down_bits"].items()} == config.widths.down
    (tmp_path / "widths.json").write_text(json.dumps([record]))
    for name, source in (("file", tmp_path / "widths.json"), ("checkpoint", once)):
        given = ["quantize", str(model_folder), "-o", str(tmp_path / name), "--allocation", str(source), *options]
        assert run(given) == 0
        again = load_packed_config(tmp_path / name)
        assert (again.widths.experts, again.widths.down) == (config.widths.experts, config.widths.down)
    capsys.readouterr()
    assert run(["inspect", str(once)]) == 0
    shown = capsys.readouterr().out
    assert "gate, up" in shown and "down" in shown and f"{config.widths.bits_per_expert:.3f} bits" in shown
    assert run([*solve_again, "--granularity", "expert", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["down_bits"] is None
    record["down_bits"] = {"0": [2, 2, 2, 2]}
    (tmp_path / "widths.json").write_text(json.dumps(record))
    assert run(["quantize", str(model_folder), "-o", str(tmp_path / "no"), "--allocation",
                str(tmp_path / "widths.json"), *options]) == 2  # fmt: skip
    assert "down_bits and expert_bits name different layers" in capsys.readouterr().err


def test_the_papers_recipe_gives_experts_one_width(tmp_path, model_folder, text_file):
    options = ["--calibration", str(text_file), "--samples", "6", "--length", "24", "--no-tune-routers", "-q"]
    target = tmp_path / "out"
    assert run(["quantize", str(model_folder), "-o", str(target), "--bits", "2.25", "--recipe", "paper", *options]) == 0
    assert load_packed_config(target).widths.down == {}
    assert Costs.load(target / "gemq_costs.json").matrices is None
    assert run(["allocate", str(target), "--bits", "2.25", "--granularity", "matrix"]) == 2
