"""Stand-ins that only the accuracy study uses: balanced and self-sampled text, outliers, replayed routing."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import changed, random_windows, snapshot, tiny_model
from torch import nn

from gemq.algorithms.gptq import GptqConfig, gptq
from gemq.algorithms.method import MethodConfig
from gemq.engine.progression import quantize_progressively
from gemq.engine.source import ResidentSource
from gemq.models import describe
from gemq.reference.grid import dequantize_codes, find_grid, round_to_grid

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "accuracy"))

from balanced_windows import (
    balanced_windows,
    expert_loads,
    imbalance,
    pick_balanced,
    self_sampled_windows,
)
from outliers import outlier_gptq, pick_outliers, quantize_with_outliers, sensitivity, split_budget
from routing import changed_routes, chosen_experts, replayed_routing

# no range search: what is tested here does not depend on it, and it is most of the time
PLAIN = GptqConfig(clip="none")


def quantized_twin(family: str = "mixtral", bits: int = 2):
    """``(full precision, quantized)`` of the same model."""
    reference, method = tiny_model(family), MethodConfig((float(bits),), method="uniform", tune=False, gptq=PLAIN)
    (result,) = quantize_progressively(ResidentSource(reference), random_windows(), method)
    return describe(reference), result.weights.whole()


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
    before = snapshot(model)
    bits = quantize_with_outliers(moe, random_windows(), 2.5, PLAIN)
    assert 2.49 < bits <= 2.5
    touched = changed(before, model)
    assert {n for n in touched if "experts" in n} == {n for n in before if "experts" in n}
    assert not any(n.endswith(("gate.weight", "norm.weight")) for n in touched)
    # a two-bit group with outliers holds more than four values
    assert len(model.model.layers[0].mlp.experts.down_proj[0, 0, :32].unique()) <= 4 + 4


def test_the_reference_of_a_replay_is_untouched() -> None:
    reference, moe = quantized_twin()
    before = copy.deepcopy(reference.model.state_dict())
    with replayed_routing(moe, reference), torch.no_grad():
        moe.model(input_ids=random_windows(1))
    assert not changed(before, reference.model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for mo in (moe, reference) for m in mo.model.modules())
