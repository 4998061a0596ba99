"""Router tuning, sequential quantization and the progression over budgets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import random_windows, tiny_model

from gemq.algorithms.gptq import GptqConfig
from gemq.algorithms.importance import measure
from gemq.algorithms.layerwise import capture_layer_calls, run_layer
from gemq.algorithms.originals import Originals
from gemq.algorithms.perplexity import perplexity, token_losses
from gemq.algorithms.progressive import MethodConfig, quantize_progressively
from gemq.algorithms.router_tuning import RouterTuningConfig, tune_routers
from gemq.algorithms.sequential import BitPlan, quantize_weights
from gemq.models import describe
from gemq.reference.grid import dequantize_codes


def snapshot(model) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def changed(before: dict, model) -> set[str]:
    return {k for k, v in model.state_dict().items() if not torch.equal(before[k], v)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_routers_move_and_the_loss_falls(dtype: torch.dtype) -> None:
    model = tiny_model("mixtral").to(dtype)
    moe, windows = describe(model), random_windows(8)
    before = snapshot(model)
    losses = tune_routers(moe, windows, RouterTuningConfig(learning_rate=3e-3, epochs=6))
    assert changed(before, model) == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    assert len(losses) == 48 and np.mean(losses[-8:]) < np.mean(losses[:8])
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_small_steps_move_bfloat16_routers() -> None:
    """At 1e-4 a bfloat16 weight of 0.5 would never move; float32 masters add the steps up."""
    model = tiny_model("mixtral").to(torch.bfloat16)
    moe = describe(model)
    before = [p.detach().clone() for p in moe.routers]
    tune_routers(moe, random_windows(8), RouterTuningConfig(learning_rate=1e-4, epochs=12))
    share = [float((p != b).float().mean()) for p, b in zip(moe.routers, before, strict=True)]
    assert min(share) > 0.3


def test_running_layer_by_layer_is_running_the_model() -> None:
    for family in ("mixtral", "deepseek_v2"):
        model = tiny_model(family)
        moe, windows = describe(model), random_windows(3)
        with torch.no_grad():
            calls = capture_layer_calls(moe, list(windows.split(2)))
            states = calls.hidden
            for index, layer in enumerate(moe.layers):
                states = [run_layer(layer, h, kw[index]) for h, kw in zip(states, calls.kwargs, strict=True)]
            expected = model(input_ids=windows).logits
            found = model.lm_head(moe.decoder.norm(torch.cat(states)))
        torch.testing.assert_close(found, expected)
        assert "forward" not in vars(moe.layers[0])


def test_quantized_weights_are_what_the_model_holds() -> None:
    model = tiny_model("deepseek_v2")
    moe = describe(model)
    originals = Originals(moe)
    before = snapshot(model)
    plan = BitPlan({1: [0, 1, 2, 3], 2: [4, 8, 1, 2]}, {1: 3, 2: 16}, attention=4, dense=16)
    result = quantize_weights(moe, random_windows(), plan, originals, GptqConfig(group_size=64))
    for layer in moe.moe:
        for name, stack in zip(("gate_up_proj", "down_proj"), result.stacks[layer.index], strict=True):
            for e, width in enumerate(plan.experts[layer.index]):
                held = getattr(layer.experts, name)[e]
                if width == 0:
                    assert stack.codes[e] is None and not held.any()
                else:
                    assert torch.equal(held, dequantize_codes(stack.codes[e], stack.meta[e]))
    touched = changed(before, model)
    assert not any("layers.0.mlp" in k for k in touched), "dense MLPs were to stay"
    assert not any("layers.2.mlp.shared" in k for k in touched), "16 leaves a shared expert alone"
    assert any("layers.1.mlp.shared" in k for k in touched) and any("self_attn" in k for k in touched)
    assert not any(k.endswith(("norm.weight", "gate.weight", "embed_tokens.weight")) for k in touched)
    originals.restore()
    assert not changed(before, model)


def test_later_layers_are_calibrated_on_quantized_ones() -> None:
    """Changing only the first layer's width must change the second layer's codes."""
    moe = describe(tiny_model("mixtral"))
    originals, windows = Originals(moe), random_windows()
    second = []
    for width in (1, 8):
        plan = BitPlan({0: [width] * 4, 1: [2] * 4}, attention=16, dense=16)
        second.append(quantize_weights(moe, windows, plan, originals).stacks[1][0].codes)
    assert any(not torch.equal(a, b) for a, b in zip(*second, strict=True))


def test_progression_visits_falling_budgets_and_meets_them() -> None:
    moe = describe(tiny_model("mixtral"))
    seen = []
    stages = []
    config = MethodConfig(budgets=(2.0, 2.5, 2.25))
    for stage in quantize_progressively(moe, random_windows(), config, progress=lambda *a: seen.append(a)):
        stages.append(stage)
        assert stage.allocation.bits_per_expert <= stage.budget + 1e-9
        assert len(stage.router_losses) == 6
    assert [s.budget for s in stages] == [2.5, 2.25, 2.0]
    assert {s[0] for s in seen} == {"measure", "allocate", "quantize", "tune routers", "compare routers"}
    for row in stages[-1].plan.experts.values():
        assert 3 in row and 2 in row, "each layer keeps a highest and a second-highest expert"


@pytest.mark.parametrize("estimate", ["fp", "quantized", "tuned"])
def test_the_estimate_decides_which_model_is_measured(estimate: str) -> None:
    model = tiny_model("mixtral")
    moe, windows = describe(model), random_windows()
    originals = Originals(moe)
    config = MethodConfig(budgets=(2.25, 2.0), estimate=estimate, router=RouterTuningConfig(learning_rate=1e-2))
    stages, expected = [], []
    for stage in quantize_progressively(moe, windows, config, originals=originals):
        stages.append(stage)
        if not expected:
            tuned = [p.detach().clone() for p in moe.routers]
            if estimate == "quantized":
                quantize_weights(moe, windows, stage.plan, originals, config.gptq, batch_size=4)
            elif estimate == "fp":
                originals.restore()
            expected.append(measure(moe, windows, config.candidates, originals))
            quantize_weights(moe, windows, stage.plan, originals, config.gptq, batch_size=4)
            with torch.no_grad():
                for p, value in zip(moe.routers, tuned, strict=True):
                    p.copy_(value)
    np.testing.assert_allclose(stages[1].statistics.costs.routed, expected[0].costs.routed, rtol=1e-6)


def test_baselines_need_no_or_less() -> None:
    moe = describe(tiny_model("mixtral"))
    uniform = next(iter(quantize_progressively(moe, random_windows(), MethodConfig(method="uniform", tune=False))))
    assert uniform.statistics is None and {b for r in uniform.plan.experts.values() for b in r} == {2, 3}
    pmq = next(iter(quantize_progressively(moe, random_windows(), MethodConfig(method="pmq", tune=False))))
    assert all(sum(row) <= 10 and {2, 3} <= set(row) for row in pmq.plan.experts.values())


def test_more_bits_are_closer_to_the_model() -> None:
    model = tiny_model("mixtral")
    moe, windows = describe(model), random_windows(8)
    originals = Originals(moe)
    with torch.no_grad():
        reference = model(input_ids=windows).logits
    errors = []
    for width in (1, 2, 4, 8):
        plan = BitPlan({0: [width] * 4, 1: [width] * 4}, attention=16)
        quantize_weights(moe, windows, plan, originals)
        with torch.no_grad():
            errors.append(float((model(input_ids=windows).logits - reference).norm() / reference.norm()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.1 * errors[0]


def test_perplexity_is_exp_of_the_token_mean() -> None:
    model, windows = tiny_model("mixtral"), random_windows(5)
    with torch.no_grad():
        logits = model(input_ids=windows).logits[:, :-1].double()
    picked = logits.log_softmax(-1).gather(-1, windows[:, 1:, None])
    assert perplexity(model, windows, batch_size=2) == pytest.approx(float((-picked.mean()).exp()), rel=1e-5)
    assert token_losses(model, windows[:2]).shape == (2, 23)


def test_bad_options_are_refused() -> None:
    for options, text in (
        ({"method": "x"}, "method must be one of gemq, pmq, uniform, global-pmq, two-step, fisher, got 'x'"),
        ({"estimate": "x"}, "estimate must be one of fp, quantized, tuned, got 'x'"),
        ({"budgets": (9.0,)}, "budgets must be bits per expert in 0..8"),
        ({"budgets": (float("nan"),)}, "budgets must be bits per expert in 0..8"),
        ({"attention_bits": 0}, "attention_bits must be 1..8, or 16"),
    ):
        with pytest.raises(ValueError, match=text.replace("(", r"\(")):
            MethodConfig(**options)
    moe = describe(tiny_model("mixtral"))
    with pytest.raises(ValueError, match=r"budget"):
        list(quantize_progressively(moe, random_windows(), MethodConfig(budgets=(0.5,))))
