"""The engine: one layer loaded at a time, from disk or from a model in memory, to the same bytes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_engine_files import FAST
from tiny_models import FAMILIES, random_windows, slow_but, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import gemq
from gemq.algorithms.method import MethodConfig
from gemq.algorithms.perturbation import Perturbation
from gemq.engine.disk_source import DiskSource
from gemq.engine.journal import opened
from gemq.engine.layers import Weights
from gemq.engine.measure import measure
from gemq.engine.progression import Progression, quantize_progressively
from gemq.engine.source import OUTSIDE, ResidentSource
from gemq.engine.walk import Sweep
from gemq.errors import CheckpointError
from gemq.integrity import INDEX_FILE, WEIGHTS_FILE, read_header
from gemq.pipeline import QuantizeConfig

WINDOWS = random_windows(5, 16)
METHOD = MethodConfig(budgets=(2.0,), perturbation="rtn", per_layer="none", router_bits=8, batch_size=2)


def saved(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A tiny model as a hub checkpoint has it: 16 bits, an expert's matrices on their own."""
    tiny_model(family).to(dtype).save_pretrained(folder)
    return folder


def open_source(folder: Path) -> DiskSource:
    return DiskSource(str(folder), AutoConfig.from_pretrained(folder), torch.float32, torch.device("cpu"))


def in_memory(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def modules_of(result) -> dict:
    """The packed modules of a result by path."""
    layers = [result.quantized.record(index).modules for index in range(result.quantized.layers)]
    return {path: module for modules in layers for path, module in modules.items()}


def streamed(folder: Path, work: Path, method: MethodConfig, on_disk: bool = True) -> list:
    """Results of a run in the directory ``work``, with their quantized layers read back."""
    with opened(work, {"test": 1}, on_disk=on_disk) as run:
        results = Progression(open_source(folder), run, "model", WINDOWS, WINDOWS, method).results()
        return [(result, modules_of(result)) for result in results]


@pytest.mark.parametrize("family", slow_but(FAMILIES, ("mixtral", "deepseek_v2", "qwen3_next")))
def test_a_resident_model_gives_the_same_bytes(family: str, tmp_path: Path) -> None:
    folder = saved(family, tmp_path / "model")
    # the second budget is measured on the model that the first one quantized and tuned
    method = replace(METHOD, budgets=(2.0, 1.5)) if family in ("mixtral", "deepseek_v2") else METHOD
    on_disk = streamed(folder, tmp_path / "run", method)
    resident = quantize_progressively(ResidentSource(in_memory(folder)), WINDOWS, method)
    for (one, modules), other in zip(on_disk, resident, strict=True):
        assert packed_bytes_of([(one, modules)]) == packed_bytes_of([(other, modules_of(other))])
        assert all(map(torch.equal, one.routers.values(), other.routers.values()))
        assert (one.reports, one.router_losses, one.router_shift) == (
            other.reports, other.router_losses, other.router_shift
        )
        np.testing.assert_array_equal(one.statistics.costs.routed, other.statistics.costs.routed)


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
    monkeypatch.setattr("gemq.engine.progression.group_budget", lambda source: 1)
    one_by_one = streamed(folder, tmp_path / "c", method)
    for other in (in_ram, one_by_one):
        assert packed_bytes_of(other) == packed_bytes_of(base)
        for name in ("routed", "matrices"):
            one, two = (getattr(run[0][0].statistics.costs, name) for run in (other, base))
            np.testing.assert_array_equal(one, two)


def test_one_decoder_layer_is_loaded_at_a_time(tmp_path: Path, monkeypatch) -> None:
    folder = saved("mixtral", tmp_path / "model")
    most, load = [], DiskSource.load

    def counting(self, unit, without=()):
        load(self, unit, without)
        # the first parameters of a layer, its attention's, are quantized: a record's norm is read from the model
        layers = [n for n, layer in enumerate(self.moe.layers) if not layer.input_layernorm.weight.is_meta]
        most.append(len(layers))
        assert layers == [unit] or (unit == OUTSIDE and not layers)

    monkeypatch.setattr(DiskSource, "load", counting)
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
        sweep = Sweep(
            WINDOWS, 2, run.stage("measure"), lambda done, total: seen.append((done, total)),
            lambda **event: None, 1 << 30,
        )
        measure(Weights(source), sweep, (1, 2), Perturbation("rtn"))
    # three layers forward, the head, two backward
    assert seen[-1] == (5, 6) and {total for _, total in seen[-2:]} == {6}


# the checkpoint


def test_what_is_kept_in_memory_changes_no_byte_of_the_checkpoint(tiny_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gemq.checkpoint.save_packed.__kwdefaults__", {
        **gemq.checkpoint.save_packed.__kwdefaults__, "max_shard_size": "40KB"
    })
    monkeypatch.setattr("gemq.engine.assemble.MAX_SHARD", "40KB")
    config = QuantizeConfig(**tiny_folder, output="out", method=FAST)
    folders = []
    for keep in ("layer", "activations", "model"):
        gemq.quantize(replace(config, keep=keep))
        folders.append((tmp_path / "out").rename(tmp_path / keep))
    files = sorted(p.name for p in folders[0].iterdir())
    assert INDEX_FILE in files and len([f for f in files if f.endswith(".safetensors")]) > 2
    for other in folders[1:]:
        assert files == sorted(p.name for p in other.iterdir())
        different = [f for f in files if (folders[0] / f).read_bytes() != (other / f).read_bytes()]
        assert different == ["gemq_run.json"]
