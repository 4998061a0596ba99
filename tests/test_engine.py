"""The streaming engine gives what the method gives with the whole model in memory, with one layer loaded at a time."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_engine_files import FAST
from tiny_models import FAMILIES, random_windows, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import gemq
from gemq.algorithms.importance import Perturbation, measure
from gemq.algorithms.originals import Originals
from gemq.algorithms.progressive import MethodConfig, quantize_progressively
from gemq.engine import stages
from gemq.engine.journal import opened
from gemq.engine.layers import Weights
from gemq.engine.run import Engine
from gemq.engine.source import OUTSIDE, Source
from gemq.errors import CheckpointError
from gemq.integrity import INDEX_FILE, WEIGHTS_FILE, read_header
from gemq.models import describe
from gemq.nn import LowBitExperts
from gemq.pipeline import QuantizeConfig

WINDOWS = random_windows(5, 16)
# coefficients by rounding: GPTQ's Hessians are summed in another order in memory
METHOD = MethodConfig(budgets=(2.0,), perturbation="rtn", per_layer="none", router_bits=8, batch_size=2)


def saved(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny model as a hub checkpoint has it: 16 bits, an expert's matrices on their own."""
    tiny_model(family).to(dtype).save_pretrained(folder)
    return folder


def open_source(folder: Path) -> Source:
    return Source(str(folder), AutoConfig.from_pretrained(folder), torch.float32, torch.device("cpu"))


