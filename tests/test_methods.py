"""The methods that GEMQ is compared with, each against its formula."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import changed, random_windows, snapshot, tiny_model
from torch import nn

from gemq.algorithms.allocation import feasible_range, solve
from gemq.algorithms.baselines import global_pmq
from gemq.algorithms.costs import Costs
from gemq.algorithms.fisher import weight_fisher
from gemq.algorithms.given_allocation import GivenAllocation
from gemq.algorithms.gptq import GptqConfig
from gemq.algorithms.importance import ExpertStatistics
from gemq.algorithms.matrices import quantize_experts
from gemq.algorithms.method import METHODS, MethodConfig, allocate, overridden
from gemq.algorithms.perturbation import Perturbation
from gemq.algorithms.router_alignment import aligned, routing_divergence
from gemq.algorithms.router_tuning import RouterTuningConfig
from gemq.algorithms.two_step import layer_shares, two_step
from gemq.engine.progression import measure_importance, quantize_progressively
from gemq.engine.source import ResidentSource
from gemq.format import default_group_size
from gemq.integrity import WEIGHTS_FILE
from gemq.models import describe
from gemq.pipeline import QuantizeConfig, quantize
from gemq.planning import planned_widths
from gemq.planning.widths import budget_range
from gemq.reference.grid import dequantize_codes, round_to_nearest

RTN = Perturbation("rtn")
# no range search: what is tested here does not depend on it, and it is most of the time
PLAIN = GptqConfig(clip="none")
FAST = {"gptq": PLAIN, "perturbation": "rtn"}


# --- weight-Fisher costs ---


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "qwen2_moe"])
def test_fisher_costs_equal_one_backward_pass_a_window(family: str) -> None:
    model = tiny_model(family)
    moe, windows, candidates = describe(model), random_windows(4, 16), (0, 1, 3)
    before = snapshot(model)
    found = weight_fisher(moe, windows, candidates, perturbation=RTN)
    routed = np.zeros((len(moe.moe), moe.num_experts, len(candidates)))
    shared = np.zeros((len(moe.moe), len(candidates)))
    for window in windows:
        model.zero_grad()
        ids = window[None]
        nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1].float(), ids[0, 1:]).backward()
        for row, layer in enumerate(moe.moe):
            for b, bits in enumerate(candidates):
                for stack in (layer.experts.gate_up_proj, layer.experts.down_proj):
                    for e in range(moe.num_experts):
                        routed[row, e, b] += weighted_change(stack.grad[e], stack.detach()[e], bits)
                if layer.shared is not None:
                    for name in ("gate_proj", "up_proj", "down_proj"):
                        weight = getattr(layer.shared, name).weight
                        shared[row, b] += weighted_change(weight.grad, weight.detach(), bits)
    np.testing.assert_allclose(found.routed, routed, rtol=2e-4, atol=1e-14)
    if moe.moe[0].shared is not None:
        np.testing.assert_allclose(found.shared, shared, rtol=2e-4, atol=1e-14)
        assert found.shared_multiple == moe.shared_multiple
    assert not changed(before, model) and all(p.requires_grad for p in model.parameters())


def weighted_change(gradient: torch.Tensor, weight: torch.Tensor, bits: int) -> float:
    rounded = torch.zeros_like(weight)
    if bits:
        rounded = dequantize_codes(*round_to_nearest(weight, bits, default_group_size(weight.shape[-1])))
    return float((gradient.double() ** 2 * (weight - rounded).double() ** 2).sum())


# --- two steps, and PMQ's coefficients in one program ---


@pytest.mark.parametrize("seed", range(4))
def test_layer_shares_are_the_best_of_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    curves = rng.random((3, 5))  # neither falling nor convex: exact all the same
    for total in (6, 9, 13, 18):
        shares = layer_shares(curves, total, 2, 6)
        value = sum(curves[i, s - 2] for i, s in enumerate(shares))
        best = min(
            sum(curves[i, s - 2] for i, s in enumerate(pick))
            for pick in itertools.product(range(2, 7), repeat=3) if sum(pick) <= total
        )
        assert sum(shares) <= total and value == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("per_layer", ["none", "c2c3"])
def test_two_step_solves_each_layer_for_its_share(per_layer: str) -> None:
    rng = np.random.default_rng(5)
    routed = np.sort(rng.random((3, 4, 3)), -1)[..., ::-1] * np.array([1.0, 0.1, 3.0])[:, None, None]
    costs = Costs((1, 2, 3), routed, (0, 1, 2))
    found = two_step(costs, 2.0, per_layer=per_layer)
    assert found.bits.sum() <= 24
    at = np.arange(4, 13) / 4
    curves = np.stack([np.interp(at, [1, 2, 3], row) for row in routed.sum(1)])
    lowest = {"none": 4, "c2c3": 7}[per_layer]
    best, value = None, np.inf
    for pick in itertools.product(range(lowest, 13), repeat=3):
        total = sum(curves[i, s - 4] for i, s in enumerate(pick))
        if sum(pick) <= 24 and total < value - 1e-12:
            best, value = pick, total
    for row, share in enumerate(best):
        alone = solve(Costs((1, 2, 3), routed[row : row + 1], (0,)), share / 4, per_layer=per_layer)
        assert np.array_equal(alone.bits[0], found.bits[row])
    # one program over all experts can only be better by the same costs
    assert solve(costs, 2.0, per_layer=per_layer, max_gap=0.0).objective <= found.objective + 1e-9
    low, high = feasible_range(costs, per_layer=per_layer)
    for budget in (low - 0.1, high + 0.1, float("nan")):
        with pytest.raises(ValueError, match=r"budget must be in"):
            two_step(costs, budget, per_layer=per_layer)


def test_global_pmq_is_the_best_sum_of_pmqs_coefficients() -> None:
    rng = np.random.default_rng(1)
    frequency, weight = rng.random((2, 3)), rng.random((2, 3))
    loss = np.sort(rng.random((2, 3, 3)), -1)[..., ::-1]
    significance = frequency * weight**1.5
    coefficients = (significance / significance.sum(1, keepdims=True))[..., None] * loss
    best = min(
        (sum(coefficients[i // 3, i % 3, b - 1] for i, b in enumerate(widths)), widths)
        for widths in itertools.product((1, 2, 3), repeat=6) if sum(widths) <= 12
    )
    found = global_pmq(frequency, weight, loss, (1, 2, 3), 2.0)
    assert found.objective == pytest.approx(best[0]) and tuple(found.bits.flatten()) == best[1]


@pytest.mark.parametrize("method", ["global-pmq", "two-step", "fisher"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_methods_run_within_their_budget(method: str, family: str) -> None:
    source = ResidentSource(tiny_model(family))
    config = MethodConfig(budgets=(2.25, 1.75), method=method, per_layer="none", tune=False, **FAST)
    stages = list(quantize_progressively(source, random_windows(), config))
    assert [s.budget for s in stages] == [2.25, 1.75]
    for stage in stages:
        assert 0 < stage.allocation.bits_per_expert <= stage.budget + 1e-9
        assert stage.widths.experts == {layer.index: list(row) for layer, row in
                                      zip(source.moe.moe, stage.allocation.bits.tolist(), strict=True)}


def random_statistics(moe) -> ExpertStatistics:
    rng, shape = np.random.default_rng(0), (len(moe.moe), moe.num_experts)
    falling = np.array([9.0, 3.0, 1.0])
    shared = rng.random((len(moe.moe), 1)) * falling if moe.shared_multiple else None
    layers = tuple(layer.index for layer in moe.moe)
    costs = Costs((1, 2, 3), rng.random((*shape, 1)) * falling, layers, shared, moe.shared_multiple)
    return ExpertStatistics(costs, rng.random(shape), rng.random(shape), rng.random((*shape, 1)) * falling)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "glm4_moe", "qwen2_moe"])
def test_a_budget_is_the_mean_of_all_experts_whatever_the_method(method: str, family: str) -> None:
    moe = describe(tiny_model(family))
    statistics, multiple = random_statistics(moe), moe.shared_multiple
    config = MethodConfig(method=method)
    low, high = (2.0, 2.0) if method == "uniform" else budget_range(moe, config)
    for budget in np.linspace(low, high, 4):
        found, widths = overridden(moe, allocate(moe, statistics, budget, config), config)
        bits = sum(sum(row) for layer in widths.experts for row in widths.of_experts(layer)) / 2
        bits += multiple * sum(widths.shared.values())
        units = len(moe.moe) * (moe.num_experts + multiple)
        assert bits / units == pytest.approx(found.bits_per_expert) and found.bits_per_expert <= budget + 1e-9
        assert found.budget == pytest.approx(budget)
        planned = planned_widths(moe, config, budget).widths
        # a width that the program chooses for shared experts is an estimate before
        if not multiple or method not in ("gemq", "fisher"):
            assert sum(map(sum, planned.experts.values())) == sum(map(sum, widths.experts.values()))
    # what is fixed by hand is beside the budget
    if multiple:
        config = replace(config, shared_bits=4)
        found, widths = overridden(moe, allocate(moe, statistics, 2.0, config), config)
        assert set(widths.shared.values()) == {4} and found.bits_per_expert <= 2.0
        assert np.mean([np.mean(row) for row in widths.experts.values()]) == pytest.approx(2.0, abs=0.3)


# --- routers ---


def test_divergence_is_that_of_the_textbook() -> None:
    generator = torch.Generator().manual_seed(0)
    target, logits = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = target.softmax(-1), logits.softmax(-1)
    assert float(routing_divergence(target, logits)) == pytest.approx(float((p * (p / q).log()).sum() / 7))
    assert float(routing_divergence(target, target)) == pytest.approx(0, abs=1e-12)


def router_logits(moe, windows) -> list[torch.Tensor]:
    """Logits ``[N * T, E]`` of every router, by hooks on the whole model."""
    seen = []
    handles = [
        layer.router.register_forward_pre_hook(
            lambda m, args: seen.append(args[0].reshape(-1, m.weight.shape[1]).float() @ m.weight.float().T))
        for layer in moe.moe
    ]
    with torch.no_grad():
        moe.model(input_ids=windows)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "deepseek_v3"])
def test_alignment_brings_routers_back_and_moves_nothing_else(family: str) -> None:
    model, windows = tiny_model(family), random_windows(8)
    method = MethodConfig(
        budgets=(2.0,), method="uniform", router_method="alignment", batch_size=3,
        router=RouterTuningConfig(learning_rate=1e-2, epochs=5), gptq=PLAIN,
    )
    (result,) = quantize_progressively(ResidentSource(model), windows, method)
    (plain,) = quantize_progressively(ResidentSource(model), windows, replace(method, tune=False))
    after, before = result.weights.whole(), plain.weights.whole()
    assert changed(before.model.state_dict(), after.model) == {f"{layer.router_path}.weight" for layer in after.moe}
    targets = router_logits(describe(model), windows)
    for target, one, two, told in zip(
        targets, router_logits(before, windows), router_logits(after, windows), result.router_losses, strict=True
    ):
        # what it reports is what the aligned model does
        assert float(routing_divergence(target, two)) == pytest.approx(told, rel=1e-3)
        assert told < 0.8 * float(routing_divergence(target, one))


def test_a_router_on_its_own_inputs_is_aligned_already() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(4, 16, generator=generator), torch.randn(40, 16, generator=generator)
    found = aligned(weight, x, x @ weight.T, RouterTuningConfig(1e-4, 0.0), 10)
    assert (found - weight).abs().max() < 1e-3 and found.dtype == weight.dtype
    with pytest.raises(ValueError, match=r"target must be \[40, 4\], got \[39, 4\]"):
        aligned(weight, x, x[1:] @ weight.T, RouterTuningConfig(), 10)


def test_alignment_is_a_router_method_of_the_progression() -> None:
    source = ResidentSource(tiny_model("mixtral"))
    options = {"budgets": (2.0,), "router": RouterTuningConfig(3e-3, epochs=4)} | FAST
    losses = []
    for method in ("loss", "alignment"):
        (stage,) = quantize_progressively(source, random_windows(), MethodConfig(router_method=method, **options))
        losses.append(stage.router_losses)
    assert len(losses[0]) == 24 and len(losses[1]) == 2, "a loss a step; a divergence a layer"
    with pytest.raises(ValueError, match="router_method must be one of loss, alignment, got 'kl'"):
        MethodConfig(router_method="kl")


# --- calibration ---


def test_affinity_weights_the_hessians_by_routing_weights() -> None:
    model, windows = tiny_model("mixtral"), random_windows(4)
    moe = describe(model)
    inputs = []
    handle = moe.moe[0].experts.register_forward_pre_hook(lambda m, args: inputs.append(args))
    with torch.no_grad():
        model(input_ids=windows)
    handle.remove()
    ((x, ids, weights),) = inputs
    given = GivenAllocation("here", ((2, 2, 2, 2), (2, 2, 2, 2)))
    for affinity in (0.0, 1.0, 2.0):
        seen = []

        def keep(weights, hessians, bits, config, seen=seen):
            # of gate and up, a group of experts at a time, the first layer's first
            seen += [h.value.clone() for h in hessians if len(h.value) == moe.hidden]
            return quantize_experts(weights, hessians, bits, config)

        method = MethodConfig(
            (8.0,), given=given, attention_bits=16, dense_bits=16, affinity=affinity, gptq=PLAIN, tune=False
        )
        list(quantize_progressively(ResidentSource(model), windows, method, quantizer=keep))
        for e in range(4):
            token, slot = torch.where(ids == e)
            scale = weights[token, slot].double() ** affinity
            expected = (x[token].double() * scale[:, None]).T @ x[token].double()
            torch.testing.assert_close(seen[e].double(), expected, rtol=1e-4, atol=1e-4)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"affinity must be an exponent in 0\.\.4, got -1"):
        MethodConfig(affinity=-1)
    with pytest.raises(ValueError, match="method must be one of gemq, pmq, uniform, global-pmq, two-step, fisher"):
        MethodConfig(method="spqr")


def test_fisher_and_output_gradients_agree_on_which_experts_matter() -> None:
    """Two estimates of one thing: on a model they rank experts alike, though they are not the same numbers."""
    model, windows = tiny_model("mixtral"), random_windows(12)
    one = measure_importance(ResidentSource(model), windows, (1, 2, 3), perturbation=RTN).costs.routed.flatten()
    two = weight_fisher(describe(model), windows, (1, 2, 3), perturbation=RTN).routed.flatten()
    ranks = [np.argsort(np.argsort(v)) for v in (one, two)]
    assert np.corrcoef(*ranks)[0, 1] > 0.7 and not np.allclose(one, two)


@pytest.mark.parametrize("method", ["global-pmq", "two-step", "fisher"])
def test_methods_on_the_command_line(method, model_folder, text_file, tmp_path) -> None:
    from gemq.checkpoint_summary import summarize
    from gemq.cli.run import run

    target = tmp_path / "out"
    done = run([
        "quantize", str(model_folder), "-o", str(target), "--method", method, "--bits", "2", "--constraints", "none",
        "--calibration", str(text_file), "--samples", "2", "--length", "32", "--router-method", "alignment",
        "--affinity", "1", "--recipe", "paper", "--clip", "none", "--keep=model",
    ])
    assert done == 0
    found = summarize(target)
    assert found.config.method == method and found.expert_bits <= 2
    assert run(["quantize", str(model_folder), "-o", str(tmp_path / "no"), "--method", "spqr"]) == 2
    assert run(["quantize", str(model_folder), "-o", str(tmp_path / "no"), "--affinity", "9"]) == 2
    assert run(["quantize", str(model_folder), "-o", str(tmp_path / "no"), "--method", "fisher"]) == 2
    assert not list(tmp_path.glob("no*"))


def test_what_needs_the_whole_model_says_so(model_folder, tmp_path) -> None:
    config = QuantizeConfig(str(model_folder), str(tmp_path / "no"), method=MethodConfig(method="fisher"))
    for keep in ("layer", "activations"):
        with pytest.raises(ValueError, match=f"method 'fisher' needs the whole model in memory: .* got {keep}"):
            quantize(replace(config, keep=keep))
    assert not list(tmp_path.iterdir())


def test_what_needs_the_whole_model_is_not_shared_out(monkeypatch) -> None:
    from gemq import distributed

    monkeypatch.setattr(distributed, "world", lambda: distributed.World(0, 2))
    with pytest.raises(ValueError, match="method 'fisher': not with several processes, got 2"):
        quantize_progressively(
            ResidentSource(tiny_model("mixtral")), random_windows(2), MethodConfig(method="fisher")
        )


@pytest.mark.parametrize("options", [
    {"method": "global-pmq"}, {"method": "two-step"}, {"router_method": "alignment", "tune": True}, {"affinity": 1.0},
], ids=str)
def test_methods_give_the_same_bytes_from_disk_and_from_memory(options, model_folder, text_file, tmp_path) -> None:
    found = []
    for keep in ("layer", "model"):
        chosen = MethodConfig(budgets=(2.0,), per_layer="none", **{"tune": False} | FAST | options)
        target = tmp_path / keep
        quantize(QuantizeConfig(str(model_folder), str(target), str(text_file), 2, 32, keep=keep, method=chosen))
        found.append((target / WEIGHTS_FILE).read_bytes())
    assert found[0] == found[1]


def test_the_plan_knows_what_the_fisher_information_takes() -> None:
    from gemq.planning.memory import Work, layerwise, resident
    from gemq.planning.model_parts import count_parts

    parts = count_parts(describe(tiny_model("mixtral")))

    def needs(method: str) -> dict:
        work = Work(4, 16, MethodConfig(method=method), 4, True)
        return resident(layerwise(parts, work, 0), parts, work, 0)["measure"].device

    assert needs("fisher")["Fisher information"] == parts.quantizable * 8
    assert "Fisher information" not in needs("gemq")
