"""Router tuning, sequential quantization and the progression over budgets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_models import changed, random_windows, snapshot, tiny_model

from gemq.algorithms.given_allocation import GivenAllocation
from gemq.algorithms.gptq import GptqConfig
from gemq.algorithms.layerwise import capture_layer_calls, expert_hidden, run_layer
from gemq.algorithms.method import MethodConfig
from gemq.algorithms.perplexity import perplexity, token_losses
from gemq.algorithms.router_tuning import RouterTuningConfig, tune_routers
from gemq.engine.layers import Weights
from gemq.engine.progression import quantize_progressively
from gemq.engine.source import ResidentSource
from gemq.format import default_group_size
from gemq.models import describe
from gemq.reference.grid import dequantize_codes, round_to_nearest
from gemq.reference.importance import expert_calls, expert_cost


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


def given(experts: dict[int, list[int]], shared: dict[int, int] | None = None, **options) -> MethodConfig:
    """A method that gives experts these widths by decoder layer, and leaves the rest as it is unless told."""
    rows, kept = tuple(map(tuple, experts.values())), None if shared is None else tuple(shared.values())
    return MethodConfig(
        budgets=(8.0,), given=GivenAllocation("here", rows, shared=kept),
        **{"tune": False, "attention_bits": 16, "dense_bits": 16} | options,
    )


def test_the_model_stays_and_the_result_is_what_the_record_holds() -> None:
    model = tiny_model("deepseek_v2")
    before = snapshot(model)
    widths = {1: [0, 1, 2, 3], 2: [4, 8, 1, 2]}
    method = given(widths, {1: 3, 2: 16}, attention_bits=4, gptq=GptqConfig(group_size=64))
    (result,) = quantize_progressively(ResidentSource(model), random_windows(), method)
    assert not changed(before, model)
    whole = result.weights.whole()
    for layer in whole.moe:
        packed = result.quantized.record(layer.index).modules[f"{layer.path}.experts"]
        for name in ("gate_up_proj", "down_proj"):
            held = getattr(layer.experts, name)
            assert packed.bits[name] == widths[layer.index] and torch.equal(held, packed.dense(name))
            assert not any(held[e].any() for e, width in enumerate(widths[layer.index]) if not width)
    touched = changed(before, whole.model)
    assert not any("layers.0.mlp" in k for k in touched), "dense MLPs were to stay"
    assert not any("layers.2.mlp.shared" in k for k in touched), "16 leaves a shared expert alone"
    assert any("layers.1.mlp.shared" in k for k in touched) and any("self_attn" in k for k in touched)
    assert not any(k.endswith(("norm.weight", "gate.weight", "embed_tokens.weight")) for k in touched)


def test_later_layers_are_calibrated_on_quantized_ones() -> None:
    """Changing only the first layer's width must change the second layer's codes."""
    source, second = ResidentSource(tiny_model("mixtral")), []
    for width in (1, 8):
        (result,) = quantize_progressively(source, random_windows(), given({0: [width] * 4, 1: [2] * 4}))
        module = result.quantized.record(1).modules["model.layers.1.mlp.experts"]
        second.append(module.dense("gate_up_proj"))
    assert not torch.equal(*second)


def test_progression_visits_falling_budgets_and_meets_them() -> None:
    source = ResidentSource(tiny_model("mixtral"))
    seen = []
    stages = []
    config = MethodConfig(budgets=(2.0, 2.5, 2.25), per_layer="c2c3")
    for stage in quantize_progressively(source, random_windows(), config, progress=lambda *a: seen.append(a)):
        stages.append(stage)
        assert stage.allocation.bits_per_expert <= stage.budget + 1e-9
        assert len(stage.router_losses) == 6
    assert [s.budget for s in stages] == [2.5, 2.25, 2.0]
    assert {s[0] for s in seen} == {"measure", "allocate", "quantize", "tune routers", "compare routers"}
    for row in stages[-1].widths.experts.values():
        assert 3 in row and 2 in row, "each layer keeps a highest and a second-highest expert"


@pytest.mark.parametrize("estimate", ["fp", "quantized", "tuned"])
def test_the_estimate_decides_which_model_is_measured(estimate: str) -> None:
    """The second budget's costs are those of the oracle: plain autograd on the model that the estimate names, the
    originals perturbed."""
    model, windows = tiny_model("mixtral"), random_windows()
    config = MethodConfig(
        budgets=(2.25, 2.0), estimate=estimate, router=RouterTuningConfig(learning_rate=1e-2), perturbation="rtn"
    )
    first, second = quantize_progressively(ResidentSource(model), windows, config)
    weights = first.weights if estimate == "tuned" else Weights(first.quantized.source, first.quantized.record)
    measured = describe(model) if estimate == "fp" else weights.whole()
    found = second.statistics.costs
    calls = expert_calls(measured.model, [layer.experts for layer in measured.moe], windows)
    for row, (layer, call) in enumerate(zip(describe(model).moe, calls, strict=True)):
        for e in range(4):
            base = layer.experts.gate_up_proj[e].detach(), layer.experts.down_proj[e].detach()
            for column, bits in enumerate(config.candidates):
                rounded = [dequantize_codes(*round_to_nearest(w, bits, default_group_size(w.shape[-1]))) for w in base]
                cost = expert_cost(
                    call, e, lambda x, w=base: expert_hidden(w[0], x) @ w[1].T,
                    lambda x, w=rounded: expert_hidden(w[0], x) @ w[1].T,
                )
                assert found.routed[row, e, column] == pytest.approx(cost, rel=1e-3, abs=1e-16)


def test_baselines_need_no_or_less() -> None:
    source = ResidentSource(tiny_model("mixtral"))
    (uniform,) = quantize_progressively(source, random_windows(), MethodConfig(method="uniform", tune=False))
    assert uniform.statistics is None and {b for r in uniform.widths.experts.values() for b in r} == {2, 3}
    (pmq,) = quantize_progressively(source, random_windows(), MethodConfig(method="pmq", tune=False))
    assert all(sum(row) <= 10 and {2, 3} <= set(row) for row in pmq.widths.experts.values())


def test_more_bits_are_closer_to_the_model() -> None:
    model, windows = tiny_model("mixtral"), random_windows(8)
    source, errors = ResidentSource(model), []
    with torch.no_grad():
        reference = model(input_ids=windows).logits
        for width in (1, 2, 4, 8):
            (result,) = quantize_progressively(source, windows, given({0: [width] * 4, 1: [width] * 4}))
            found = result.weights.whole().model(input_ids=windows).logits
            errors.append(float((found - reference).norm() / reference.norm()))
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
    with pytest.raises(ValueError, match=r"budget"):
        list(quantize_progressively(
            ResidentSource(tiny_model("mixtral")), random_windows(), MethodConfig(budgets=(0.5,))
        ))
