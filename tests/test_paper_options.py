"""The variants of the paper's ablations: each changes what it should, and the rest stays the same bytes.

What a width may change: GPTQ is calibrated on what the layers before it give, with a layer's own weights unquantized.
So in the first layer attention and experts of the same width are the same bytes whatever the others' widths, and from
the second layer on everything that is quantized may differ. Costs of the first budget come from the full-precision
model and depend on no width at all.
"""

from __future__ import annotations

import functools
import itertools
import json

import numpy as np
import pytest
import torch
from packed_models import logits, quantized
from safetensors.torch import load_file
from tiny_models import random_windows, tiny_model
from tiny_text import words

import gemq
from gemq.algorithms.allocation import PER_LAYER, feasible_range, solve
from gemq.algorithms.costs import Costs
from gemq.algorithms.method import MethodConfig
from gemq.algorithms.router_tuning import RouterTuningConfig
from gemq.checkpoint import save_packed
from gemq.checkpoint_summary import summarize
from gemq.engine.progression import quantize_progressively
from gemq.engine.source import ResidentSource
from gemq.integrity import WEIGHTS_FILE
from gemq.models import describe
from gemq.nn.experts import PROJECTIONS
from gemq.pipeline import QuantizeConfig

# learning fast enough that tuned routers differ clearly
ROUTER = RouterTuningConfig(learning_rate=1e-2)


@functools.cache
def made(family="mixtral", budget=2.0, **options):
    return quantized(family, budget, router=ROUTER, **options)


def state(case):
    return {k: v.clone() for k, v in case.packed.state_dict().items()}


def changed(one, other):
    """Names of the tensors that differ; both have the same names."""
    first, second = state(one), state(other)
    assert set(first) == set(second)
    return {k for k, v in first.items() if v.shape != second[k].shape or not torch.equal(v, second[k])}


def codes(case, layer):
    """Width and dequantized weight of every expert of a layer, by expert and projection."""
    path = f"model.layers.{layer}.mlp.experts"
    module = case.stage.quantized.record(layer).modules[path]
    return {(e, p): (module.bits[p][e], weight) for p in PROJECTIONS for e, weight in enumerate(module.dense(p))}


def same_costs(one, other):
    a, b = one.stage.statistics.costs, other.stage.statistics.costs
    assert np.array_equal(a.routed, b.routed) and (a.shared is None or np.array_equal(a.shared, b.shared))


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_attention_bits(bits):
    """Table 19. Against 4 bits: the same costs and widths, and the first layer's experts are the same bytes."""
    base, other = made(tune=False), made(tune=False, attention_bits=bits)
    same_costs(base, other)
    assert other.config.widths.experts == base.config.widths.experts and other.config.widths.attention == bits
    if bits < 16:
        differ = changed(base, other)
        allowed = ("self_attn", "layers.1.mlp.experts")
        assert all(any(part in name for part in allowed) for name in differ)
        assert {n for n in differ if "self_attn" in n} == {n for n in state(base) if "self_attn" in n}
    else:
        # unquantized attention is the model's own
        own = tiny_model("mixtral").state_dict()
        kept = {k: v for k, v in state(other).items() if "self_attn" in k}
        assert len(kept) == 8 and all(torch.equal(v, own[k]) for k, v in kept.items())
    for expert, (width, found) in codes(base, 0).items():
        assert codes(other, 0)[expert][0] == width and torch.equal(codes(other, 0)[expert][1], found)


@pytest.mark.parametrize("candidates", [(1, 2, 3), (0, 1, 2, 3), (1, 2, 3, 4), (0, 1, 2, 3, 4), (2, 3)], ids=str)
def test_candidates(candidates):
    """Table 18. Costs of a width that two sets share are the same; only widths of the set are used."""
    base = made(tune=False, per_layer="c2c3")
    other = made(budget=2.25, tune=False, candidates=candidates, per_layer="c2c3")
    used = {b for row in other.config.widths.experts.values() for b in row}
    assert used <= set(candidates) and {candidates[-1], candidates[-2]} <= used
    one, two = base.stage.statistics.costs, other.stage.statistics.costs
    assert two.candidates == candidates
    for width in set(candidates) & {1, 2, 3}:
        here = two.routed[..., candidates.index(width)]
        # GPTQ of several widths in one batch may order its sums differently
        np.testing.assert_allclose(here, one.routed[..., one.candidates.index(width)], rtol=1e-4)
    attention = [n for n in state(base) if "layers.0.self_attn" in n]
    assert attention and not set(attention) & {
        n for n, v in state(other).items() if n in state(base) and not torch.equal(v, state(base)[n])
    }


