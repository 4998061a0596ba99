"""Decoding at the edges: ends that are no tokens, extreme options, broken models, iterators side by side, streaming."""

from __future__ import annotations

import copy
import random
import time

import pytest
import torch
from test_token_stream import made
from tiny_models import VOCAB, random_windows, tiny_model
from transformers import TextStreamer

import gemq
from gemq.cli import answers as commands
from gemq.cli.escapes import printable
from gemq.generation import Conversation, Decoding, GenerationOptions, sampling
from gemq.generation.streaming import ContinuationStreamer, Pieces
from gemq.generation.text import continuation

NEW = 12


@pytest.fixture(scope="module")
def shared():
    return tiny_model("mixtral")


@pytest.fixture
def model(shared):
    return copy.deepcopy(shared)


def tokens(model, ids, mask=None, **options):
    return torch.stack(list(Decoding(model, ids, mask, GenerationOptions(NEW, **options))), 1)


@pytest.mark.parametrize("pad", [VOCAB, VOCAB + 1000, -1, None])
def test_a_padding_token_that_is_no_row(model, pad):
    """A row that has ended is fed with padding while others go on."""
    ids = random_windows(3, 6, 2)
    free = tokens(model, ids, ignore_eos=True)
    end = int(free[0, 3])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [end, VOCAB + 3, -5], pad
    found = tokens(model, ids)
    first = free[0].tolist().index(end)
    assert found[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert (found[0, first:] == end).all() and int(found.max()) < VOCAB and int(found.min()) >= 0


def test_an_end_token_that_is_no_row_never_comes(model):
    model.generation_config.eos_token_id = [VOCAB, -1, VOCAB + 7]
    model.generation_config.pad_token_id = 5
    run = Decoding(model, random_windows(1, 6, 2), None, GenerationOptions(NEW))
    assert run.eos == () and run.pad == 5 and len(list(run)) == NEW


@pytest.mark.parametrize("field", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [2.5, "2", True, [1, [2]], [1.5], {"a": 1}])
def test_a_generation_config_of_other_things(model, field, value):
    setattr(model.generation_config, field, value)
    with pytest.raises(gemq.CheckpointError, match=f"{field} in the model's generation_config.json must be a token id"):
        Decoding(model, random_windows(1, 6, 2))
    given = {"eos_token_id": 3, "pad_token_id": 3}
    Decoding(model, random_windows(1, 6, 2), None, GenerationOptions(2, **given))


@pytest.mark.parametrize("options, message", [
    ({"eos_token_id": VOCAB}, "eos_token_id must be in 0..95, got 96"),
    ({"eos_token_id": [3, 10**40]}, "eos_token_id must be in 0..95, got a number of many digits"),
    ({"pad_token_id": VOCAB}, "pad_token_id must be in 0..95, got 96"),
])  # fmt: skip
def test_ends_that_are_given_are_rows(model, options, message):
    with pytest.raises(ValueError, match=message):
        Decoding(model, random_windows(1, 6, 2), None, GenerationOptions(**options))


@pytest.mark.parametrize("options, error, message", [
    ({"seed": 2**64}, ValueError, r"seed must be in 0..18446744073709551615, got 18446744073709551616"),
    ({"seed": -1}, ValueError, r"seed must be in 0..18446744073709551615, got -1"),
    ({"seed": 10**5000}, ValueError, "got a number of many digits"),
    ({"temperature": 10**400}, ValueError, "temperature must be at least 0, got inf"),
    ({"repetition_penalty": 10**400}, ValueError, "repetition_penalty must be above 0, got inf"),
    ({"eos_token_id": 2.5}, TypeError, "eos_token_id must be a whole number, got 2.5"),
    ({"eos_token_id": "2"}, TypeError, "eos_token_id must be a whole number, got '2'"),
    ({"eos_token_id": [1, "2"]}, TypeError, "eos_token_id must be a whole number, got '2'"),
])  # fmt: skip
def test_options_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        GenerationOptions(**options)
    GenerationOptions(seed=2**64 - 1)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-45, 1e-30, 1e-7])
@pytest.mark.parametrize("others", [{}, {"top_k": 5}, {"top_p": 1e-300}, {"min_p": 1.0}, {"repetition_penalty": 1.3}])
def test_small_temperatures_are_greedy(shared, temperature, others):
    ids = random_windows(3, 6, 2)
    greedy = {k: v for k, v in others.items() if k == "repetition_penalty"}
    assert torch.equal(tokens(shared, ids, temperature=temperature, **others), tokens(shared, ids, **greedy))


