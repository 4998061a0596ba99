"""The methods that GEMQ is compared with, each against its formula."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
from tiny_models import random_windows, tiny_model
from torch import nn

from gemq.algorithms.allocation import feasible_range, solve
from gemq.algorithms.balanced_windows import (
    balanced_windows,
    expert_loads,
    imbalance,
    pick_balanced,
    self_sampled_windows,
)
from gemq.algorithms.baselines import global_pmq
from gemq.algorithms.costs import Costs
from gemq.algorithms.fisher import weight_fisher
from gemq.algorithms.gptq import GptqConfig, gptq
from gemq.algorithms.importance import Perturbation, measure
from gemq.algorithms.originals import Originals
from gemq.algorithms.outliers import (
    outlier_gptq,
    pick_outliers,
    quantize_weights_with_outliers,
    sensitivity,
    split_budget,
)
from gemq.algorithms.progressive import MethodConfig, quantize_progressively
from gemq.algorithms.router_alignment import (
    align_routers,
    changed_routes,
    chosen_experts,
    replayed_routing,
    router_logits,
    routing_divergence,
)
from gemq.algorithms.router_tuning import RouterTuningConfig
from gemq.algorithms.sequential import BitPlan, quantize_weights
from gemq.algorithms.two_step import layer_shares, two_step
from gemq.format import default_group_size
from gemq.models import describe
from gemq.pipeline import QuantizeConfig, quantize
from gemq.reference.grid import dequantize_codes, find_grid, round_to_grid, round_to_nearest

RTN = Perturbation("rtn")
# no range search: what is tested here does not depend on it, and it is most of the time
PLAIN = GptqConfig(clip="none")
FAST = {"gptq": PLAIN, "perturbation": "rtn"}


def changed(before: dict, model) -> set[str]:
    return {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}


def snapshot(model) -> dict:
    return {k: v.clone() for k, v in model.state_dict().items()}


# --- weight-Fisher costs ---


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "qwen2_moe"])
def test_fisher_costs_equal_one_backward_pass_a_window(family: str) -> None:
    model = tiny_model(family)
    moe, windows, candidates = describe(model), random_windows(4, 16), (0, 1, 3)
    before = snapshot(model)
    found = weight_fisher(moe, windows, candidates, Originals(moe), perturbation=RTN)
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
    moe = describe(tiny_model(family))
    config = MethodConfig(budgets=(2.25, 1.75), method=method, per_layer="none", tune=False, **FAST)
    stages = list(quantize_progressively(moe, random_windows(), config))
    assert [s.budget for s in stages] == [2.25, 1.75]
    for stage in stages:
        assert 0 < stage.allocation.bits_per_expert <= stage.budget + 1e-9
        assert stage.plan.experts == {layer.index: list(row) for layer, row in
                                      zip(moe.moe, stage.allocation.bits.tolist(), strict=True)}


# --- routers ---


def quantized_twin(family: str = "mixtral", bits: int = 2):
    """``(full precision, quantized)`` of the same model."""
    reference, model = describe(tiny_model(family)), describe(tiny_model(family))
    plan = BitPlan({layer.index: [bits] * 4 for layer in model.moe}, {layer.index: 4 for layer in model.moe})
    quantize_weights(model, random_windows(), plan, Originals(model), PLAIN)
    return reference, model


def test_divergence_is_that_of_the_textbook() -> None:
    generator = torch.Generator().manual_seed(0)
    target, logits = (torch.randn(7, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    p, q = target.softmax(-1), logits.softmax(-1)
    assert float(routing_divergence(target, logits)) == pytest.approx(float((p * (p / q).log()).sum() / 7))
    assert float(routing_divergence(target, target)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "deepseek_v3"])
def test_router_logits_are_those_of_the_model(family: str) -> None:
    moe, windows = describe(tiny_model(family)), random_windows(3)
    seen = []
    handles = [layer.router.register_forward_pre_hook(lambda m, args: seen.append((m, args[0].detach())))
               for layer in moe.moe]
    with torch.no_grad():
        moe.model(input_ids=windows)
    for handle in handles:
        handle.remove()
    for found, (router, x) in zip(router_logits(moe, windows, 2), seen, strict=True):
        torch.testing.assert_close(found, x.reshape(-1, moe.hidden) @ router.weight.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_alignment_brings_routers_back_and_moves_nothing_else(family: str) -> None:
    reference, moe = quantized_twin(family)
    windows = random_windows(8)
    targets, before = router_logits(reference, windows), snapshot(moe.model)
    config = RouterTuningConfig(learning_rate=1e-2, epochs=5)
    found = align_routers(moe, windows, targets, config)
    assert changed(before, moe.model) == {f"{layer.router_path}.weight" for layer in moe.moe}
    assert all(after < 0.8 * start for start, after in found)
    # what it reports is what the aligned model does
    for (_, after), target, logits in zip(found, targets, router_logits(moe, windows), strict=True):
        assert float(routing_divergence(target, logits)) == pytest.approx(after, rel=1e-3)


def test_a_full_precision_model_is_aligned_already() -> None:
    moe, windows = describe(tiny_model("mixtral")), random_windows()
    before = snapshot(moe.model)
    found = align_routers(moe, windows, router_logits(moe, windows), RouterTuningConfig(1e-4, 0.0))
    assert all(abs(start) < 1e-6 for start, _ in found)
    for name in changed(before, moe.model):
        assert (moe.model.state_dict()[name] - before[name]).abs().max() < 1e-3
    with pytest.raises(ValueError, match="targets must be 2 tensors"):
        align_routers(moe, windows[:2], router_logits(moe, windows))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "deepseek_v3", "qwen3_moe"])
def test_replayed_routing_is_that_of_the_reference(family: str) -> None:
    reference, moe = quantized_twin(family, bits=1)
    windows = random_windows(4)
    wanted, own = chosen_experts(reference, windows), chosen_experts(moe, windows)
    assert max(changed_routes(wanted, own)) > 0.05, "quantization was to change routes"
    weights = []
    handles = [layer.experts.register_forward_pre_hook(lambda m, args: weights.append(args[2].detach()))
               for layer in (*reference.moe, *moe.moe)]
    with torch.no_grad():
        plain = moe.model(input_ids=windows).logits
        weights.clear()
        with replayed_routing(moe, reference):
            assert changed_routes(wanted, routed_by(moe, windows)) == [0.0] * len(moe.moe)
            weights.clear()
            replayed = moe.model(input_ids=windows).logits
        given = len(weights) // 2
        assert all(torch.equal(a, b) for a, b in zip(weights[:given], weights[given:], strict=True))
        weights.clear()
        assert not torch.equal(plain, replayed) and torch.equal(plain, moe.model(input_ids=windows).logits)
    for handle in handles:
        handle.remove()


def routed_by(moe, windows):
    """As chosen_experts, through the whole model (what replaying hooks)."""
    found = []
    handles = [
        layer.experts.register_forward_pre_hook(lambda m, args: found.append(
            torch.zeros(len(args[0]), moe.num_experts, dtype=torch.bool).scatter_(1, args[1].long(), True)))
        for layer in moe.moe
    ]
    moe.model(input_ids=windows)
    for handle in handles:
        handle.remove()
    return found


def test_alignment_is_a_router_method_of_the_progression() -> None:
    moe = describe(tiny_model("mixtral"))
    options = {"budgets": (2.0,), "router": RouterTuningConfig(3e-3, epochs=4)} | FAST
    losses = []
    for method in ("loss", "alignment"):
        (stage,) = quantize_progressively(moe, random_windows(), MethodConfig(router_method=method, **options))
        losses.append(stage.router_losses)
    assert len(losses[0]) == 24 and len(losses[1]) == 2, "a loss a step; a divergence a layer"
    with pytest.raises(ValueError, match="router_method must be one of loss, alignment, got 'kl'"):
        MethodConfig(router_method="kl")


# --- calibration ---


def test_affinity_weights_the_hessians_by_routing_weights(monkeypatch) -> None:
    from gemq.algorithms import sequential

    moe, windows = describe(tiny_model("mixtral")), random_windows(4)
    originals, plan = Originals(moe), BitPlan({0: [2] * 4, 1: [2] * 4}, attention=16, dense=16)
    for affinity in (0.0, 1.0, 2.0):
        seen = []

        def keep(weights, hessians, bits, config, seen=seen):
            seen.append([h.value.clone() for h in hessians])
            return sequential.quantize_stack(weights, hessians, bits, config)

        quantize_weights(moe, windows, plan, originals, PLAIN, affinity=affinity, quantizer=keep)
        originals.restore()
        inputs = []
        handle = moe.moe[0].experts.register_forward_pre_hook(lambda m, args, inputs=inputs: inputs.append(args))
        with torch.no_grad():
            moe.model(input_ids=windows)
        handle.remove()
        ((x, ids, weights),) = inputs
        for e in range(4):
            token, slot = torch.where(ids == e)
            scale = weights[token, slot].double() ** affinity
            expected = (x[token].double() * scale[:, None]).T @ x[token].double()
            torch.testing.assert_close(seen[0][e].double(), expected, rtol=1e-4, atol=1e-4)


def test_balanced_windows_take_the_step_that_evens_loads_most() -> None:
    rng = np.random.default_rng(2)
    loads = rng.poisson(4.0, (9, 2, 4)).astype(float)
    chosen: list[int] = []
    for _ in range(5):
        def spread(extra: int, chosen=tuple(chosen)) -> float:
            total = loads[[*chosen, extra]].sum(0)
            return float(((total - total.mean(1, keepdims=True)) ** 2).sum())

        chosen.append(min((i for i in range(9) if i not in chosen), key=spread))
    assert pick_balanced(loads, 5) == sorted(chosen)
    assert pick_balanced(loads, 9) == list(range(9))
    for count in (0, 10):
        with pytest.raises(ValueError, match=r"count must be in 1\.\.9 windows of the pool"):
            pick_balanced(loads, count)


def test_balanced_windows_are_more_even_than_the_first() -> None:
    moe, pool = describe(tiny_model("mixtral")), random_windows(40, 16)
    loads = expert_loads(moe, pool)
    assert loads.shape == (40, 2, 4) and (loads.sum(2) == 16 * moe.top_k).all()
    found = balanced_windows(moe, pool, 8)
    assert len(found) == 8 and all(any(torch.equal(w, p) for p in pool) for w in found)
    assert imbalance(expert_loads(moe, found).sum(0)) < 0.7 * imbalance(loads[:8].sum(0))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_one_beam_is_plain_sampling(family: str) -> None:
    """Token after token from the whole text so far, without a cache."""
    moe = describe(tiny_model(family))
    found = self_sampled_windows(moe, 2, 9, beams=1, seed=4)
    generator = torch.Generator().manual_seed(4)
    for window in found:
        ids = torch.randint(96, (1, 1), generator=generator)
        while ids.shape[1] < 9:
            with torch.no_grad():
                logs = moe.model(input_ids=ids).logits[:, -1].double().softmax(-1)
            ids = torch.cat([ids, torch.multinomial(logs, 1, generator=generator)], 1)
        assert torch.equal(ids[0], window)


def test_self_sampling_weighs_likelihood_against_balance() -> None:
    moe = describe(tiny_model("mixtral"))
    with torch.no_grad():
        for layer in moe.moe:
            layer.router.weight[0] += 0.3 * layer.router.weight.norm() / 8  # a favourite
    spread, nll = [], []
    for temperature in (0.02, 1e6):
        found = self_sampled_windows(moe, 6, 16, temperature=temperature, seed=1)
        assert torch.equal(found, self_sampled_windows(moe, 6, 16, temperature=temperature, seed=1))
        assert found.shape == (6, 16) and int(found.min()) >= 0 and int(found.max()) < 96
        spread.append(imbalance(expert_loads(moe, found[:, :-1]).sum(0)))
        nll.append(float(torch.stack([losses_of(moe.model, w) for w in found]).mean()))
    assert spread[0] < 0.9 * spread[1] and nll[0] > nll[1]
    for given in ({"count": 0}, {"length": 1}, {"beams": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="count and beams must be at least 1"):
            self_sampled_windows(moe, **{"count": 1, "length": 4} | given)


def losses_of(model, window):
    with torch.no_grad():
        logits = model(input_ids=window[None]).logits[0, :-1]
    return nn.functional.cross_entropy(logits, window[1:])


# --- outliers ---


def planted(seed: int = 0):
    """Weights with a few large values, and a Hessian."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(2, 24, 64, generator=generator) * 0.05
    weight[:, ::5, 3], weight[:, 1::7, 40] = 3.0, -3.0
    x = torch.randn(2, 200, 64, generator=generator) * torch.linspace(0.9, 1.1, 64)
    return weight, x.transpose(1, 2) @ x


