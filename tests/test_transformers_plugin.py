"""The plug-in in transformers' hands: save, re-save, reload, devices, dtypes, generation, pipelines, gradients."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from packed_models import logits, quantized, relative_error
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, pipeline

import gemq
from gemq.algorithms.given_allocation import GivenAllocation
from gemq.checkpoint import save_packed
from gemq.errors import CheckpointError
from gemq.hf import GemqConfig, GemqQuantizer
from gemq.integrity import WEIGHTS_FILE, read_json, weight_files
from gemq.models import packed_modules

WIDTHS = GivenAllocation("widths", ((0, 1, 3, 2), (5, 8, 4, 0)))
FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v2")


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory):
    """``{family: (what was quantized, its folder)}``, every width among the experts."""
    found = {}
    for family in FAMILIES:
        given = quantized(family, budget=8, given=WIDTHS, shared_bits=3 if family != "mixtral" else None, tune=False)
        folder = tmp_path_factory.mktemp("plugin") / family
        given.packed.generation_config.eos_token_id = None
        found[family] = given, save_packed(given.packed, given.config, folder, tokenizer=tokenizer)
    return found


def tensors(folder):
    found = {}
    for file in weight_files(folder):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_again_it_is_the_same_checkpoint(made, family, tmp_path):
    _, folder = made[family]
    first = AutoModelForCausalLM.from_pretrained(folder)
    first.save_pretrained(tmp_path / "again", max_shard_size="30KB")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    second.save_pretrained(tmp_path / "thrice")
    original = tensors(folder)
    for path in (tmp_path / "again", tmp_path / "thrice"):
        saved = tensors(path)
        assert set(saved) == set(original) and all(torch.equal(saved[k], original[k]) for k in original)
        assert read_json(path / "config.json")["quantization_config"] == read_json(folder / "config.json")[
            "quantization_config"]  # fmt: skip
    assert len(weight_files(tmp_path / "again")) > 2
    assert torch.equal(logits(second), logits(first)) and torch.equal(logits(second), logits(made[family][0].packed))


@pytest.mark.parametrize("device_map", [
    "cpu", "auto", {"": "cpu"},
    {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
     "model.rotary_emb": "cpu", "lm_head": "cpu"},
], ids=["cpu", "auto", "all", "disk"])  # fmt: skip
def test_device_map(made, device_map, tmp_path):
    given, folder = made["mixtral"]
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=copy.copy(device_map), offload_folder=tmp_path)
    assert torch.equal(logits(model), logits(given.packed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, "bfloat16"])
def test_dtype_is_that_of_activations_alone(made, dtype):
    given, folder = made["qwen2_moe"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert model.dtype == model.lm_head.weight.dtype == wanted
    for (path, module), (_, original) in zip(packed_modules(model), packed_modules(given.packed), strict=True):
        for name, buffer in module.named_buffers():
            assert torch.equal(buffer, original.get_buffer(name)), f"{path}.{name}"
    assert relative_error(logits(model), logits(given.packed)) < (1e-6 if wanted == torch.float32 else 0.03)


@pytest.mark.parametrize("options", [
    {"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": False, "cache_implementation": "static"},
    {"do_sample": False, "use_cache": False},
], ids=["greedy", "beams", "static", "no cache"])  # fmt: skip
def test_generate(made, options):
    given, folder = made["mixtral"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    mask = torch.ones_like(ids)
    got = model.generate(ids, attention_mask=mask, max_new_tokens=6, pad_token_id=0, **options)
    assert got.shape == (2, 9)
    options |= {"attention_mask": mask, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    expected = given.dense.generate(ids, **options)
    assert torch.equal(got, expected)


def test_pipeline(made):
    _, folder = made["mixtral"]
    words = pipeline("text-generation", model=str(folder), dtype=torch.float32, device="cpu")
    (answer,) = words("one two", max_new_tokens=4, max_length=None, do_sample=False, return_full_text=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = words.tokenizer("one two", return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert answer["generated_text"].split() == words.tokenizer.decode(expected[0, ids.shape[1] :]).split()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_inputs_are_those_of_the_dense_model(made, family):
    given, folder = made[family]
    gradients = []
    for model in (AutoModelForCausalLM.from_pretrained(folder), given.dense):
        embedded = model.get_input_embeddings()(torch.tensor([[3, 4, 5, 9]])).detach().requires_grad_(True)
        model(inputs_embeds=embedded, labels=torch.tensor([[3, 4, 5, 9]]), use_cache=False).loss.backward()
        gradients.append(embedded.grad)
    assert relative_error(*gradients) < 1e-4 and bool(gradients[1].abs().sum() > 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantize_gives_the_familys_own_modules(made, family, tmp_path):
    given, folder = made[family]
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = model.dequantize()
    assert not list(packed_modules(plain)) and getattr(plain.config, "quantization_config", None) is None
    assert relative_error(logits(plain), logits(given.packed)) < 1e-5
    assert {name: p.shape for name, p in plain.named_parameters()} == {
        name: p.shape for name, p in given.dense.named_parameters()
    }
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(plain))
    assert AutoModelForCausalLM.from_pretrained(folder).dequantize(dtype=torch.bfloat16).model.layers[
        1].mlp.experts.down_proj.dtype == torch.bfloat16  # fmt: skip


def test_a_base_model_is_refused_by_name(made):
    with pytest.raises(CheckpointError, match="loads as a causal language model, not as MixtralModel: use Auto"):
        AutoModel.from_pretrained(made["mixtral"][1])


def test_tensor_parallelism_is_refused(made):
    from transformers.distributed import DistributedConfig

    config = AutoModelForCausalLM.from_pretrained(made["mixtral"][1]).config
    quantizer = GemqQuantizer(GemqConfig.of(made["mixtral"][0].config))
    for asked in (DistributedConfig(tp_size=2), types.SimpleNamespace(tp_size=None, tp_plan="auto")):
        config.distributed_config = asked
        with pytest.raises(CheckpointError, match="are not split by tensor parallelism"):
            quantizer.see_config(config)
    config.distributed_config = DistributedConfig(tp_size=1)
    quantizer.see_config(config)


def test_a_copy_is_saved_like_the_model(made, tmp_path):
    _, folder = made["mixtral"]
    copy.deepcopy(AutoModelForCausalLM.from_pretrained(folder)).save_pretrained(tmp_path)
    original, saved = load_file(folder / WEIGHTS_FILE), load_file(tmp_path / WEIGHTS_FILE)
    assert all(torch.equal(saved[k], original[k]) for k in original)
    assert torch.equal(logits(gemq.from_pretrained(tmp_path)), logits(gemq.from_pretrained(folder)))
