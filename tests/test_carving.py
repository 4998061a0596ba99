"""Mixture-of-Experts models carved out of dense ones: neurons kept, experts of one size, distillation that resumes."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from tiny_text import words
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config

from gemq.models import describe

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "accuracy"))

import carve
import carving
import dense as dense_models
import distill
from carving import Layout
from distill import Distillation

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
LAYOUT = Layout(experts=4, top_k=2, width=16)


def dense_model(config_class=LlamaConfig, **changes) -> nn.Module:
    """A tiny dense model whose weights are large enough for tokens to differ."""
    torch.manual_seed(0)
    config = config_class(**SIZES | changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A dense model with its tokenizer, as a user has it on disk."""
    path = tmp_path_factory.mktemp("dense") / "llama"
    dense_model().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Options that name a text to learn on and one to measure on."""
    path = tmp_path_factory.mktemp("texts")
    (path / "learn.txt").write_text(words(4000), encoding="utf-8")
    (path / "held.txt").write_text(words(600, 1), encoding="utf-8")
    return ["--text", str(path / "learn.txt"), "--heldout", str(path / "held.txt")]


def options(folder, out, texts, *more: str) -> list[str]:
    sizes = ["--experts", "4", "--top-k", "2", "--width", "16", "--batch", "2", "--window", "16", "--limit", "8"]
    return [str(folder), str(out), *texts, *sizes, "--statistics", "16", "--steps", "6", "--within", "-1", *more]


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config, Qwen3Config])
def test_all_experts_together_compute_the_dense_network(config_class) -> None:
    dense = dense_model(config_class)
    windows = torch.randint(96, (8, 32), generator=torch.Generator().manual_seed(1))
    model, hits = carving.carve(dense, LAYOUT, windows, seed=0)
    assert len(hits) == 2 and all(0.5 < hit <= 1 for hit in hits)  # two of four by chance: 0.5
    x = torch.randn(11, 64)
    for old, new in zip(dense.model.layers, model.model.layers, strict=True):
        total = new.mlp.shared_experts(x)
        for gate_up, down in zip(new.mlp.experts.gate_up_proj, new.mlp.experts.down_proj, strict=True):
            gate, up = (x @ gate_up.T).chunk(2, -1)
            total = total + (F.silu(gate) * up) @ down.T
        torch.testing.assert_close(total, old.mlp(x), rtol=1e-4, atol=1e-4)
    # what no expert changes is the dense model's: with the blocks of both silenced, logits are equal
    for layer in (*dense.model.layers, *model.model.layers):
        layer.mlp.register_forward_hook(lambda module, given, output: torch.zeros_like(output))
    torch.testing.assert_close(model(input_ids=windows).logits, dense(input_ids=windows).logits, rtol=1e-4, atol=1e-4)


def test_clusters_are_of_one_size_and_find_planted_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(5, 200, generator=generator).gt(0.8).float()
    truth = torch.arange(5).repeat_interleave(12)[torch.randperm(60, generator=generator)]
    features = patterns[truth] + 0.05 * torch.rand(60, 200, generator=generator)
    for seed in range(20):
        found = carving.balanced_clusters(features, 5, torch.Generator().manual_seed(seed))
        assert torch.bincount(found).tolist() == [12] * 5
        pairs = {(int(a), int(b)) for a, b in zip(truth, found, strict=True)}
        if len(pairs) == 5:
            return
    pytest.fail("no start of twenty found the planted groups")


def test_shared_neurons_are_those_that_most_tokens_use() -> None:
    active = torch.rand(100, 40)
    active[:, [3, 17, 29]] += 2
    assert sorted(carving.most_used(active, 3).tolist()) == [3, 17, 29]


def test_a_router_finds_the_experts_that_a_linear_map_decides() -> None:
    inputs, truth = torch.randn(2000, 16), torch.randn(4, 16)
    router = carving.fitted_router(inputs, (inputs @ truth.T).exp())
    same = (inputs @ router.T).argmax(1) == (inputs @ truth.T).argmax(1)
    assert same.float().mean() > 0.98  # the ridge leaves near ties


def test_distilling_brings_the_model_nearer_to_the_dense_one() -> None:
    dense = dense_model().requires_grad_(False)
    # a text of 2,048 tokens, learnt by heart: random weights have no more to generalise
    ids = torch.randint(96, (2100,), generator=torch.Generator().manual_seed(1))
    rows = ids[:2048].view(64, 32)
    model, _ = carving.carve(dense, LAYOUT, rows, seed=0)
    attention = {name: value.clone() for name, value in model.state_dict().items() if "self_attn" in name}
    before = float(distill.divergence(dense, model, rows).detach())
    with tempfile.TemporaryDirectory() as folder:
        steps = Distillation(160, batch=8, window=32, rate=1e-3)
        distill.distill(dense, model, ids, steps, Path(folder) / "state.pt", lambda: math.inf)
    assert float(distill.divergence(dense, model, rows).detach()) < 0.95 * before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in attention.items())


def test_a_run_that_was_cut_off_ends_with_the_weights_of_one_that_was_not(folder, tmp_path, texts, capsys) -> None:
    carve.main(options(folder, tmp_path / "whole", texts, "--save-every", "100"))
    whole = json.loads((tmp_path / "whole" / "carving.json").read_text())
    # a limit of no time ends each run after one step
    for _ in range(3):
        carve.main(options(folder, tmp_path / "parts", texts, "--seconds", "0"))
    assert (tmp_path / ".parts.carving").is_dir()
    carve.main(options(folder, tmp_path / "parts", texts))
    assert json.loads((tmp_path / "parts" / "carving.json").read_text()) == whole
    assert not (tmp_path / ".parts.carving").exists()
    assert "going on from step 3" in capsys.readouterr().out
    files = [path / "model.safetensors" for path in (tmp_path / "whole", tmp_path / "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()
    moe = describe(AutoModelForCausalLM.from_pretrained(tmp_path / "whole"))
    assert (moe.num_experts, moe.top_k, len(moe.moe)) == (4, 2, 2)
    # routers are balanced by the bias, which is saved with them
    assert all(layer.mlp.gate.e_score_correction_bias.abs().max() > 0 for layer in moe.model.model.layers)


def test_a_run_ends_once_it_is_near_enough(folder, tmp_path, texts) -> None:
    carve.main(options(folder, tmp_path / "near", texts, "--within", "1000", "--save-every", "2"))
    report = json.loads((tmp_path / "near" / "carving.json").read_text())
    assert report["distillation"]["done"] == 2


def refused(capsys, arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        carve.main(arguments)
    message = str(caught.value)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_other_options_than_those_begun_with(folder, tmp_path, texts, capsys) -> None:
    carve.main(options(folder, tmp_path / "out", texts, "--seconds", "0"))
    assert "was begun with" in refused(capsys, options(folder, tmp_path / "out", texts, "--rate", "0.5"))


@pytest.mark.parametrize(("sizes", "said"), [
    (["--experts", "3", "--width", "15"], "multiple of width = 15"),
    (["--experts", "8", "--width", "16"], "leaves 0"),
    (["--experts", "4", "--top-k", "4"], "top_k must be below experts = 4, got 4"),
    (["--experts", "0"], "must be positive"),
])
def test_sizes_that_do_not_fit(folder, tmp_path, texts, sizes, said, capsys) -> None:
    assert said in refused(capsys, options(folder, tmp_path / "out", texts, *sizes))
    assert not list(tmp_path.iterdir())


def write_gguf(path: Path, model: nn.Module, tokenizer, architecture: str = "llama", without: str = "") -> None:
    """Write a llama model as llama.cpp's converter does: names of its own, q and k rows in pairs."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<unk>", "</s>", "i", "n", "in", *(f"token{i}" for i in range(91))])
    writer.add_token_merges(["i n"])
    writer.add_eos_token_id(1)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    for name, value in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem in names:
            found = names[stem]
        else:
            _, _, layer, rest = stem.split(".", 3)
            found = f"blk.{layer}.{inner[rest]}"
            for kind, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
                if found.endswith(kind):
                    value = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        if found != without:
            writer.add_tensor(f"{found}.weight", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_model_that_it_was_made_of(tmp_path, tokenizer) -> None:
    model = dense_model()
    write_gguf(tmp_path / "model.gguf", model, tokenizer)
    loaded, _ = dense_models.load_dense(tmp_path / "model.gguf")
    assert isinstance(loaded, LlamaForCausalLM)
    ids = torch.randint(96, (2, 16))
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_gguf_files_that_cannot_be_carved(tmp_path, texts, tokenizer, capsys) -> None:
    model = dense_model()
    write_gguf(tmp_path / "other.gguf", model, tokenizer, architecture="gemma2")
    assert "architecture gemma2; can be carved: llama" in refused(
        capsys, options(tmp_path / "other.gguf", tmp_path / "out", texts))
    write_gguf(tmp_path / "less.gguf", model, tokenizer, without="blk.1.ffn_up")
    assert "lacks model.layers.1.mlp.up_proj.weight" in refused(
        capsys, options(tmp_path / "less.gguf", tmp_path / "out", texts))
    (tmp_path / "text.gguf").write_text("not a model")
    assert "does not begin with GGUF" in refused(capsys, options(tmp_path / "text.gguf", tmp_path / "out", texts))
    whole = (tmp_path / "less.gguf").read_bytes()
    for end in (6, 30, len(whole) // 2):
        (tmp_path / "short.gguf").write_bytes(whole[:end])
        assert "short.gguf" in refused(capsys, options(tmp_path / "short.gguf", tmp_path / "out", texts))
    assert "must be a folder or a .gguf file" in refused(capsys, options(tmp_path / "none", tmp_path / "out", texts))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("changes", "said"), [
    ({"hidden_act": "gelu"}, "hidden_act must be silu"), ({"mlp_bias": True}, "mlp_bias must be False"),
    ({"attention_bias": True}, "attention_bias must be False"),
])
def test_folders_of_other_networks(tmp_path, texts, tokenizer, changes, said, capsys) -> None:
    dense_model(**changes).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert said in refused(capsys, options(tmp_path / "model", tmp_path / "out", texts))


def test_an_output_that_exists_is_kept(folder, tmp_path, texts, capsys) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    assert "exists already" in refused(capsys, options(folder, tmp_path / "out", texts))
    assert (tmp_path / "out" / "mine").read_text() == "kept"