def test_sensitivity_is_the_error_saved_by_leaving_one_out() -> None:
    weight, _ = planted()
    inverse = torch.rand(2, 64, generator=torch.Generator().manual_seed(1)) + 0.5
    found = sensitivity(weight, inverse, 2, 32)
    max_code = torch.tensor(3.0)

    def error(values, scale):
        s, m = find_grid(values[None], max_code, "none")
        return ((round_to_grid(values[None], s, m, max_code) * s + m - values)[0] ** 2 / (2 * scale)).sum()

    for e, row, start in ((0, 0, 0), (1, 5, 32), (0, 3, 32), (1, 1, 32)):
        group, scale = weight[e, row, start : start + 32], inverse[e, start : start + 32]
        for j in range(32):
            others = torch.arange(32) != j
            expected = error(group, scale) - error(group[others], scale[others])
            assert float(found[e, row, start + j]) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


def test_outliers_are_the_planted_values_and_are_kept() -> None:
    weight, hessian = planted()
    large = weight.abs() > 1
    share = float(large[0].float().mean())
    config = GptqConfig(group_size=32, clip="none", refine=0, rescale=False)
    found, outlier = outlier_gptq(weight, hessian, 2, share, config, 32)
    # one-shot: while an outlier is in the group, the end of the range on the other side is sensitive, too
    assert int((outlier & large).sum()) >= int(large.sum()) - 1 and outlier.sum() == large.sum()
    plain, _, _ = gptq(weight, hessian, [2, 2], [200, 200], config, 32)
    _, meta, _ = gptq(weight, hessian, [2, 2], [200, 200], config, 32)

    def lost(result):
        return float((((weight - result) @ hessian) * (weight - result)).sum())

    assert lost(found) < 0.3 * lost(dequantize_codes(plain, meta))
    # without outliers it is GPTQ
    same, none = outlier_gptq(weight, hessian, 2, 0.0, config, 32)
    assert not none.any()
    torch.testing.assert_close(same, dequantize_codes(plain, meta), atol=1e-4, rtol=1e-3)
    # all of them: the weights in 16 bits, with no error to propagate but rounding
    everything, mask = outlier_gptq(weight, hessian, 2, 1.0, config, 32)
    assert mask.all()
    torch.testing.assert_close(everything, weight, atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match=r"share must be in 0\.\.1, got 1\.5"):
        outlier_gptq(weight, hessian, 2, 1.5, config, 32)