@pytest.mark.parametrize("options", [
    {"temperature": 1e30}, {"temperature": 1.7e308}, {"temperature": 1e300, "top_k": 3},
    {"temperature": 1e-45, "repetition_penalty": 1e30}, {"repetition_penalty": 1e300}, {"repetition_penalty": 5e-324},
    {"temperature": 1.0, "repetition_penalty": 1e-300}, {"temperature": 1.0, "top_p": 5e-324},
    {"temperature": 3.0, "min_p": 1.0}, {"temperature": 1e5, "top_p": 0.999, "min_p": 1e-300, "top_k": 10**30},
])  # fmt: skip
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_extreme_options_give_tokens(shared, options, seed):
    found = tokens(shared, random_windows(4, 6, 2), seed=seed, **options)
    assert found.shape == (4, NEW) and int(found.min()) >= 0 and int(found.max()) < VOCAB


def draw(scores, rows, **options):
    prompt = torch.zeros(rows, 1, dtype=torch.long)
    sampler = sampling.Sampler(GenerationOptions(**options), prompt, torch.ones_like(prompt), scores.numel())
    drawn, best = sampler(scores.expand(rows, -1))
    return drawn, ~best.isfinite()


def test_a_high_temperature_is_uniform_over_what_is_possible():
    scores = torch.tensor([3.0, -torch.inf, 1e30, -40.0])
    drawn, broken = draw(scores, 20_000, temperature=1e200, seed=1)
    share = drawn.bincount(minlength=4) / 20_000
    assert not broken.any() and share[1] == 0 and (share[[0, 2, 3]] - 1 / 3).abs().max() < 0.02


@pytest.mark.parametrize("penalty, best", [(1e30, 2), (1e-30, 1), (1e-300, 1), (1e300, 2)])
def test_penalties_keep_the_order_of_scores(penalty, best):
    """Of two seen tokens whose scores would both be infinite, the better one."""
    scores = torch.tensor([[2.0, 3.0, -1.0, -3.0]])
    prompt = torch.tensor([[0, 1, 3]])
    sampler = sampling.Sampler(
        GenerationOptions(repetition_penalty=penalty), prompt, torch.ones_like(prompt), 4
    )
    found, best_score = sampler(scores)
    assert best_score.isfinite()
    assert int(found) == (best if penalty < 1 else 1)


def test_no_token_without_a_probability_is_drawn(monkeypatch):
    """A noise of 0 makes 0 / 0 of it, the largest of all to argmax."""
    plain = torch.Tensor.exponential_

    def zeros(self, *arguments, **options):
        noise = plain(self, *arguments, **options)
        noise[:, 5:] = 0
        return noise

    monkeypatch.setattr(torch.Tensor, "exponential_", zeros)
    drawn, _ = draw(torch.arange(50, 0, -1).float(), 500, temperature=1.0, top_k=5)
    assert int(drawn.max()) < 5


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}])
@pytest.mark.parametrize("bad", [[torch.nan, 1.0, 2.0], [torch.inf, 1.0, 2.0], [-torch.inf] * 3])
def test_scores_that_are_no_numbers_are_noticed(options, bad):
    _, broken = draw(torch.tensor(bad), 3, **options)
    assert broken.all()
    _, broken = draw(torch.tensor([-torch.inf, 1.0, -3.4e38]), 3, **options)
    assert not broken.any()


def test_a_model_that_breaks_later(model):
    """At the step whose input is the token that breaks it, by name of the row."""
    ids = random_windows(2, 6, 2)
    free = tokens(model, ids, ignore_eos=True)
    token = next(int(t) for t in free[1, 2:] if int(t) not in free[0] and int(t) not in ids)
    at = free[1].tolist().index(token)
    model.model.embed_tokens.weight.data[token] = torch.nan
    found = []
    with pytest.raises(gemq.GemqError, match=f"scores after {6 + at + 1} tokens of row 1 are NaN or infinite"):
        for new in Decoding(model, ids, None, GenerationOptions(NEW, ignore_eos=True)):
            found.append(new)
    assert torch.equal(torch.stack(found, 1), free[:, : at + 1])