def in_memory(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def streamed(folder: Path, work: Path, method: MethodConfig, on_disk: bool = True) -> list:
    """Results of the engine, their quantized layers read back."""
    found = []
    with opened(work, {"test": 1}, on_disk=on_disk) as run:
        engine = Engine(lambda: open_source(folder), run, "model", WINDOWS, WINDOWS, method)
        for result in engine.results():
            layers = [result.quantized.record(i).modules for i in range(result.quantized.layers)]
            found.append((result, {path: module for modules in layers for path, module in modules.items()}))
    return found


def assert_same(memory, routers: list, result, modules: dict, moe) -> None:
    """Coefficients, widths, packed bytes and routers of one budget."""
    np.testing.assert_allclose(result.statistics.costs.routed, memory.statistics.costs.routed, rtol=1e-6)
    np.testing.assert_allclose(result.statistics.error, memory.statistics.error, rtol=1e-6)
    np.testing.assert_array_equal(result.statistics.frequency, memory.statistics.frequency)
    np.testing.assert_allclose(result.statistics.weight, memory.statistics.weight, rtol=1e-6)
    matrices = [s.costs.matrices for s in (result.statistics, memory.statistics)]
    np.testing.assert_allclose(*matrices, rtol=1e-6)
    if memory.statistics.costs.shared is not None:
        np.testing.assert_allclose(result.statistics.costs.shared, memory.statistics.costs.shared, rtol=1e-6)
    np.testing.assert_array_equal(result.allocation.bits, memory.allocation.bits)
    np.testing.assert_array_equal(result.allocation.down_bits, memory.allocation.down_bits)
    for layer in moe.moe:
        expected = LowBitExperts.from_stacks(*memory.weights.stacks[layer.index], moe.hidden, moe.intermediate, 128)
        for name, buffer in expected.named_buffers():
            assert torch.equal(buffer, getattr(modules[f"{layer.path}.experts"], name)), (layer.path, name)
    assert set(modules) == {f"{m.path}.experts" for m in moe.moe} | set(memory.weights.linears)
    np.testing.assert_allclose(result.router_losses, memory.router_losses, rtol=1e-5)
    for found, expected in zip(result.routers.values(), routers, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert list(result.reports) == list(memory.weights.reports)
    for name, report in memory.weights.reports.items():
        found = asdict(result.reports[name])
        assert found.pop("fallback") == report.fallback, name
        assert found == pytest.approx({k: getattr(report, k) for k in found}, rel=1e-3), name


@pytest.mark.parametrize("family", FAMILIES)
def test_it_equals_the_method_in_memory(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / "model")
    # the second budget is measured on the model that the first one quantized and tuned
    method = replace(METHOD, budgets=(2.0, 1.5)) if family in ("mixtral", "deepseek_v2") else METHOD
    moe = describe(in_memory(folder))
    expected = []
    for stage in quantize_progressively(moe, WINDOWS, method):
        expected.append((stage, [p.detach().clone() for p in moe.routers]))
    for (memory, routers), (result, modules) in zip(
        expected, streamed(folder, tmp_path / "run", method), strict=True
    ):
        assert_same(memory, routers, result, modules, moe)


def test_gptq_coefficients_are_those_of_memory_up_to_the_order_of_sums(tmp_path: Path) -> None:
    folder = saved("qwen2_moe", tmp_path / "model")
    moe = describe(in_memory(folder))
    gptq = Perturbation("gptq")
    expected = measure(moe, WINDOWS, (1, 2, 4), Originals(moe), perturbation=gptq, batch_size=2, matrices=True)
    method = replace(METHOD, perturbation="gptq", candidates=(1, 2, 4), tune=False, router_bits=16)
    ((result, _),) = streamed(folder, tmp_path / "run", method)
    # a sum in another order may move a code by one
    np.testing.assert_allclose(result.statistics.costs.routed, expected.costs.routed, rtol=0.02)
    np.testing.assert_allclose(result.statistics.costs.shared, expected.costs.shared, rtol=0.02)
    np.testing.assert_allclose(result.statistics.costs.matrices, expected.costs.matrices, rtol=0.1)


def test_coefficients_with_a_candidate_of_no_bits(tmp_path: Path) -> None:
    folder = saved("qwen2_moe", tmp_path / "model")
    moe = describe(in_memory(folder))
    expected = measure(moe, WINDOWS, (0, 1, 2), Originals(moe), perturbation=Perturbation("rtn"), batch_size=2)
    method = replace(METHOD, candidates=(0, 1, 2), budgets=(1.5,), tune=False, router_bits=16)
    ((result, _),) = streamed(folder, tmp_path / "run", method)
    np.testing.assert_allclose(result.statistics.costs.routed, expected.costs.routed, rtol=1e-6)
    np.testing.assert_allclose(result.statistics.costs.shared, expected.costs.shared, rtol=1e-6)
    assert result.statistics.costs.matrices is None and result.allocation.down_bits is None


def packed_bytes_of(found: list) -> list:
    return [
        (path, name, bytes(buffer.view(torch.uint8).numpy()))
        for _, modules in found for path, module in modules.items() for name, buffer in module.named_buffers()
    ]


def test_groups_of_experts_and_the_place_of_scratch_change_no_byte(tmp_path: Path, monkeypatch) -> None:
    folder = saved("mixtral", tmp_path / "model")
    method = replace(METHOD, perturbation="gptq", tune=False)
    base = streamed(folder, tmp_path / "a", method)
    in_ram = streamed(folder, tmp_path / "b", method, on_disk=False)
    assert not list((tmp_path / "b" / "scratch").rglob("*.bin"))
    monkeypatch.setattr("gemq.engine.run.group_budget", lambda source: 1)
    one_by_one = streamed(folder, tmp_path / "c", method)
    for other in (in_ram, one_by_one):
        assert packed_bytes_of(other) == packed_bytes_of(base)
        for name in ("routed", "matrices"):
            one, two = (getattr(run[0][0].statistics.costs, name) for run in (other, base))
            np.testing.assert_array_equal(one, two)


def test_one_decoder_layer_is_loaded_at_a_time(tmp_path: Path, monkeypatch) -> None:
    folder = saved("mixtral", tmp_path / "model")
    most, load = [], Source.load

    def counting(self, unit, without=()):
        load(self, unit, without)
        # the first parameters of a layer, its attention's, are quantized: a record's norm is read from the model
        layers = [n for n, layer in enumerate(self.moe.layers) if not layer.input_layernorm.weight.is_meta]
        most.append(len(layers))
        assert layers == [unit] or (unit == OUTSIDE and not layers)

    monkeypatch.setattr(Source, "load", counting)
    streamed(folder, tmp_path / "run", replace(METHOD, router_bits=8))
    assert max(most) == 1 and len(most) > 8


# the source


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_source_reads_what_transformers_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = saved("deepseek_v3", tmp_path, dtype)
    names = read_header(folder / WEIGHTS_FILE)
    assert any(".experts.0." in name for name in names), "the checkpoint should hold per-expert matrices"
    source, expected = open_source(folder), in_memory(folder)
    for _ in range(2):
        for unit in range(OUTSIDE, len(source.moe.layers)):
            source.load(unit)
        state, wanted = source.model.state_dict(), expected.state_dict()
        assert list(state) == list(wanted)
        # experts stay as they are stored until they are used
        kept = {k: dtype if ".experts." in k else wanted[k].dtype for k in wanted}
        assert all(torch.equal(state[k].to(wanted[k].dtype), wanted[k]) and state[k].dtype == kept[k] for k in wanted)
        with torch.no_grad():
            assert torch.equal(source.model(WINDOWS).logits, expected(WINDOWS).logits)
        for unit in range(OUTSIDE, len(source.moe.layers)):
            source.drop(unit)
        assert all(p.is_meta for p in source.model.parameters())


def test_a_source_reads_tied_embeddings(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in read_header(tmp_path / WEIGHTS_FILE)
    source = open_source(tmp_path)
    source.load(OUTSIDE)
    assert source.model.lm_head.weight is source.model.model.embed_tokens.weight
    source.drop(OUTSIDE)
    assert source.model.lm_head.weight.is_meta


def test_a_source_refuses_missing_and_misshapen_weights(tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path)
    tensors = load_file(folder / WEIGHTS_FILE)
    name = next(n for n in tensors if "layers.1" in n and "q_proj" in n)
    save_file({k: v for k, v in tensors.items() if k != name}, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"lacks weights of the model: model.layers.1.self_attn.q_proj.weight"):
        open_source(folder)
    save_file(tensors | {name: torch.zeros(3, 5)}, folder / WEIGHTS_FILE)
    with pytest.raises(CheckpointError, match=r"does not fit its config: model.layers.1.self_attn.q_proj.weight"):
        open_source(folder)
    os.truncate(folder / WEIGHTS_FILE, 5000)
    with pytest.raises(CheckpointError, match="truncated"):
        open_source(folder)


def test_gradients_do_not_need_the_layers_below_the_first_experts(tmp_path: Path) -> None:
    """DeepSeek's first layer is dense: its inputs are never recomputed in the reverse sweep."""
    folder = saved("deepseek_v2", tmp_path / "model")
    seen = []
    with opened(tmp_path / "run", {}) as run:
        source = open_source(folder)
        sweep = stages.Sweep(
            WINDOWS, 2, run.stage("measure"), lambda done, total: seen.append((done, total)),
            lambda **event: None, 1 << 30,
        )
        stages.measure(Weights(source), sweep, (1, 2), Perturbation("rtn"))
    # three layers forward, the head, two backward
    assert seen[-1] == (5, 6) and {total for _, total in seen[-2:]} == {6}


# the checkpoint


def test_the_checkpoint_is_byte_for_byte_that_of_memory(tiny_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gemq.checkpoint.save_packed.__kwdefaults__", {
        **gemq.checkpoint.save_packed.__kwdefaults__, "max_shard_size": "40KB"
    })
    monkeypatch.setattr("gemq.engine.assemble.MAX_SHARD", "40KB")
    config = QuantizeConfig(**tiny_folder, output="out", method=replace(FAST, perturbation="rtn"))
    folders = []
    for stream in (True, False):
        gemq.quantize(replace(config, stream=stream))
        folders.append((tmp_path / "out").rename(tmp_path / f"stream-{stream}"))
    files = sorted(p.name for p in folders[0].iterdir())
    assert files == sorted(p.name for p in folders[1].iterdir())
    assert INDEX_FILE in files and len([f for f in files if f.endswith(".safetensors")]) > 2
    different = [f for f in files if (folders[0] / f).read_bytes() != (folders[1] / f).read_bytes()]
    assert different == ["gemq_manifest.json", "gemq_report.json", "gemq_run.json"]
    reports = [json.loads((folder / "gemq_report.json").read_text()) for folder in folders]
    assert reports[0].pop("run") and reports[1].pop("run") is None
    assert reports[0] == reports[1]
