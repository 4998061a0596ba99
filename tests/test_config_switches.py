"""Switches of a config that change a forward pass: decoding is transformers' generate, by whichever step runs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from packed_models import quantized
from tiny_models import FAMILIES, random_windows, tiny_model
from torch import nn

import gemq
from gemq.algorithms.perplexity import perplexity, token_losses
from gemq.generation import Decoding, GenerationOptions, decoding
from gemq.models.forward import SWITCHES, switches

NEW = 30
# how each family is told of a window
WINDOW = {
    "mixtral": {}, "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen3_moe": {"use_sliding_window": True}, "dots1": {"max_window_layers": 1},
}
# outputs that nobody asked for here
OUTPUTS = [
    {"output_router_logits": True}, {"return_dict": False}, {"output_hidden_states": True},
    {"return_dict": False, "output_router_logits": True, "output_hidden_states": True, "use_cache": False},
]  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}


def variant(family, **changes):
    """A model of a family with another config, and the same weights where there are any."""
    base = tiny_model(family)
    fields = base.config.to_dict()
    if "sliding_window" in changes:
        fields.pop("layer_types", None)
    torch.manual_seed(1)
    model = type(base)(type(base.config)(**fields | changes)).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, 0, 0.3)
    return model


def texts():
    ids = random_windows(3, 30, 1)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    mask[1, :20] = 0
    return ids, mask


def reference(model, ids, mask):
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return found[:, ids.shape[1] :]


def decoded(model, ids, mask, **options):
    run = Decoding(model, ids, mask, GenerationOptions(NEW, ignore_eos=True), compile="none", **options)
    return torch.stack(list(run), 1), run


def assert_generates(model, kind, expected=None):
    """Rows with padding, a row alone, and a prompt in chunks."""
    ids, mask = texts()
    expected = reference(model, ids, mask) if expected is None else expected
    found, run = decoded(model, ids, mask)
    assert torch.equal(found, expected) and run.step_kind == kind
    assert torch.equal(decoded(model, ids[2:], None)[0], expected[2:])
    return expected, run


@pytest.mark.parametrize("family", WINDOW)
@pytest.mark.parametrize("window", [1, 2, 8, 40, 59])
def test_past_a_sliding_window(family, window, monkeypatch):
    model = variant(family, sliding_window=window, **WINDOW[family])
    expected, run = assert_generates(model, "transformers")
    assert "window" in run.step_reason
    # the window matters, but where it is nearly as long as the text
    plain = decoded(variant(family), *texts())[0]
    assert window > 30 or not torch.equal(plain, expected)
    # chunks shorter than the window, and longer
    for tokens in (3 * 5, 3 * 20):
        monkeypatch.setattr(decoding, "PREFILL_TOKENS", tokens)
        assert torch.equal(decoded(model, *texts())[0], expected)


@pytest.mark.parametrize("family", WINDOW)
def test_a_window_that_nothing_leaves_costs_nothing(family):
    model = variant(family, sliding_window=128, **WINDOW[family])
    assert_generates(model, "lean")


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_a_window_that_the_family_does_not_have(family, monkeypatch):
    model = variant(family, sliding_window=8)
    expected, _ = assert_generates(model, "transformers")
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 15)
    assert torch.equal(decoded(model, *texts())[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("changes", OUTPUTS, ids=["router_logits", "tuples", "hidden_states", "all"])
def test_outputs_that_a_config_asks_for(family, changes):
    """transformers' generate fails with some of them, so that what is expected comes from the plain config."""
    ids, mask = texts()
    plain = tiny_model(family)
    expected, losses = reference(plain, ids, mask), token_losses(plain, ids)
    model = tiny_model(family)
    for name, value in changes.items():
        setattr(model.config, name, value)
    found, _ = decoded(model, ids, mask)
    assert torch.equal(found, expected)
    assert torch.equal(decoded(model, ids, mask, step="transformers")[0], expected)
    assert torch.equal(token_losses(model, ids), losses)
    assert all(getattr(model.config, name) == value for name, value in changes.items())