def test_iterators_side_by_side(shared):
    ids = random_windows(2, 6, 2)
    run = Decoding(shared, ids, None, GenerationOptions(NEW, temperature=1.1, ignore_eos=True))
    alone = torch.stack(list(run))
    pairs = list(zip(run, run, iter(run), strict=True))
    for column in range(3):
        assert torch.equal(torch.stack([row[column] for row in pairs]), alone)
    first = iter(run)
    head = [next(first), next(first)]
    assert torch.equal(torch.stack(list(run)), alone)
    assert torch.equal(torch.stack([*head, *first]), alone)
    abandoned = iter(run)
    next(abandoned)
    assert torch.equal(torch.stack(list(run)), alone) and torch.equal(torch.stack(list(abandoned)), alone[1:])


@pytest.mark.parametrize("template", ["", "{% if false %}x{% endif %}"])
def test_a_template_that_makes_nothing(model, tokenizer, template):
    templated = copy.deepcopy(tokenizer)
    templated.chat_template = template or "{# nothing #}"
    with pytest.raises(gemq.CheckpointError, match="chat template of the tokenizer makes no text"):
        gemq.generate(model, "it was", tokenizer=templated, chat=True)
    conversation = Conversation(templated)
    conversation.add("user", "it was")
    with pytest.raises(gemq.CheckpointError, match="makes no text"):
        conversation.tokens()
    templated.chat_template = " "
    with pytest.raises(ValueError, match="prompt must not be empty"):
        gemq.generate(model, "it was", tokenizer=templated, chat=True)


def test_prompts_that_are_no_text(model, tokenizer):
    with pytest.raises(ValueError, match="the text must be Unicode, got half a surrogate pair at character 3"):
        gemq.generate(model, "it \udcff", tokenizer=tokenizer)
    with pytest.raises(TypeError, match="prompt must be a text or texts, got int"):
        gemq.generate(model, ["it", 3], tokenizer=tokenizer)


def test_a_prompt_too_long_is_told_before_weights_are_read(model_folder, monkeypatch):
    from gemq import continuation as calls

    monkeypatch.setattr(calls, "load_any", lambda *a: pytest.fail("the model was loaded"))
    for call in (gemq.generate, gemq.stream):
        with pytest.raises(ValueError, match="the prompt has 130 tokens, the model only 128 positions"):
            call(str(model_folder), "it " * 130)
        with pytest.raises(ValueError, match="max_new_tokens must be at most 126"):
            call(str(model_folder), "it was", max_new_tokens=127)


TEXTS = [
    "It was a dark night; the rain fell in torrents.\n\n  and then\tthere  was   none.\n",
    "漢字仮名交じり文。そして 終わり\n", "é👩‍👧 naïve ∑ 𝔘 €", "x" * 300, " " * 90 + "a", "\n" * 50,
    "a-long-word-" * 40 + " end",
]


def streamed(tokenizer, prompt, new):
    pieces = Pieces(tokenizer)
    pieces.put(torch.tensor([prompt]))
    found = []
    for token in new:
        pieces.put(torch.tensor([token]))
        found.append(pieces.take())
    pieces.end()
    return [*found, pieces.take()]


@pytest.mark.parametrize("name", ["bytes", "one word", "unigram", "word pieces", "words"])
def test_streamed_text_is_the_whole_text(name):
    tokenizer, rng = made(name), random.Random(0)
    for seed in range(6):
        text = "".join(rng.choices(TEXTS, k=8))
        prompt = tokenizer("the " * (1 + 9 * seed) + "end of", add_special_tokens=False)["input_ids"]
        new = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = streamed(tokenizer, prompt, new)
        assert "".join(found) == continuation(tokenizer, prompt, new)