@pytest.mark.parametrize("per_layer", PER_LAYER)
def test_constraints(per_layer):
    """Table 17. The same costs; the optimum under just these constraints, found by trying every allocation."""
    base, other = made(tune=False), made(tune=False, per_layer=per_layer)
    same_costs(base, other)
    rng = np.random.default_rng(3)
    for _ in range(4):
        # the second layer matters a thousandth, so that the constraints bind
        costs = Costs((1, 2, 3), np.sort(rng.random((2, 3, 3)), -1)[..., ::-1] * [[[1.0]], [[1e-3]]], (0, 1))
        budget = 2.0
        best = np.inf
        for widths in itertools.product((1, 2, 3), repeat=6):
            layers = (widths[:3], widths[3:])
            c2 = all(3 in layer for layer in layers)
            c3 = all(2 in layer for layer in layers)
            kept = {"none": True, "c2": c2, "c3": c3, "c2c3": c2 and c3}[per_layer]
            if kept and sum(widths) <= 6 * budget:
                best = min(best, sum(costs.routed[i // 3, i % 3, b - 1] for i, b in enumerate(widths)))
        found = solve(costs, budget, per_layer=per_layer, max_gap=0.0)
        assert found.objective == pytest.approx(best, rel=1e-9)
        minimum = {"none": 6, "c2": 10, "c3": 8, "c2c3": 12}[per_layer] / 6
        assert feasible_range(costs, per_layer=per_layer)[0] == pytest.approx(minimum)
    # experts of the first layer that keep their width keep their bytes
    one, two = codes(base, 0), codes(other, 0)
    kept = [e for e in range(4) if all(one[e, p][0] == two[e, p][0] for p in PROJECTIONS)]
    assert all(torch.equal(one[e, p][1], two[e, p][1]) for e in kept for p in PROJECTIONS)


def on_a_grid(weight, bits, group=64):
    rows = weight.reshape(len(weight), -1, group).flatten(0, 1)
    return all(len(row.unique()) <= 2**bits for row in rows)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_next"])
@pytest.mark.parametrize("bits", [8, 4])
def test_router_bits(family, bits, tmp_path):
    """Table 20. Only the routers differ, they lie on a grid of their width near the tuned ones, and are reported."""
    base, other = made(family), made(family, router_bits=bits)
    routers = {f"{layer.router_path}.weight" for layer in describe(other.dense).moe}
    assert changed(base, other) == routers
    before, after = state(base), state(other)
    own = tiny_model(family).state_dict()
    for name in routers:
        assert on_a_grid(after[name], bits) and not on_a_grid(before[name], 4)
        # nearest in output, not in weight: a little further than rounding would leave it
        assert float((after[name] - before[name]).norm() / before[name].norm()) < 1.2 * 2.0 ** (1 - bits)
        assert not torch.equal(before[name], own[name]), "routers were to be tuned first"
        assert other.stage.reports[name.removesuffix(".weight")].tokens == random_windows().numel()
    assert other.config.widths.router == bits and base.config.widths.router == 16
    save_packed(other.packed, other.config, tmp_path / "model")
    loaded = gemq.from_pretrained(tmp_path / "model")
    assert torch.equal(logits(loaded), logits(other.packed))
    assert summarize(tmp_path / "model").config.widths.router == bits


def test_routers_of_bits_are_measured_where_the_estimate_says():
    """``quantized`` measures with the original routers, though routers were tuned and rounded in between."""
    stages = []
    for options in ({"tune": False}, {"router_bits": 2, "router": ROUTER}):
        config = MethodConfig(budgets=(2.25, 2.0), estimate="quantized", **options)
        stages.append(list(quantize_progressively(ResidentSource(tiny_model("mixtral")), random_windows(), config)))
    one, two = (s[1].statistics.costs.routed for s in stages)
    assert np.array_equal(one, two)


def test_the_estimate_changes_later_budgets_alone():
    """The model that costs are measured on: the first budget is the same bytes whichever it is."""
    stages = {}
    for estimate in ("fp", "quantized", "tuned"):
        config = MethodConfig(budgets=(2.25, 2.0), estimate=estimate, router=ROUTER)
        found = list(quantize_progressively(ResidentSource(tiny_model("mixtral")), random_windows(), config))
        stages[estimate] = found
    for first, second in itertools.combinations(stages.values(), 2):
        assert np.array_equal(first[0].statistics.costs.routed, second[0].statistics.costs.routed)
        assert first[0].widths == second[0].widths and first[0].router_losses == second[0].router_losses
        one, two = (stage[0].packed()[0].state_dict() for stage in (first, second))
        assert all(torch.equal(value, two[name]) for name, value in one.items())
        assert not np.array_equal(first[1].statistics.costs.routed, second[1].statistics.costs.routed)
    fp, own = stages["fp"]
    assert np.array_equal(fp.statistics.costs.routed, own.statistics.costs.routed)


CALIBRATION = {
    "seed": {"seed": 1}, "samples": {"samples": 9}, "length": {"length": 24},
    "sources": {"calibration": "{text}@0.75,{other}@0.25"}, "weights": {"calibration": "{text}@0.25,{other}@0.75"},
}  # fmt: skip


@pytest.fixture(scope="module")
def calibrated(model_folder, text_file, tmp_path_factory):
    """Checkpoints by name: of the same options twice, and with one choice of calibration text changed."""
    folder = tmp_path_factory.mktemp("calibrated")
    other = folder / "other.txt"
    other.write_text(" ".join(words(2000, seed=7).split()[::-1]))
    made = {}
    for name, changes in {"base": {}, "again": {}, **CALIBRATION}.items():
        options = {"calibration": "{text}", "samples": 8, "length": 16, "seed": 0} | changes
        options["calibration"] = options["calibration"].format(text=text_file, other=other)
        config = QuantizeConfig(str(model_folder), str(folder / name), **options, method=MethodConfig(tune=False))
        (outcome,) = gemq.quantize(config)
        made[name] = load_file(outcome.path / WEIGHTS_FILE), json.loads((outcome.path / "config.json").read_text())
    return made


@pytest.mark.parametrize("name", ["again", *CALIBRATION])
def test_calibration_text(calibrated, name):
    """Its seed, size and mixture change what is quantized, and no tensor or option besides; nothing else is random."""
    (base, config), (other, other_config) = calibrated["base"], calibrated[name]
    unquantized = {n for n in base if not n.endswith(("_codes", "_meta"))}
    assert {n for n in other if not n.endswith(("_codes", "_meta"))} == unquantized and len(unquantized) > 5
    differ = {n for n in base if other[n].shape != base[n].shape or not torch.equal(other[n], base[n])}
    if name == "again":
        assert not differ and config == other_config
    else:
        assert any(n.endswith("_codes") for n in differ) and not differ & unquantized
        same = {"expert_bits", "down_bits", "version", "digest"}
        one, two = (c["quantization_config"] for c in (config, other_config))
        assert {k: v for k, v in one.items() if k not in same} == {k: v for k, v in two.items() if k not in same}
        # gate and up are two thirds of an expert
        spent = [sum(2 * sum(row) + sum(c.get("down_bits", c["expert_bits"])[layer])
                     for layer, row in c["expert_bits"].items()) for c in (one, two)]
        assert spent[0] == spent[1]


@pytest.mark.parametrize("options, message", [
    ({"router_bits": 12}, "router_bits must be 1..8, or 16 for unquantized, got 12"),
    ({"per_layer": "c4"}, "per_layer must be one of c2c3, c2, c3, none, got 'c4'"),
])  # fmt: skip
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        MethodConfig(**options)
