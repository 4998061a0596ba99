"""Every method on one model of each form that experts, blocks and routers have."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from listed_models import listed_model
from packed_models import relative_error
from test_importance import RTN
from test_listed_families import quantize_expert, shared_costs
from test_methods import FAST, weighted_change
from tiny_models import random_windows, tiny_model
from torch import nn

from gemq.algorithms.fisher import weight_fisher
from gemq.algorithms.layerwise import watch_experts
from gemq.algorithms.method import METHODS, MethodConfig
from gemq.algorithms.router_alignment import routing_divergence
from gemq.algorithms.router_tuning import RouterTuningConfig
from gemq.engine.progression import measure_importance, quantize_progressively
from gemq.engine.source import ResidentSource
from gemq.models import describe, prepare
from gemq.nn.experts import PROJECTIONS
from gemq.reference.importance import expert_calls, expert_cost

FORMS = {
    "fused": lambda: tiny_model("qwen3_moe"),
    "shared": lambda: tiny_model("qwen2_moe"),
    "dense-and-moe": lambda: tiny_model("deepseek_v3"),
    "transposed-biased": lambda: listed_model("gpt_oss"),
    "weighted-inputs": lambda: listed_model("llama4_text"),
    "gateless": lambda: listed_model("nemotron_h"),
    "latent": lambda: listed_model("nemotron_h", moe_latent_size=32),
}
WINDOWS = random_windows(2, 16)
every_form = pytest.mark.parametrize("form", FORMS)


@every_form
def test_every_method_quantizes_it(form: str) -> None:
    source = ResidentSource(FORMS[form]())
    for method in METHODS:
        config = MethodConfig(budgets=(2.5,), method=method, batch_size=2, tune=False, **FAST)
        (result,) = quantize_progressively(source, WINDOWS, config)
        assert result.allocation.bits.shape == (len(source.moe.moe), 4)
        assert result.allocation.bits.mean() <= 2.5 and set(result.allocation.bits.flat) <= {1, 2, 3}
    packed, _ = result.packed()
    prepare(packed)
    with torch.no_grad():
        found, wanted = (m(input_ids=WINDOWS, use_cache=False).logits for m in (packed, result.weights.whole().model))
    assert relative_error(found, wanted) < 2e-3


@every_form
def test_fisher_costs_are_those_of_autograd(form: str) -> None:
    model = FORMS[form]()
    moe = describe(model)
    found = weight_fisher(moe, WINDOWS, (2,), perturbation=RTN)
    routed, shared = np.zeros((len(moe.moe), 4)), np.zeros(len(moe.moe))
    for window in WINDOWS:
        model.zero_grad()
        ids = window[None]
        nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1].float(), ids[0, 1:]).backward()
        for row, layer in enumerate(moe.moe):
            for name, stack in zip(PROJECTIONS, layer.form.weights(layer.experts), strict=True):
                weight, gradient = (layer.form.standard(name, t) for t in (stack.detach(), stack.grad))
                routed[row] += [weighted_change(gradient[e], weight[e].contiguous(), 2) for e in range(4)]
            for linear in layer.shared_linears().values():
                shared[row] += weighted_change(linear.weight.grad, linear.weight.detach(), 2)
    np.testing.assert_allclose(found.routed[..., 0], routed, rtol=2e-4, atol=1e-14)
    if found.shared is not None:
        np.testing.assert_allclose(found.shared[:, 0], shared, rtol=2e-4, atol=1e-14)


@torch.no_grad()
def test_weighted_inputs_are_seen_as_calls_by_ids() -> None:
    model = listed_model("llama4_text")
    layer, seen, given = describe(model).moe[0], [], []
    handle = layer.router.register_forward_hook(lambda module, args, output: given.append((args[0], output[0])))
    with watch_experts(layer, lambda routed, _: seen.append(routed)):
        model(input_ids=WINDOWS)
    handle.remove()
    ((x, scores),), (routed,) = given, seen
    assert len(routed.x) == WINDOWS.numel() and (routed.weights == 1).all()
    for expert in range(4):
        chosen = scores[:, expert] > 0
        torch.testing.assert_close(routed.rows(expert)[0], (x * scores[:, expert, None])[chosen])


def test_costs_beside_a_latent_width_are_those_of_autograd() -> None:
    """The shared expert works in the block's width, the routed ones in another."""
    model = FORMS["latent"]().requires_grad_(False)
    moe = describe(model)
    found = measure_importance(ResidentSource(model), WINDOWS, (2,), perturbation=RTN, batch_size=2).costs
    for row, layer in enumerate(moe.moe):
        calls = expert_calls(model, [layer.experts], WINDOWS)
        for expert in range(4):
            before, after = quantize_expert(layer, expert)
            expected = sum(expert_cost(call, expert, before, after) for call in calls)
            assert found.routed[row, expert, 0] == pytest.approx(expected, rel=1e-3, abs=1e-16)
        assert found.shared[row, 0] == pytest.approx(shared_costs(model, layer, WINDOWS), rel=1e-3)


@torch.no_grad()
def own_logits(model: nn.Module) -> list[torch.Tensor]:
    """Logits of gpt-oss's routers, ``[T, E]`` by layer."""
    seen: list[torch.Tensor] = []
    handles = [layer.router.register_forward_hook(lambda module, args, output: seen.append(output[0]))
               for layer in describe(model).moe]
    model(input_ids=WINDOWS)
    for handle in handles:
        handle.remove()
    return seen


def test_a_routers_bias_is_part_of_what_is_aligned() -> None:
    model = listed_model("gpt_oss")
    for layer in describe(model).moe:
        nn.init.normal_(layer.router.bias, 0, 2)
    options = MethodConfig(
        budgets=(2.0,), method="uniform", router_method="alignment", batch_size=1,
        router=RouterTuningConfig(learning_rate=1e-2, epochs=4), **FAST,
    )
    (result,) = quantize_progressively(ResidentSource(model), WINDOWS, options)
    (plain,) = quantize_progressively(ResidentSource(model), WINDOWS, replace(options, tune=False))
    targets, after, before = (own_logits(m) for m in (model, result.weights.whole().model, plain.weights.whole().model))
    for target, one, two, told in zip(targets, before, after, result.router_losses, strict=True):
        # what it reports is what the family's own forward does
        assert float(routing_divergence(target, two)) == pytest.approx(told, rel=1e-3)
        assert told < 0.9 * float(routing_divergence(target, one))