@pytest.mark.parametrize("family, changes, kind", [
    *[(family, {"tie_word_embeddings": True}, "lean") for family in FAMILIES if family != "qwen3_next"],
    ("qwen3_moe", {"attention_bias": True}, "lean"), ("olmoe", {"attention_bias": True}, "lean"),
    ("glm4_moe", {"attention_bias": False}, "lean"), ("dots1", {"attention_bias": True}, "lean"),
    ("qwen2_moe", {"qkv_bias": False}, "lean"), ("deepseek_v2", {"attention_bias": True}, "lean"),
    ("deepseek_v3", {"attention_bias": True}, "lean"), ("deepseek_v3", {"rope_interleave": False}, "transformers"),
    ("olmoe", {"clip_qkv": 0.3}, "transformers"), ("mixtral", {"rope_parameters": YARN, "head_dim": 16}, "lean"),
    ("qwen3_moe", {"rope_parameters": LINEAR}, "lean"),
    ("mixtral", {"rope_parameters": DYNAMIC, "head_dim": 16}, "transformers"),
    ("qwen2_moe", {"mlp_only_layers": [0]}, "lean"), ("qwen3_moe", {"hidden_act": "gelu"}, "lean"),
    ("deepseek_v2", {"rope_parameters": YARN}, "lean"),
])  # fmt: skip
def test_variants_of_the_forward(family, changes, kind):
    _, run = assert_generates(variant(family, **changes), kind)
    assert (run.step_reason is None) == (run.step_kind == "native")


def _subclass(module):
    module.__class__ = type("Mine", (type(module),), {})


def _replace(module):
    plain = module.forward
    module.forward = lambda *a, **k: plain(*a, **k)


def _hook(module):
    module.register_forward_hook(lambda *a: None)


@pytest.mark.parametrize("change", [_subclass, _replace, _hook])
@pytest.mark.parametrize("place", [
    "", "model", "model.norm", "model.rotary_emb", "model.layers.1", "model.layers.1.self_attn",
    "model.layers.0.input_layernorm", "model.layers.1.self_attn.q_norm",
])  # fmt: skip
def test_what_was_edited_runs_in_its_own_forward(change, place):
    model = tiny_model("qwen3_moe")
    change(model.get_submodule(place))
    _, run = assert_generates(model, "transformers")
    said = {"_subclass": "Mine was not compared", "_replace": "was replaced", "_hook": "has a hook"}
    assert said[change.__name__] in run.step_reason


def test_an_edit_of_the_forward_is_heeded():
    """Not only refused: what a hook or a replaced forward does shows in the tokens."""
    model = tiny_model("mixtral")
    ids, mask = texts()
    plain = decoded(model, ids, mask)[0]
    handle = model.model.layers[0].register_forward_hook(lambda module, inputs, output: output * 0.2)
    expected, _ = assert_generates(model, "transformers")
    assert not torch.equal(expected, plain)
    handle.remove()
    assert torch.equal(decoded(model, ids, mask)[0], plain)
    head = model.forward

    def shifted(**arguments):
        out = head(**arguments)
        out.logits = out.logits.roll(1, -1)
        return out

    model.forward = shifted
    shifted_tokens, _ = decoded(model, ids, mask)
    assert torch.equal(shifted_tokens[:, 0], (plain[:, 0] + 1) % model.config.vocab_size)


def test_listeners_of_transformers_are_silent_afterwards():
    model = tiny_model("mixtral")
    ids, mask = texts()
    model(ids, output_hidden_states=True, output_router_logits=True, output_attentions=True)
    assert decoded(model, ids, mask)[1].step_kind == "lean"


def test_an_attention_that_was_registered():
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def doubled(*arguments, **options):
        out, weights = sdpa_attention_forward(*arguments, **options)
        return 2 * out, weights

    AttentionInterface.register("doubled", doubled)
    model = tiny_model("mixtral")
    model.config._attn_implementation = "doubled"
    ids, _ = texts()
    assert decoded(model, ids[2:], None)[1].step_reason == "the attention implementation is 'doubled'"