@pytest.mark.parametrize("name", ["bytes", "unigram"])
def test_streamed_pieces_are_those_of_transformers(name):
    """The same places, as long as nothing is let go and no line has ended."""
    tokenizer = made(name)
    new = tokenizer("It was a dark night and the rain fell", add_special_tokens=False)["input_ids"][:40]

    class Theirs(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            self.last = text

    theirs, expected = Theirs(tokenizer), []
    for token in new:
        theirs.put(torch.tensor([token]))
        expected.append(theirs.last)
    theirs.end()
    found = streamed(tokenizer, [], new)
    assert [p.strip() for p in found] == [p.strip() for p in [*expected, theirs.last]]


def test_random_bytes_stream_to_their_text():
    """Bytes that are no character end as they would in the whole, and hold up nothing for long."""
    tokenizer, rng = made("bytes"), random.Random(1)
    new = [rng.randrange(len(tokenizer)) for _ in range(1500)]
    new = [t for t in new if t != tokenizer.unk_token_id]
    found = streamed(tokenizer, new[:20], new[20:])
    assert "".join(found) == continuation(tokenizer, new[:20], new[20:])


@pytest.mark.parametrize("text", ["word", "x", " a b", "漢", "\n"])
def test_streaming_takes_no_longer_at_the_end(text):
    tokenizer = made("bytes")
    new = tokenizer(text * 9000, add_special_tokens=False)["input_ids"][:6000]
    decoded, plain = [], tokenizer.decode

    class Counting(ContinuationStreamer):
        def _text(self, tokens):
            decoded.append(len(tokens))
            return plain(tokens, **self.decode_kwargs)

        def on_finalized_text(self, text, stream_end=False):
            pass

    streamer = Counting(tokenizer)
    streamer.put(torch.tensor([[5, 6]]))
    for token in new:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert max(decoded) <= 64 and sum(decoded) < 80 * len(new)


def test_an_answer_takes_no_longer_at_its_end(tokenizer, capsys):
    said = commands._Said(Conversation(tokenizer))
    started = time.monotonic()
    for _ in range(200_000):
        assert not said.hear("it was ")
    assert said.hear("so\nUser: the") and time.monotonic() - started < 20
    answer = said.finish()
    assert answer.endswith("was so") and len(answer) == 7 * 200_000 + 2
    assert capsys.readouterr().out == answer + "\n"


def test_a_stop_text_in_pieces(tokenizer, capsys):
    for cut in range(1, 12):
        said = commands._Said(Conversation(tokenizer))
        text = "it was so\nUser: what"
        pieces = [text[i : i + cut] for i in range(0, len(text), cut)]
        for piece in pieces:
            if said.hear(piece):
                break
        assert said.finish() == "it was so" and capsys.readouterr().out == "it was so\n"


HOSTILE = "a\x1b[31mb\rc\x07\x9b2J\u202ed\u2066\u2028\x00\x7f"
SHOWN = r"a\x1b[31mb\rc\x07\x9b2J\u202ed\u2066\u2028\x00\x7f"


def test_printable():
    assert printable(HOSTILE) == SHOWN
    assert printable("a\tb\nc") == "a\tb\nc" and printable("a\tb\nc", keep="") == r"a\tb\nc"
    assert printable("\udc80\u200e\u061c\ufeff") == r"\udc80\u200e\u061c\ufeff"
    harmless = "é e\u0301 漢 👩‍👧 🏴\U000e0067\U000e007f \u00a0\u3000 می\u200cخواهم हिन्दी \U0001fae8 \ue000"
    assert printable(harmless) == harmless


class _Speaks:
    """A tokenizer whose every token is what a terminal would obey."""

    def __init__(self, plain):
        self.plain = plain

    def __getattr__(self, name):
        return getattr(self.plain, name)

    def __call__(self, *arguments, **options):
        return self.plain(*arguments, **options)

    def decode(self, tokens, **options):
        return HOSTILE * len(tokens)


@pytest.mark.parametrize("prompts", [["it was"], ["it was", "the"]])
def test_the_terminal_obeys_no_model(gemq_run, model_folder, tokenizer, monkeypatch, prompts):
    from gemq import continuation as calls

    monkeypatch.setattr(calls, "load_tokenizer", lambda path: _Speaks(tokenizer))
    code, out, _ = gemq_run("generate", model_folder, *prompts, "--max-new-tokens", "3")
    assert code == 0 and "a\\x1b[31mb" in out
    assert not [c for c in out if not c.isprintable() and c != "\n"]


def test_chat_obeys_no_model(gemq_run, model_folder, tokenizer, monkeypatch):
    import io
    import sys

    monkeypatch.setattr(commands, "load_tokenizer", lambda path: _Speaks(tokenizer))
    monkeypatch.setattr(sys, "stdin", io.StringIO("it was\n"))
    code, out, err = gemq_run("chat", model_folder, "--max-new-tokens", "3")
    assert code == 0 and "\\x1b[31mb" in out and "decoding step: lean" in err
    assert not [c for c in out if not c.isprintable() and c != "\n"]


def test_the_step_is_told_once(gemq_run, model_folder):
    _, out, err = gemq_run("generate", model_folder, "it was", "--max-new-tokens", "3")
    text = " ".join(err.split())
    assert text.count("decoding step: lean (the experts are MixtralExperts, not packed)") == 1 and "step" not in out
    found = gemq.generate(str(model_folder), "it was", max_new_tokens=3)
    assert found.step == "lean" and found.step_reason == "the experts are MixtralExperts, not packed"
    assert gemq.generate(str(model_folder), "it was", max_new_tokens=1).step is None