def test_the_share_spends_the_budget() -> None:
    assert split_budget(2.5) == (2, 0.5 / 32) and split_budget(2.0) == (1, 1 / 32) and split_budget(1.5)[0] == 1
    assert pick_outliers(torch.rand(3, 8, 16), 0.1).sum((1, 2)).tolist() == [12] * 3
    for budget in (1.0, 9.5, float("nan")):
        with pytest.raises(ValueError, match="budget must be above 1"):
            split_budget(budget)
    model = tiny_model("mixtral")
    moe = describe(model)
    originals, before = Originals(moe), snapshot(model)
    bits = quantize_weights_with_outliers(moe, random_windows(), 2.5, originals, PLAIN)
    assert 2.49 < bits <= 2.5
    touched = changed(before, model)
    assert {n for n in touched if "experts" in n} == {n for n in before if "experts" in n}
    assert not any(n.endswith(("gate.weight", "norm.weight")) for n in touched)
    # a two-bit group with outliers holds more than four values
    assert len(model.model.layers[0].mlp.experts.down_proj[0, 0, :32].unique()) <= 4 + 4


def test_bad_options() -> None:
    with pytest.raises(ValueError, match=r"affinity must be an exponent in 0\.\.4, got -1"):
        MethodConfig(affinity=-1)
    with pytest.raises(ValueError, match="method must be one of gemq, pmq, uniform, global-pmq, two-step, fisher"):
        MethodConfig(method="spqr")


