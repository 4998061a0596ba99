"""Continuous batching: every continuation is, token for token, what it is alone; errors and ends of single jobs."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from listed_models import listed_model
from served import submitted
from step_models import step_model
from tiny_models import VOCAB, tiny_model
from torch import nn

import gemq
from gemq import ops
from gemq.generation import Decoding, GenerationOptions
from gemq.server import engine as engines
from gemq.server.engine import Closing, Engine, QueueFull
from gemq.server.jobs import End
from gemq.server.prefixes import Prefixes

KINDS = (
    "mixtral", "deepseek_v2_groups", "glm4_moe", "qwen3_5_moe_text", "gpt_oss", "gemma4_text", "nemotron_h",
)
NEW = 12


@pytest.fixture
def made():
    """Makes engines, and closes them."""
    engines: list[Engine] = []

    def make(model: nn.Module, **options) -> Engine:
        engines.append(Engine(model, **{"rows": 3, "slots": 64} | options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close(0.0)


def prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(2, VOCAB, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]


def greedy(new: int = NEW) -> GenerationOptions:
    return GenerationOptions(new, ignore_eos=True)


def alone(model: nn.Module, prompt: list[int], options: GenerationOptions) -> list[int]:
    """The tokens of a generation of one."""
    return torch.stack(list(Decoding(model, torch.tensor([prompt]), None, options, compile="none")), 1)[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_jobs_that_come_and_go_are_what_they_are_alone(kind, made):
    """More jobs than rows, of prompts inside and beyond windows of 16, and of different lengths of answer."""
    ops.set_cpu_activations("int16")
    model = step_model(kind)
    engine = made(model)
    assert engine.rows.kind == "native"
    lengths = {3: 9, 20: 3, 9: 14, 40: 12, 1: 20, 16: 1, 5: 7}
    cases = [(prompt, greedy(new)) for prompt, new in zip(prompts(*lengths), lengths.values(), strict=True)]
    heard = [submitted(engine, *case)[1] for case in cases]
    for listener, case in zip(heard, cases, strict=True):
        assert listener.end == End("length")
        assert listener.tokens == alone(model, *case)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_5_moe_text", "gemma4_text"])
def test_prompts_in_chunks_and_kept_beginnings(kind, made, monkeypatch):
    """A prompt that begins as an earlier one reads the rest alone, to the same bits."""
    monkeypatch.setattr(engines, "CHUNK", 8)
    model, options = step_model(kind), greedy(6)
    first, *others = prompts(30, 3, 5)
    longer = [first, first[:20] + others[0], first + others[1], first[:7] + others[0]]
    kept, fresh = made(model), made(model, prefix_bytes=0)
    for prompt, cached in zip(longer, (0, 0, 24, 0), strict=True):
        job, heard = submitted(kept, prompt, options, logprobs=2)
        other, expected = submitted(fresh, prompt, options, logprobs=2)
        assert heard.end == expected.end == End("length")
        assert heard.events == expected.events
        assert (job.cached, other.cached) == (cached, 0)


def test_unpacked_models_take_the_lean_step(made):
    model = tiny_model("mixtral")
    engine = made(model)
    assert engine.rows.kind == "lean" and "not packed" in engine.rows.reason
    cases = prompts(4, 11, 2, 7)
    heard = [submitted(engine, prompt, greedy())[1] for prompt in cases]
    for listener, prompt in zip(heard, cases, strict=True):
        assert listener.end == End("length") and listener.tokens == alone(model, prompt, greedy())


def test_samples_depend_on_the_seed_alone(made):
    engine, (prompt,) = made(step_model("mixtral")), prompts(6)
    options = [GenerationOptions(NEW, temperature=1.5, seed=seed, ignore_eos=True) for seed in (1, 2, 1)]
    heard = [submitted(engine, prompt, each)[1] for each in options]
    assert all(listener.end == End("length") for listener in heard)
    assert heard[0].tokens == heard[2].tokens != heard[1].tokens


def test_log_probabilities_are_the_models(made):
    model, (prompt,) = step_model("mixtral"), prompts(6)
    ops.set_cpu_activations("exact")
    _, heard = submitted(made(model), prompt, greedy(4), logprobs=3)
    assert heard.end == End("length")
    with torch.inference_mode():
        text = torch.tensor([prompt + heard.tokens])
        expected = model(text).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    for token, row in zip(heard.events, expected, strict=False):
        assert token.logprob == pytest.approx(float(row[token.token]), abs=1e-4)
        assert [best for best, _ in token.top] == row.topk(3).indices.tolist()


def test_end_tokens_stop(made):
    model, (prompt,) = step_model("mixtral"), prompts(6)
    tokens = alone(model, prompt, greedy())
    options = GenerationOptions(NEW, eos_token_id=tokens[4])
    _, heard = submitted(made(model), prompt, options)
    assert heard.end == End("stop") and heard.tokens == tokens[: tokens.index(tokens[4])]


def test_cancelled_and_late_jobs_leave_the_others_alone(made):
    model = step_model("mixtral")
    engine, (a, b, c) = made(model), prompts(5, 6, 7)
    stays, heard = submitted(engine, a, greedy(50))
    leaves, gone = submitted(engine, b, greedy(50))
    _, late = submitted(engine, c, greedy(50), deadline=time.monotonic() - 1)
    leaves.cancel()
    assert gone.end == End("cancelled") and late.end.reason == "timeout"
    assert heard.end == End("length") and heard.tokens == alone(model, a, greedy(50))
    assert not engine.busy and not stays.cancelled


def test_scores_that_are_nan_end_their_job_alone(made):
    model = copy.deepcopy(step_model("mixtral"))
    model.model.embed_tokens.weight.data[5] = torch.nan
    engine, (a, b) = made(model), prompts(5, 6)
    a, b = ([6 if token == 5 else token for token in prompt] for prompt in (a, b))
    _, good = submitted(engine, a, greedy())
    _, bad = submitted(engine, [*b, 5], greedy())
    assert bad.end == End("error", "the model's scores are NaN or infinite")
    assert good.end == End("length") and len(good.tokens) == NEW


def test_an_error_in_a_prompt_or_step_ends_what_it_concerns(made, monkeypatch):
    engine, (a, b, c) = made(step_model("mixtral")), prompts(5, 6, 7)
    feed = engines.feed

    def failing(model, tokens, *rest):
        if len(tokens) == 6:
            raise torch.OutOfMemoryError("no memory")
        return feed(model, tokens, *rest)

    monkeypatch.setattr(engines, "feed", failing)
    _, good = submitted(engine, a, greedy(30))
    _, bad = submitted(engine, b, greedy())
    assert bad.end == End("error", "out of memory: try a shorter prompt")
    assert good.end == End("length")
    step = engine.rows.step
    monkeypatch.setattr(engine.rows, "step", lambda *_: 1 / 0)
    _, broken = submitted(engine, c, greedy())
    assert broken.end == End("error", "division by zero")
    monkeypatch.setattr(engine.rows, "step", step)
    _, after = submitted(engine, c, greedy())
    assert after.end == End("length")


def test_an_error_at_the_first_token_or_in_one_row(made, monkeypatch):
    """The job of the row ends once, and no row without a token is decoded."""
    engine, (a, b) = made(step_model("mixtral")), prompts(5, 6)
    advance = engine._advance

    def failing(row, logits):
        if len(row.job.prompt) == 6:
            raise RuntimeError("no sample")
        advance(row, logits)

    monkeypatch.setattr(engine, "_advance", failing)
    _, good = submitted(engine, a, greedy(30))
    _, bad = submitted(engine, b, greedy())
    assert bad.end == End("error", "no sample") and good.end == End("length")
    assert bad.events == [bad.end] and len(good.tokens) == 30 and not engine.busy


def test_a_full_queue_and_an_end(made, monkeypatch):
    engine, (prompt,) = made(step_model("mixtral"), queue=2), prompts(5)
    slow = engine.rows.step
    monkeypatch.setattr(engine.rows, "step", lambda *given: (time.sleep(0.02), slow(*given))[1])
    heard = []
    with pytest.raises(QueueFull, match="2 requests wait already; try again later"):
        for _ in range(20):
            heard.append(submitted(engine, prompt, greedy(20))[1])
    engine.close(30.0)
    assert all(listener.end == End("length") for listener in heard)
    with pytest.raises(Closing, match="the server is stopping"):
        submitted(engine, prompt, greedy())


@pytest.mark.parametrize("prompt, new, message", [
    ([], 4, "the prompt must not be empty"),
    ([5] * 60, 5, "60 tokens, and 5 new ones were asked for; this server holds 64"),
    ([96], 4, r"input_ids must be in 0..95, got 96"), ([-1], 4, r"input_ids must be in 0..95, got -1"),
])
def test_jobs_that_do_not_fit(made, prompt, new, message):
    with pytest.raises(ValueError, match=message):
        submitted(made(step_model("mixtral")), prompt, greedy(new))


def test_models_that_cannot_be_batched():
    with pytest.raises(gemq.UnsupportedModelError, match=r"gemq serve decodes rows .*was not compared"):
        Engine(listed_model("lfm2_moe"))
    with pytest.raises(gemq.OutOfMemoryError, match="a cache of 16 x 1000000000 tokens"):
        Engine(step_model("mixtral"), rows=16, slots=10**9)


def test_beginnings_used_longest_ago_are_let_go():
    class Cache:
        def __init__(self, size: int):
            self.layers = [type("Layer", (), {"__init__": lambda s: s.__dict__.update(keys=torch.zeros(size))})()]

    kept = Prefixes(1000, 4)
    for start in (0, 10, 20):
        kept.keep([start, 1, 2, 3], Cache(80))
        kept.longest([0, 1, 2, 3, 9])
    assert kept.held == 960
    kept.keep([30, 1, 2, 3], Cache(80))
    found = {start: kept.longest([start, 1, 2, 3, 9])[0] for start in (0, 10, 20, 30)}
    assert found == {0: 4, 10: 0, 20: 4, 30: 4}
    kept.keep([40, 1, 2, 3], Cache(300))
    assert kept.longest([40, 1, 2, 3, 9]) == (0, None)
    # the whole prompt is never taken: its last token gives the first new one
    assert kept.longest([0, 1, 2, 3]) == (0, None)
