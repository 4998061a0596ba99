"""A model's folder means to gemq what it means to transformers, or gemq says by name how it does not."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, random_windows, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

import gemq
from gemq.cli.run import run
from gemq.engine.disk_source import DiskSource
from gemq.engine.source import OUTSIDE
from gemq.errors import CheckpointError
from gemq.integrity import INDEX_FILE, WEIGHTS_FILE
from gemq.loading import check_model
from gemq.models.forward import call

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def saved(family, folder, dtype=torch.bfloat16, **options):
    tiny_model(family).to(dtype).save_pretrained(folder, **options)
    return folder


def change(folder, edit):
    """Edit the tensors of a folder of one file."""
    tensors = load_file(folder / WEIGHTS_FILE)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def configure(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@torch.no_grad()
def source_logits(folder):
    """Logits of all of a source at once, in float32."""
    source = DiskSource(str(folder), check_model(str(folder)), torch.float32, torch.device("cpu"))
    for unit in range(OUTSIDE, len(source.moe.layers)):
        source.load(unit)
    return call(source.model, input_ids=random_windows(2, 12, 5), use_cache=False).logits


@torch.no_grad()
def transformers_logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.set_experts_implementation("grouped_mm")
    return call(model, input_ids=random_windows(2, 12, 5), use_cache=False).logits


def agrees(folder):
    torch.testing.assert_close(source_logits(folder), transformers_logits(folder), rtol=1e-5, atol=1e-5)


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message):
        source_logits(folder)


# folders that transformers writes


@pytest.mark.parametrize("options", [{}, {"max_shard_size": "30KB"}, {"save_original_format": False}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_writes(family, tmp_path, options):
    agrees(saved(family, tmp_path, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_dtypes_of_weights(tmp_path, dtype):
    agrees(saved("mixtral", tmp_path, dtype))


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_dtypes(family, tmp_path):
    folder = saved(family, tmp_path)
    change(folder, lambda t: t.update({n: v.float() for at, (n, v) in enumerate(sorted(t.items())) if at % 3 == 0}))
    agrees(folder)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_dtypes_that_a_config_says(tmp_path, dtype):
    folder = saved("mixtral", tmp_path)
    configure(folder, dtype=dtype)
    agrees(folder)
    source = DiskSource(str(folder), check_model(str(folder)), "auto", torch.device("cpu"))
    assert source.dtype == (torch.float32 if dtype == "float32" else torch.bfloat16)


# switches of a config


SWITCHES = [
    {"output_router_logits": True}, {"return_dict": False}, {"output_hidden_states": True},
    {"output_attentions": True}, {"use_cache": False},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_switches_change_no_forward_pass(family, tmp_path, switch):
    folder = saved(family, tmp_path)
    expected = source_logits(folder)
    configure(folder, **switch)
    assert torch.equal(source_logits(folder), expected)
    agrees(folder)


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
@pytest.mark.parametrize("stream", ["--keep=layer", "--keep=model"])
def test_switches_change_no_byte_of_the_weights(model_folder, quick, tmp_path, switch, stream):
    made = []
    for name, fields in (("plain", {}), ("switched", switch)):
        source = shutil.copytree(model_folder, tmp_path / name)
        configure(source, **fields)
        out = tmp_path / f"{name}-out"
        assert run(["quantize", str(source), "-o", str(out), "--bits", "2", *quick, stream, "-q"]) == 0
        made.append((out / WEIGHTS_FILE).read_bytes())
    assert made[0] == made[1]


SHARED = {"deepseek_v2": "n_shared_experts", "deepseek_v3": "n_shared_experts", "glm4_moe": "n_shared_experts",
          "dots1": "n_shared_experts", "qwen2_moe": "shared_expert_intermediate_size"}


@pytest.mark.parametrize("family", SHARED)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_no_shared_experts(family, tmp_path, tokenizer, quick):
    """0 is a number of shared experts: they are there, of no width."""
    config = tiny_model(family).config
    setattr(config, SHARED[family], 0)
    torch.manual_seed(0)
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    agrees(folder)
    out = tmp_path / "out"
    assert run(["quantize", str(folder), "-o", str(out), "--bits", "2", *quick, "-q"]) == 0
    assert not gemq.checkpoint.load_packed_config(out).widths.shared
    model = gemq.from_pretrained(out)
    ids = random_windows(1, 6, 1)
    tokens = gemq.generate(model, ids[0], max_new_tokens=6, ignore_eos=True).tokens
    whole = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(tokens) == whole[0, 6:].tolist()


# altered checkpoints


@pytest.mark.parametrize("family", FAMILIES)
def test_fewer_layers_than_the_file(family, tmp_path, caplog):
    folder = saved(family, tmp_path)
    layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    types = getattr(AutoConfig.from_pretrained(folder), "layer_types", None)
    configure(folder, num_hidden_layers=layers - 1, **({"layer_types": types[:-1]} if types else {}))
    with caplog.at_level(logging.WARNING, "gemq"):
        agrees(folder)
    assert f"model.layers.{layers - 1}." in caplog.text and "are left out" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_that_the_model_does_not_have(family, tmp_path, caplog):
    folder = saved(family, tmp_path)
    extra = {f"model.layers.1.{name}": torch.ones(64) for name in ("self_attn.o_proj.bias", "mlp.gate.bias", "x.y")}
    change(folder, lambda t: t.update(extra))
    with caplog.at_level(logging.WARNING, "gemq"):
        agrees(folder)
    assert all(name in caplog.text for name in extra)


def test_at_the_terminal_they_are_a_line(model_folder, quick, tmp_path, capsys):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    more = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64), "mtp.0.x": torch.ones(3)}  # the second is kept
    change(folder, lambda t: t.update(more))
    assert run(["quantize", str(folder), "-o", str(tmp_path / "out"), "--method", "uniform", "--bits", "2", *quick,
                "--no-tune-routers", "-q"]) == 0
    err = capsys.readouterr().err
    assert err.count("q_proj.bias") == 1 and "mtp.0.x" not in err
    assert "mtp.0.x" in load_file(tmp_path / "out" / "model.safetensors")


def test_computed_buffers_of_old_checkpoints_are_no_news(tmp_path, caplog):
    folder = saved("mixtral", tmp_path)
    change(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    with caplog.at_level(logging.WARNING, "gemq"):
        agrees(folder)
    assert not caplog.records


@pytest.mark.parametrize("family", FAMILIES)
def test_two_tensors_of_one_parameter(family, tmp_path):
    folder = saved(family, tmp_path)
    change(folder, lambda t: t.update({"embed_tokens.weight": t[EMBEDDING] * 2}))
    refused(folder, r"embed_tokens\.weight.*embed_tokens\.weight all make model\.embed_tokens\.weight")


def test_an_expert_that_comes_twice(tmp_path):
    folder = saved("mixtral", tmp_path)
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    change(folder, lambda t: t.update({name.replace("experts.1", "experts.01"): t[name].clone()}))
    refused(folder, r"is made of 5 matrices .* expected 4: .*experts\.0?1\.w1\.weight.* are the same one")


def test_experts_with_a_gap(tmp_path):
    folder = saved("mixtral", tmp_path)
    for kind in ("w1", "w2", "w3"):
        name = f"model.layers.0.block_sparse_moe.experts.3.{kind}.weight"
        change(folder, lambda t, n=name: t.update({n.replace("experts.3", "experts.7"): t.pop(n)}))
    refused(folder, r"numbered otherwise than 0\.\.3")


def test_a_tensor_in_two_files(tmp_path):
    folder = saved("mixtral", tmp_path, max_shard_size="30KB")
    files = sorted(folder.glob("model-*.safetensors"))
    first, second = load_file(files[0]), load_file(files[1])
    name = next(iter(first))
    save_file(second | {name: first[name]}, files[1], metadata={"format": "pt"})
    refused(folder, rf"the tensor {name} is in {files[0].name} and in {files[1].name}".replace(".", r"\."))


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_weights(family, tmp_path, caplog):
    """One of the two, the other, both alike, both different: as transformers has it."""
    folder = saved(family, tmp_path)
    configure(folder, tie_word_embeddings=True)
    change(folder, lambda t: t.update({HEAD: t[EMBEDDING] * 0.5}))
    with caplog.at_level(logging.WARNING, "gemq"):
        agrees(folder)
    assert "are not tied, as in transformers" in caplog.text
    different = source_logits(folder)
    change(folder, lambda t: t.update({HEAD: t[EMBEDDING].clone()}))
    agrees(folder)
    both = source_logits(folder)
    assert not torch.allclose(different, both)
    change(folder, lambda t: t.pop(HEAD))
    assert torch.equal(source_logits(folder), both)
    agrees(folder)
    change(folder, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    assert torch.equal(source_logits(folder), both)
    agrees(folder)


@pytest.mark.parametrize("stream", ["--keep=layer", "--keep=model"])
def test_weights_that_are_not_tied_stay_so_in_the_checkpoint(model_folder, quick, tmp_path, stream):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    configure(folder, tie_word_embeddings=True)
    out = tmp_path / "out"
    assert run(["quantize", str(folder), "-o", str(out), "--bits", "2", *quick, stream, "-q"]) == 0
    model = gemq.from_pretrained(out, dtype=torch.float32)
    tensors = load_file(folder / WEIGHTS_FILE)
    assert torch.equal(model.lm_head.weight, tensors[HEAD].bfloat16().float())
    assert torch.equal(model.model.embed_tokens.weight, tensors[EMBEDDING].bfloat16().float())


@pytest.mark.parametrize("value, message", [
    (lambda w: w.to(torch.int8), "stored as I8"), (lambda w: w > 0, "stored as BOOL"),
    (lambda w: w.to(torch.uint8), "stored as U8"), (lambda w: w.to(torch.int64), "stored as I64"),
    (lambda w: w.to(torch.float8_e4m3fn), r"stored in fp8 \(F8_E4M3\): convert the model to bfloat16 first"),
    (lambda w: w.to(torch.float8_e5m2), "stored in fp8"), (lambda w: w.to(torch.complex64), "stored as C64"),
])  # fmt: skip
@pytest.mark.parametrize("part", ["q_proj.weight", "experts.2.w2.weight", "layernorm.weight", "embed_tokens.weight"])
def test_dtypes_that_are_no_weights(tmp_path, value, message, part):
    folder = saved("mixtral", tmp_path)
    name = next(n for n in sorted(load_file(folder / WEIGHTS_FILE)) if part in n)
    change(folder, lambda t: t.update({name: value(t[name])}))
    refused(folder, message)


def test_fp8_is_named_with_what_to_do(tmp_path):
    folder = saved("mixtral", tmp_path)

    def fp8(tensors):
        for name in [n for n in tensors if n.endswith("_proj.weight")]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = torch.ones(1, 1)

    change(folder, fp8)
    refused(folder, "fp8")
    configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    refused(folder, "quantized already, by 'fp8'.*weight_scale_inv")


@pytest.mark.parametrize("stored", [{}, None])
def test_an_empty_quantization_config_says_nothing(model_folder, quick, tmp_path, stored):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    expected = source_logits(folder)
    configure(folder, quantization_config=stored)
    assert torch.equal(source_logits(folder), expected)
    for stream in ("--keep=layer", "--keep=model"):
        out = tmp_path / stream
        assert run(["quantize", str(folder), "-o", str(out), "--bits", "2", *quick, stream, "-q"]) == 0
        gemq.verify(out)
    assert gemq.generate(str(folder), "it was", max_new_tokens=2).new_tokens


def test_other_ways_to_hold_weights(tmp_path):
    folder = saved("mixtral", tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "holds an adapter")
    (folder / "adapter_config.json").unlink()
    (folder / WEIGHTS_FILE).rename(folder / "model.fp16.safetensors")
    refused(folder, r"neither .*; there is model\.fp16\.safetensors: rename it")
    configure(folder, transformers_weights="model.fp16.safetensors")
    agrees(folder)
    for name in ("../model.safetensors", "/etc/passwd", "model.bin"):
        configure(folder, transformers_weights=name)
        refused(folder, "transformers_weights of config.json names")
    configure(folder, transformers_weights=None)
    (folder / "model.fp16.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"but pytorch_model\.bin, a pickle")
    (folder / INDEX_FILE).write_text('{"weight_map": {"a": "../x.safetensors"}}')
    refused(folder, "which is not a .safetensors file of the folder")


def test_a_model_without_a_head(tmp_path):
    """As AutoModel saves it: transformers would make a random head."""
    folder = saved("mixtral", tmp_path)
    change(folder, lambda t: t.pop(HEAD))
    refused(folder, r"lacks weights of the model: lm_head\.weight")