def test_fisher_and_output_gradients_agree_on_which_experts_matter() -> None:
    """Two estimates of one thing: on a model they rank experts alike, though they are not the same numbers."""
    moe, windows = describe(tiny_model("mixtral")), random_windows(12)
    originals = Originals(moe)
    one = measure(moe, windows, (1, 2, 3), originals, perturbation=RTN).costs.routed.flatten()
    two = weight_fisher(moe, windows, (1, 2, 3), originals, perturbation=RTN).routed.flatten()
    ranks = [np.argsort(np.argsort(v)) for v in (one, two)]
    assert np.corrcoef(*ranks)[0, 1] > 0.7 and not np.allclose(one, two)


def test_the_reference_of_a_replay_is_untouched() -> None:
    reference, moe = quantized_twin()
    before = copy.deepcopy(reference.model.state_dict())
    with replayed_routing(moe, reference), torch.no_grad():
        moe.model(input_ids=random_windows(1))
    assert not changed(before, reference.model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for mo in (moe, reference) for m in mo.model.modules())


@pytest.mark.parametrize("method", ["global-pmq", "two-step", "fisher"])
def test_methods_on_the_command_line(method, model_folder, text_file, tmp_path) -> None:
    from gemq.cli.run import run
    from gemq.summary import summarize

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
    assert run(["quantize", str(model_folder), "-o", str(tmp_path / "no"), "--affinity", "1"]) == 2
    assert not list(tmp_path.glob("no*"))


