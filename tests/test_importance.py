"""Eq. 6 against full autograd through whole blocks, on every family."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, random_windows, tiny_model
from torch import nn

from gemq.algorithms.gptq import GptqConfig, gptq
from gemq.algorithms.layerwise import expert_hidden
from gemq.algorithms.perturbation import Perturbation
from gemq.engine.progression import measure_importance as measure
from gemq.engine.source import ResidentSource
from gemq.format import default_group_size
from gemq.models import describe
from gemq.reference.grid import dequantize_codes, round_to_nearest

CANDIDATES = (0, 1, 2, 3, 8)
RTN = Perturbation("rtn")


def perturbed(weight: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 0:
        return torch.zeros_like(weight)
    return dequantize_codes(*round_to_nearest(weight, bits, default_group_size(weight.shape[-1])))


def block_outputs_and_gradients(model, moe, windows):
    """Per layer the inputs, outputs and output gradients of the whole MoE block, one window at a time."""
    records = {layer.index: [] for layer in moe.moe}
    handles = []
    for layer in moe.moe:

        def hook(module, args, output, index=layer.index):
            output.retain_grad()
            records[index].append((args[0].detach(), output))

        handles.append(layer.block.register_forward_hook(hook))
    for window in windows:
        ids = window[None]
        logits = model(input_ids=ids).logits[:, :-1].float()
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for handle in handles:
        handle.remove()
    return records


def swap(layer, expert: int | str, bits: int, parts: tuple[int, ...] = (0, 1)):
    """Quantize one expert (or the shared one) of a block in place, or of its gate and up (0) and down (1) projections
    one; returns the undo."""
    if expert == "shared":
        modules = [layer.shared.gate_proj, layer.shared.up_proj, layer.shared.down_proj]
        saved = [m.weight.detach().clone() for m in modules]
        for m in modules:
            m.weight.data = perturbed(m.weight.data, bits)
        return lambda: [setattr(m.weight, "data", s) for m, s in zip(modules, saved, strict=True)]
    saved = (layer.experts.gate_up_proj.detach().clone(), layer.experts.down_proj.detach().clone())
    for part in parts:
        (layer.experts.gate_up_proj, layer.experts.down_proj)[part].data[expert] = perturbed(saved[part][expert], bits)

    def undo():
        layer.experts.gate_up_proj.data, layer.experts.down_proj.data = saved

    return undo


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_equal_running_every_perturbed_block(family: str) -> None:
    model = tiny_model(family)
    moe = describe(model)
    windows = random_windows(5, 16)
    found = measure(ResidentSource(model), windows, CANDIDATES, perturbation=RTN, batch_size=2, matrices=True)
    records = block_outputs_and_gradients(model, moe, windows)
    with torch.no_grad():
        for row, layer in enumerate(moe.moe):
            experts = [*range(moe.num_experts), *(["shared"] if layer.shared is not None else [])]
            for expert in experts:
                for column, bits in enumerate(CANDIDATES):
                    undo = swap(layer, expert, bits)
                    expected, norm = 0.0, 0.0
                    for x, out in records[layer.index]:
                        delta = out - layer.block(x)
                        expected += float((out.grad * delta).double().square().sum())
                        norm += float(delta.double().norm())
                    undo()
                    if expert == "shared":
                        assert found.costs.shared[row, column] == pytest.approx(expected, rel=1e-3, abs=1e-16)
                    else:
                        assert found.costs.routed[row, expert, column] == pytest.approx(expected, rel=1e-3, abs=1e-16)
                        assert found.error[row, expert, column] == pytest.approx(norm, rel=1e-3, abs=1e-7)
                    for part in () if expert == "shared" else (0, 1):
                        undo = swap(layer, expert, bits, (part,))
                        changes = [(out.grad * (out - layer.block(x))).double() for x, out in records[layer.index]]
                        undo()
                        expected = sum(float(change.square().sum()) for change in changes)
                        alone = found.costs.matrices[row, expert, part, column]
                        assert alone == pytest.approx(expected, rel=1e-3, abs=1e-16)


def test_matrices_are_measured_if_they_are_asked_for() -> None:
    moe = describe(tiny_model("qwen2_moe"))
    windows, source = random_windows(4, 16), ResidentSource(moe.model)
    one, both = (measure(source, windows, (1, 2), perturbation=RTN, matrices=m) for m in (False, True))
    assert one.costs.matrices is None and both.costs.matrices.shape == (2, moe.num_experts, 2, 2)
    np.testing.assert_array_equal(one.costs.routed, both.costs.routed)
    np.testing.assert_array_equal(one.costs.shared, both.costs.shared)


def test_the_batch_size_does_not_matter() -> None:
    windows, source = random_windows(6, 16), ResidentSource(tiny_model("mixtral"))
    one, all_at_once = (measure(source, windows, (1, 2, 3), perturbation=RTN, batch_size=b) for b in (1, 6))
    for name in ("frequency", "weight", "error"):
        np.testing.assert_allclose(getattr(one, name), getattr(all_at_once, name), rtol=1e-4)
    np.testing.assert_allclose(one.costs.routed, all_at_once.costs.routed, rtol=1e-3)


def test_frequency_and_weight_are_shares_of_tokens() -> None:
    moe = describe(tiny_model("mixtral"))
    found = measure(ResidentSource(moe.model), random_windows(), (1, 2))
    np.testing.assert_allclose(found.frequency.sum(1), moe.top_k)
    np.testing.assert_allclose(found.weight.sum(1), 1.0, rtol=1e-5)


def test_measuring_leaves_the_model_as_it_was() -> None:
    model = tiny_model("qwen2_moe").train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    required = [p.requires_grad for p in model.parameters()]
    measure(ResidentSource(model), random_windows(2), (1, 2))
    assert model.training and required == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_gptq_perturbation_is_gptq_on_the_experts_own_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    gate_up, down = torch.randn(64, 32, generator=generator) * 0.1, torch.randn(32, 32, generator=generator) * 0.1
    x, config = torch.randn(50, 32, generator=generator), GptqConfig(group_size=32)
    found = Perturbation("gptq", config).expert(gate_up, down, (0, 1, 3), [x])
    assert not found[0][0].any() and not found[0][1].any()
    for bits, (first, second) in zip((1, 3), found[1:], strict=True):
        for weight, inputs, result in ((gate_up, x, first), (down, expert_hidden(gate_up, x), second)):
            plain = replace(config, refine=0, rescale=False)
            codes, meta, _ = gptq(weight[None], (inputs.T @ inputs)[None], [bits], [50], plain, 32)
            torch.testing.assert_close(result, dequantize_codes(codes[0], meta[0]))


def test_an_unused_expert_costs_nothing_at_any_width() -> None:
    source = ResidentSource(tiny_model("mixtral"))

    def never_expert_3(module, args, output):
        logits, weights, ids = output
        return logits, weights, torch.where(ids == 3, 2, ids)

    source.moe.moe[0].block.gate.register_forward_hook(never_expert_3)
    found = measure(source, random_windows(), (1, 2, 3))
    assert (found.costs.routed[0, 3] == 0).all() and found.frequency[0, 3] == 0