@pytest.mark.parametrize("change", [
    lambda m: _subclass(m.model.layers[0].mlp), lambda m: _subclass(m.model.layers[0].mlp.gate),
    lambda m: _subclass(m.model.layers[0].mlp.experts), lambda m: _subclass(m.model.layers[0].self_attn.q_proj),
    lambda m: _replace(m.model.layers[1].mlp), lambda m: _hook(m.model.layers[1].self_attn.o_proj),
    lambda m: _replace(m.model.layers[1].mlp.shared_expert), lambda m: _subclass(m.model.embed_tokens),
    lambda m: _subclass(m.lm_head),
], ids=["block", "router", "experts", "linear", "forward", "hook", "shared", "embedding", "head"])  # fmt: skip
def test_the_program_takes_no_edited_module(change):
    """The lean step calls these modules, the compiled program reads their weights."""
    model = copy.deepcopy(quantized("qwen2_moe", budget=2.0).packed)
    ids, _ = texts()
    plain, run = decoded(model, ids, None)
    assert run.step_kind == "native" and run.step_reason is None
    change(model)
    found, run = decoded(model, ids, None)
    assert run.step_kind == "lean" and run.step_reason and torch.equal(found, plain)


def test_a_patched_projection_of_latents_is_not_folded():
    model = tiny_model("deepseek_v2")
    linear = model.model.layers[1].self_attn.kv_b_proj
    _replace(linear)
    _, run = assert_generates(model, "transformers")
    assert "the forward of Linear was replaced" in run.step_reason


def test_switches_are_those_that_a_forward_takes():
    class Bare(nn.Module):
        def forward(self, x, use_cache=None, return_dict=None):
            return x

    assert switches(Bare(), use_cache=False) == {"use_cache": False, "return_dict": True}
    assert switches(tiny_model("mixtral")) == SWITCHES


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_no_number(poison):
    model = tiny_model("mixtral")
    windows = random_windows(5, 12)
    windows[windows == 7] = 8
    windows[3, 4] = 7
    model.model.embed_tokens.weight.data[7] = poison
    with pytest.raises(gemq.GemqError, match="the loss of window 4 of 5 is nan: a weight of the model is NaN"):
        perplexity(model, windows, 2)
    assert math.isfinite(perplexity(model, windows[:3], 2))


def test_a_perplexity_beyond_numbers():
    model = tiny_model("mixtral")
    model.lm_head.weight.data *= 1e6
    with pytest.raises(gemq.GemqError, match=r"the mean loss is .*e\+\d+ nats a token, whose perplexity is beyond"):
        perplexity(model, random_windows(3, 12))
    with pytest.raises(ValueError, match="need at least 1 window"):
        perplexity(model, random_windows(3, 12)[:0])


def test_a_broken_model_leaves_no_record(gemq_run, text_file, tmp_path, model_folder):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    out = tmp_path / "out"
    options = ["--calibration", text_file, "--samples", "4", "--length", "24", "--bits", "2", "--recipe", "fast"]
    code, _, err = gemq_run("quantize", model_folder, "-o", out, *options, "--no-tune-routers")
    assert code == 0, err
    file = out / "model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as stored:
        notes = stored.metadata()
    tensors["model.norm.weight"].fill_(math.nan)
    save_file(tensors, file, metadata=notes)
    for form in (["--json"], []):
        code, shown, err = gemq_run("eval", out, "--data", text_file, "--length", "24", "--record", *form)
        assert code == 2 and shown == "" and "the loss of window 1 of" in " ".join(err.split())
        assert not (out / "gemq_evaluations.json").exists()
    code, shown, err = gemq_run("generate", out, "it was")
    assert code == 2 and "scores after 2 tokens of row 0 are NaN or infinite" in " ".join(err.split())