@pytest.mark.parametrize("options, named", [
    ({"method": "fisher"}, "method 'fisher'"),
    ({"router_method": "alignment", "affinity": 1.0}, "router_method 'alignment', affinity"),
])  # fmt: skip
def test_what_needs_the_whole_model_does_not_stream(options, named, model_folder, tmp_path) -> None:
    config = QuantizeConfig(str(model_folder), str(tmp_path / "no"), method=MethodConfig(**options))
    with pytest.raises(ValueError, match=f"{named}: not with one layer at a time; give --no-stream"):
        quantize(config)
    assert not list(tmp_path.iterdir())


def test_what_needs_the_whole_model_is_not_shared_out(monkeypatch) -> None:
    from gemq import distributed

    monkeypatch.setattr(distributed, "world", lambda: distributed.World(0, 2))
    with pytest.raises(ValueError, match="method 'fisher': not with several processes, got 2"):
        next(quantize_progressively(describe(tiny_model("mixtral")), random_windows(2), MethodConfig(method="fisher")))


@pytest.mark.parametrize("method", ["global-pmq", "two-step"])
def test_streamed_methods_choose_the_same_widths(method, model_folder, text_file, tmp_path) -> None:
    from gemq.summary import summarize

    found = []
    for stream in (True, False):
        target = tmp_path / str(stream)
        chosen = MethodConfig(budgets=(2.0,), method=method, per_layer="none", tune=False, **FAST)
        quantize(QuantizeConfig(str(model_folder), str(target), str(text_file), 2, 32, stream=stream, method=chosen))
        found.append(summarize(target).config.expert_bits)
    assert found[0] == found[1]


def test_the_plan_knows_what_the_fisher_information_takes() -> None:
    from gemq.planning.memory import Work, in_memory
    from gemq.planning.parts import count_parts

    parts = count_parts(describe(tiny_model("mixtral")))

    def needs(method: str) -> dict:
        return in_memory(parts, Work(4, 16, MethodConfig(method=method), 4, True), 0)["measure"].host

    assert needs("fisher")["Fisher information"] == parts.quantizable * 8
    assert "Fisher information" not in needs("gemq")
