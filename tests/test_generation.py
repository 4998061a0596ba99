"""The decode loop: the tokens of transformers' generate, sampling, ends, errors."""

from __future__ import annotations

import pytest
import torch
from listed_models import listed_model
from packed_models import quantized
from step_models import step_logits
from tiny_models import FAMILIES, VOCAB, random_windows, tiny_model
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import gemq
from gemq.generation import Decoding, GenerationOptions, decoding, generate_rows, memory, pad_left, sampling
from gemq.generation.step import LeanStep, ModelStep

NEW = 24


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_model(family)


def padded(rows=4, length=11, seed=3):
    """Token ids with their left padding mask; the last row has no padding."""
    ids = random_windows(rows, length, seed)
    mask = torch.ones_like(ids)
    for row in range(rows - 1):
        mask[row, : 3 * row + 1] = 0
    return ids, mask


def reference(model, ids, mask=None, new=NEW, **options):
    """The new tokens of transformers' generate, greedy unless told otherwise."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)[:, ids.shape[1] :]


def decode(model, ids, mask=None, new=NEW, compile="none", step="auto", **options):
    options = {"ignore_eos": True} | options
    return Decoding(model, ids, mask, GenerationOptions(new, **options), compile=compile, step=step)


def tokens(*arguments, **options):
    return torch.stack(list(decode(*arguments, **options)), 1)


@pytest.mark.parametrize("step", ["lean", "transformers"])
def test_greedy_is_generates(family, model, step):
    ids = random_windows(3, 9, 1)
    expected = reference(model, ids)
    assert len(expected.unique()) > 5
    run = decode(model, ids, step=step)
    assert torch.equal(torch.stack(list(run), 1), expected)
    assert isinstance(run.step, LeanStep if step == "lean" else ModelStep) and run.step_kind == step


@pytest.mark.parametrize("step", ["lean", "transformers"])
def test_padded_rows_are_generates(family, model, step):
    ids, mask = padded()
    expected = reference(model, ids, mask)
    assert torch.equal(tokens(model, ids, mask, step=step), expected)
    # and each row is what it is alone
    alone = tokens(model, ids[2:3, 7:], step=step)
    assert torch.equal(alone[0], expected[2])


def test_a_known_model_takes_the_lean_step(family, model):
    """Unquantized; packed ones are in tests/test_native_step.py."""
    run = decode(model, random_windows(1, 5, 0), new=3)
    assert run.step_kind is None
    list(run)
    assert run.step_kind == "lean"


@torch.inference_mode()
def test_every_step_matches_the_forward_of_the_whole_text(family, model):
    """Logits of lean steps, not only which is largest."""
    ids, mask = padded(3, 9)
    found, new = step_logits(model, ids, mask, "lean", 8)
    text = torch.cat([ids, new], 1)
    whole = torch.cat([mask, torch.ones(3, text.shape[1] - 9, dtype=torch.long)], 1)
    positions = (whole.cumsum(-1) - 1).clamp_min(0)
    expected = model(text, attention_mask=whole, position_ids=positions).logits
    for at, logits in enumerate(found):
        torch.testing.assert_close(logits, expected[:, 9 + at], rtol=2e-4, atol=2e-4)


def test_chunked_prefill_changes_nothing(model, monkeypatch):
    ids, mask = padded(3, 17)
    expected = tokens(model, ids, mask)
    plain = tokens(model, ids)
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 12)
    assert torch.equal(tokens(model, ids, mask), expected)
    assert torch.equal(tokens(model, ids), plain)


@pytest.mark.parametrize("family_name", FAMILIES)
def test_packed_models_decode_to_their_own_generate(family_name):
    case = quantized(family_name, budget=2.0)
    ids, mask = padded(2, 7)
    assert torch.equal(tokens(case.packed, ids, mask, new=12), reference(case.packed, ids, mask, 12))


def test_a_step_is_one_graph(family, model, monkeypatch):
    """Without the code generator, which takes long: that the whole step is traced."""
    torch._dynamo.reset()
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda step, **options: compile(step, backend="aot_eager", **options))
    ids, mask = padded(2, 7)
    expected = tokens(model, ids, mask, new=12)
    run = decode(model, ids, mask, new=12, compile="compile")
    assert torch.equal(torch.stack(list(run), 1), expected)
    assert run.timing.setup > 0 and run.timing.steps == 11


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mode", ["none", "graph", "compile"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_modes_on_cuda(model, mode, sampled):
    torch._dynamo.reset()
    ids, mask = padded(2, 7)
    model = model.cuda()
    try:
        options = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2} if sampled else {}
        expected = tokens(model, ids, mask, compile="none", **options)
        assert torch.equal(tokens(model, ids, mask, compile=mode, **options), expected)
        if not sampled:
            assert torch.equal(expected, reference(model, ids.cuda(), mask.cuda()).cpu())
    finally:
        model.cpu()


def test_rows_end_at_their_own_end_token(model):
    ids, mask = padded()
    free = tokens(model, ids, mask)
    # a token that the first row reaches early and not every row does
    end = int(free[0, 4])
    expected = reference(model, ids, mask, eos_token_id=[end, VOCAB - 1], pad_token_id=5)
    found = tokens(model, ids, mask, ignore_eos=False, eos_token_id=(end, VOCAB - 1), pad_token_id=5)
    assert torch.equal(found, expected)
    assert (found[0, 5:] == 5).all() or found.shape[1] == 5


def test_all_rows_ended_stops_early():
    model = tiny_model("mixtral")
    ids = random_windows(1, 6, 2)
    free = tokens(model, ids)[0].tolist()
    found = generate_rows(model, None, ids.tolist(), GenerationOptions(NEW, eos_token_id=free[3]))
    assert found[0].tokens == tuple(free[: free.index(free[3]) + 1])
    assert found[0].new_tokens == len(found[0].tokens) and found[0].text == ""


def test_the_models_own_end_token_counts():
    model = tiny_model("mixtral")
    ids = random_windows(1, 6, 2)
    free = tokens(model, ids)[0].tolist()
    model.generation_config.eos_token_id = free[2]
    found = gemq.generate(model, ids[0], max_new_tokens=NEW)
    assert found.tokens == tuple(free[: free.index(free[2]) + 1])
    assert len(gemq.generate(model, ids[0], max_new_tokens=NEW, ignore_eos=True).tokens) == NEW


def test_repetition_penalty_is_generates(model):
    ids = random_windows(3, 9, 1)
    expected = reference(model, ids, repetition_penalty=1.4)
    assert not torch.equal(expected, reference(model, ids))
    assert torch.equal(tokens(model, ids, repetition_penalty=1.4), expected)


@pytest.mark.parametrize("ours, theirs", [
    (lambda s: sampling.keep_top_k(s, 7), TopKLogitsWarper(7)),
    (lambda s: sampling.keep_top_k(s, 500), TopKLogitsWarper(500)),
    (lambda s: sampling.keep_top_p(s, 0.7), TopPLogitsWarper(0.7)),
    (lambda s: sampling.keep_top_p(s, 1e-6), TopPLogitsWarper(1e-6)),
    (lambda s: sampling.keep_min_p(s, 0.1), MinPLogitsWarper(0.1)),
], ids=["top_k", "top_k-all", "top_p", "top_p-one", "min_p"])  # fmt: skip
def test_filters_are_transformers(ours, theirs):
    scores = 3 * torch.randn(5, 90, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(scores), theirs(None, scores))


def test_draws_follow_the_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    options = GenerationOptions(temperature=0.5, seed=3)
    rows = 40_000
    prompt = torch.zeros(rows, 1, dtype=torch.long)
    drawn, _ = sampling.Sampler(options, prompt, torch.ones_like(prompt), 5)(logits.expand(rows, -1))
    found = drawn.bincount(minlength=5) / rows
    expected = (logits[0] / 0.5).softmax(-1)
    # five standard deviations of a share
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / rows).sqrt()).all()


def test_seeds_reproduce():
    model = tiny_model("qwen3_moe")
    ids = random_windows(2, 6, 2)

    def draw(seed):
        return tokens(model, ids, temperature=1.3, top_k=40, seed=seed)

    first = draw(1)
    torch.rand(7)
    assert torch.equal(draw(1), first) and not torch.equal(draw(2), first)
    assert torch.equal(tokens(model, ids, temperature=0.0), tokens(model, ids))
    assert torch.equal(tokens(model, ids, temperature=1.3, do_sample=False), tokens(model, ids))
    assert torch.equal(tokens(model, ids, temperature=1.3, top_k=1), tokens(model, ids))


def test_a_decoding_can_run_again():
    run = decode(tiny_model("mixtral"), random_windows(1, 6, 2), new=6)
    first = list(run)
    assert [int(t) for t in run] == [int(t) for t in first]
    assert run.timing.steps == 5 and run.timing.prefill > 0


def test_batches_up_to_64():
    model = tiny_model("mixtral")
    ids = random_windows(64, 5, 2)
    assert torch.equal(tokens(model, ids, new=3), reference(model, ids, new=3))
    with pytest.raises(ValueError, match="1 to 64 rows, got 65"):
        decode(model, random_windows(65, 5, 2))


@pytest.mark.parametrize("options, error, message", [
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be at least 1, got 0"),
    ({"max_new_tokens": -3}, ValueError, "max_new_tokens must be at least 1, got -3"),
    ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens must be a whole number, got 2.5"),
    ({"temperature": -1.0}, ValueError, "temperature must be at least 0, got -1"),
    ({"temperature": float("nan")}, ValueError, "temperature must be at least 0, got nan"),
    ({"do_sample": True, "temperature": 0}, ValueError, "temperature must be above 0 with do_sample"),
    ({"top_k": -1}, ValueError, "top_k must be at least 0, got -1"),
    ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0"),
    ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\], got 1.5"),
    ({"min_p": 2}, ValueError, r"min_p must be in \[0, 1\], got 2"),
    ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be above 0, got 0"),
    ({"eos_token_id": -2}, ValueError, "eos_token_id must be at least 0, got -2"),
    ({"seed": "a"}, TypeError, "seed must be a whole number, got 'a'"),
])  # fmt: skip
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        GenerationOptions(**options)


def test_bad_prompts():
    model = tiny_model("mixtral")
    ids = random_windows(1, 8, 0)
    options = GenerationOptions(8)
    cases = [
        ((torch.zeros(1, 0, dtype=torch.long),), ValueError, "prompt must not be empty"),
        ((ids[0],), TypeError, r"input_ids must be an int64 tensor \[batch, tokens\], got torch.int64 \[8\]"),
        ((ids.float(),), TypeError, "input_ids must be an int64 tensor"),
        ((ids + VOCAB,), ValueError, "input_ids must be in 0..95, got"),
        ((ids - VOCAB,), ValueError, "input_ids must be in 0..95, got -"),
        ((ids, torch.ones(1, 7)), ValueError, r"attention_mask must have the shape of input_ids \[1, 8\]"),
        ((ids, torch.tensor([[1] * 7 + [0]])), ValueError, "attention_mask must be padding on the left"),
        ((random_windows(1, 128, 0),), ValueError, "the prompt has 128 tokens, the model only 128 positions"),
        ((random_windows(1, 124, 0),), ValueError, "max_new_tokens must be at most 4 after a prompt of 124"),
    ]
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            Decoding(model, *arguments, options=options)
    with pytest.raises(ValueError, match="compile must be one of auto, none, compile, graph, got 'fast'"):
        Decoding(model, ids, compile="fast")
    with pytest.raises(ValueError, match="compile='graph' needs a CUDA device, the model is on cpu"):
        Decoding(model, ids, compile="graph")
    with pytest.raises(ValueError, match="training mode"):
        Decoding(model.train(), ids)


def test_an_unknown_model_type():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=20)).eval()
    with pytest.raises(gemq.UnsupportedModelError, match="model type 'gpt2' is not supported yet"):
        Decoding(model, torch.zeros(1, 3, dtype=torch.long))


def test_a_cache_that_does_not_fit(monkeypatch):
    model = tiny_model("mixtral")
    token = memory.cache_bytes_per_token(model)
    # keys and values of 2 heads of 16, 2 layers, float32
    assert token == 2 * 2 * 16 * 2 * 4
    monkeypatch.setattr(memory, "free_bytes", lambda device: 70 * token)
    with pytest.raises(gemq.OutOfMemoryError, match=r"at most 35 tokens a row .* would fit, or 1 rows of 64"):
        list(decode(model, random_windows(2, 9, 0)))
    assert tokens(model, random_windows(1, 9, 0)).shape == (1, NEW)


def test_out_of_memory_while_running(monkeypatch):
    model = tiny_model("mixtral")

    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(model.model, "forward", fail)
    with pytest.raises(gemq.OutOfMemoryError, match=r"out of memory: a cache of 1 x 64 tokens takes .* are free"):
        list(decode(model, random_windows(1, 9, 0)))


@pytest.mark.parametrize("family_name", FAMILIES)
def test_cache_bytes_are_those_of_the_cache(family_name):
    model = tiny_model(family_name)
    run = decode(model, random_windows(2, 9, 0), new=3)
    list(run)
    full = [layer for layer in run.cache.layers if hasattr(layer, "keys")]
    held = sum(t.numel() * t.element_size() for layer in full for t in (layer.keys, layer.values))
    assert held == 2 * run.limit * memory.cache_bytes_per_token(model)
    linear = [layer for layer in run.cache.layers if layer not in full]
    states = [t for layer in linear for each in (layer.conv_states, layer.recurrent_states)
              for t in (each.values() if isinstance(each, dict) else each) if t is not None]
    assert sum(t.numel() * t.element_size() for t in states) == 2 * memory.state_bytes_per_row(model)
    assert bool(linear) == (family_name == "qwen3_next")


def test_structures_without_a_lean_step():
    """Structures that the lean step would compute wrongly are left to transformers, or refused if it was asked for."""
    ids, mask = padded(3, 9)
    hybrid = listed_model("lfm2_moe")
    with pytest.raises(ValueError, match="step='lean' needs a model of known structure"):
        list(decode(hybrid, ids, mask, step="lean"))
    with pytest.raises(ValueError, match="compile='compile' needs a model of known structure"):
        list(decode(hybrid, ids, mask, compile="compile"))
    for name, option, value in (("olmoe", "clip_qkv", 0.5), ("deepseek_v3", "rope_interleave", False)):
        model = tiny_model(name)
        plain = reference(model, ids, mask)
        setattr(model.config, option, value)
        run = decode(model, ids, mask)
        found = torch.stack(list(run), 1)
        assert isinstance(run.step, ModelStep)
        assert torch.equal(found, reference(model, ids, mask)) and not torch.equal(found, plain)


def test_rows_of_different_lengths(tokenizer):
    model = tiny_model("mixtral")
    texts = ["it was the", "of the a in it was", "it"]
    found = gemq.generate(model, texts, tokenizer=tokenizer, max_new_tokens=9, ignore_eos=True)
    for text, result in zip(texts, found, strict=True):
        alone = gemq.generate(model, text, tokenizer=tokenizer, max_new_tokens=9, ignore_eos=True)
        assert result.tokens == alone.tokens and result.text == alone.text
        # as it follows the text, with the space
        assert result.text == " " + tokenizer.decode(result.tokens, skip_special_tokens=True)
        assert result.prompt_tokens == len(text.split()) and result.rate > 0 and result.prompt_rate > 0
        assert result.peak_bytes > 10_000_000
    ids, mask = pad_left([[3, 4], [5, 6, 7]])
    by_ids = gemq.generate(model, ids, attention_mask=mask, max_new_tokens=9, ignore_eos=True)
    assert by_ids[0].tokens == gemq.generate(model, torch.tensor([3, 4]), max_new_tokens=9, ignore_eos=True).tokens


def test_what_generate_refuses(tokenizer):
    model = tiny_model("mixtral")
    with pytest.raises(ValueError, match="tokenizer must be given"):
        gemq.generate(model, "it was")
    with pytest.raises(ValueError, match=r"prompt must not be empty \(prompt 1 is\)"):
        gemq.generate(model, ["it was", ""], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no prompts"):
        gemq.generate(model, [], tokenizer=tokenizer)
    with pytest.raises(TypeError, match="unexpected keyword argument 'temprature'"):
        gemq.generate(model, "it was", tokenizer=tokenizer, temprature=1)
    with pytest.raises(TypeError, match=r"token ids \[T\] or \[B, T\], got torch.float32"):
        gemq.generate(model, torch.rand(1, 3))
    with pytest.raises(gemq.CheckpointError, match="no chat template"):
        gemq.generate(model, "it was", tokenizer=tokenizer, chat=True)
    with pytest.raises(ValueError, match="streaming takes one prompt, got 2"):
        gemq.generate(model, ["it", "was"], tokenizer=tokenizer, streamer=lambda t: None)
