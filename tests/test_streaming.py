"""Text as it is made: streamers, pieces, interrupts, the command line, chat."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from tiny_models import tiny_model
from transformers import TextStreamer

import gemq
from gemq.cli import answers as commands
from gemq.generation import Conversation, Decoding

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}of {% endif %}"
)


@pytest.fixture(scope="module")
def model():
    return tiny_model("mixtral")


class Recorder:
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended += 1


def test_a_streamer_gets_what_transformers_gives(model, tokenizer):
    ours, theirs = Recorder(), Recorder()
    result = gemq.generate(model, "it was the", tokenizer=tokenizer, max_new_tokens=7, ignore_eos=True, streamer=ours)
    ids = tokenizer("it was the", return_tensors="pt").input_ids
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False, eos_token_id=None, pad_token_id=0,
        streamer=theirs,
    )
    assert [v.tolist() for v in ours.values] == [v.tolist() for v in theirs.values]
    assert ours.ended == theirs.ended == 1
    assert [int(v) for v in ours.values[1:]] == list(result.tokens)


def test_a_text_streamer_prints_the_text(model, tokenizer, capsys):
    result = gemq.generate(
        model, "it was the", tokenizer=tokenizer, max_new_tokens=9, ignore_eos=True,
        streamer=lambda t: TextStreamer(t, skip_prompt=True, skip_special_tokens=True),
    )
    assert capsys.readouterr().out == result.text.strip() + "\n"


def test_pieces_make_the_text(model, tokenizer):
    options = {"tokenizer": tokenizer, "max_new_tokens": 12, "ignore_eos": True}
    pieces = list(gemq.stream(model, "it was the", **options))
    assert "".join(pieces) == gemq.generate(model, "it was the", **options).text
    assert len(pieces) > 5
    with pytest.raises(ValueError, match="max_new_tokens must be at most"):
        # at the call, not at the first piece
        gemq.stream(model, "it was the", tokenizer=tokenizer, max_new_tokens=500)


def test_closing_the_pieces_stops_the_work(model, tokenizer, monkeypatch):
    steps = []
    plain = Decoding._step
    monkeypatch.setattr(Decoding, "_step", lambda self: (steps.append(1), plain(self)))
    pieces = gemq.stream(model, "it was the", tokenizer=tokenizer, max_new_tokens=50, ignore_eos=True)
    next(pieces)
    pieces.close()
    assert len(steps) < 5


def test_an_interrupt_flushes_the_text(model, tokenizer, monkeypatch, capsys):
    plain, steps = Decoding._step, []

    def step(self):
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        plain(self)

    monkeypatch.setattr(Decoding, "_step", step)
    with pytest.raises(KeyboardInterrupt):
        gemq.generate(
            model, "it was the", tokenizer=tokenizer, max_new_tokens=50, ignore_eos=True,
            streamer=lambda t: TextStreamer(t, skip_prompt=True),
        )
    assert len(capsys.readouterr().out.split()) == 5


def test_generate_reports_speed_and_memory(gemq_run, model_folder):
    code, out, err = gemq_run("generate", model_folder, "it was", "--max-new-tokens", "6")
    assert code == 0 and out.startswith("it was ") and len(out.split()) == 8
    assert re.search(r"prompt: 2 tokens, [\d,.]+ tokens/s\n", err)
    assert re.search(r"generation: 6 tokens, [\d,.]+ tokens/s after the first; [\d.]+ s with the prompt\n", err)
    assert re.search(r"peak memory: [\d.]+ [MG]B\n", err)


def test_generate_options_reach_the_sampler(gemq_run, model_folder):
    def text(*options):
        code, out, _ = gemq_run("generate", model_folder, "it was", "--max-new-tokens", "12", *options)
        assert code == 0
        return out

    greedy = text()
    assert text("--temperature", "2", "--top-k", "1") == greedy
    assert text("--temperature", "2", "--top-p", "0.00001") == greedy
    assert text("--temperature", "2", "--min-p", "1") == greedy
    assert text("--temperature", "2") != greedy
    assert text("--repetition-penalty", "3") != greedy
    assert text("--compile", "none") == greedy


@pytest.mark.parametrize("options, message", [
    (["--max-new-tokens", "500"], "max_new_tokens must be at most 126 after a prompt of 2 tokens"),
    (["--chat"], "the tokenizer has no chat template"),
    (["--compile", "graph", "--device", "cpu"], "compile='graph' needs a CUDA device"),
    (["--temperature", "-1"], "temperature must be at least 0, got -1"),
    (["--max-new-tokens", "0"], "max-new-tokens"),
])  # fmt: skip
def test_generate_refuses(gemq_run, model_folder, options, message):
    code, out, err = gemq_run("generate", model_folder, "it was", *options)
    assert code == 2 and out == "" and message in " ".join(err.split())


def test_no_tokenizer(gemq_run, model_folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    code, _, err = gemq_run("generate", tmp_path, "it was")
    assert code == 2 and "no tokenizer" in err


@pytest.fixture
def process(model_folder):
    """``gemq generate`` with endless text in a process of its own."""

    def start(new="120"):
        arguments = ["generate", str(model_folder), "it was", "--max-new-tokens", new, "--ignore-eos"]
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "gemq", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    return start


def test_a_closed_pipe_is_quiet(process):
    child = process()
    assert child.stdout.read(9)
    child.stdout.close()
    err = child.stderr.read().decode()
    assert child.wait(60) == 0 and "Error" not in err and "Traceback" not in err
    child.stderr.close()


SLOW = """
import signal, sys, time
# a shell that runs the tests in the background has its children ignore interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)
from gemq.generation import Decoding
plain = Decoding._step
def slow(self):
    time.sleep(0.2)
    plain(self)
Decoding._step = slow
from gemq.cli import main
sys.argv = ["gemq", *sys.argv[1:]]
main()
"""


def test_ctrl_c_leaves_with_130_and_the_text_so_far(model_folder):
    arguments = ["generate", str(model_folder), "it was", "--max-new-tokens", "100", "--ignore-eos"]
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", SLOW, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    first = child.stdout.read(12)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    text = (first + out).decode()
    assert child.returncode == 130 and "interrupted" in err.decode() and "Traceback" not in err.decode()
    assert text.startswith("it was ") and text.endswith("\n") and 3 <= len(text.split()) < 50


def chat(monkeypatch, gemq_run, folder, *lines, options=()):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    return gemq_run("chat", folder, "--max-new-tokens", "6", *options)


def test_chat_in_plain_lines(monkeypatch, gemq_run, model_folder):
    code, out, err = chat(monkeypatch, gemq_run, model_folder, "it was", "", "/clear", "it was", "/help", "/exit", "no")
    assert code == 0
    answers = out.splitlines()
    # the same answer after /clear, none after /exit
    assert len(answers) == 2 and answers[0] == answers[1] and len(answers[0].split()) == 6
    assert "no chat template" in err and "forgotten" in err and "unknown command /help" in err


def test_a_conversation_goes_on(monkeypatch, gemq_run, model_folder):
    seen = []
    plain = commands.stream_row
    monkeypatch.setattr(commands, "stream_row", lambda *a, **k: (seen.append(len(a[2])), plain(*a, **k))[1])
    code, out, _ = chat(monkeypatch, gemq_run, model_folder, "it was", "the", options=["--system", "of"])
    assert code == 0 and len(out.splitlines()) == 2
    # System: of User: it was Assistant:, then the 6 words of the answer and User: the Assistant:
    assert seen == [6, 6 + 6 + 3]


def test_chat_uses_the_template(tokenizer):
    import copy

    templated = copy.deepcopy(tokenizer)
    templated.chat_template = TEMPLATE
    conversation = Conversation(templated, "he")
    conversation.add("user", "it was")
    assert conversation.templated and conversation.stop == ()
    expected = tokenizer("system he user it was of", add_special_tokens=False)["input_ids"]
    assert conversation.tokens() == expected
    result = gemq.generate(tiny_model("mixtral"), "it was", tokenizer=templated, chat=True, max_new_tokens=3)
    assert result.prompt_tokens == 4
    templated.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(gemq.CheckpointError, match="chat template of the tokenizer failed: roles must alternate"):
        conversation.tokens()


def test_plain_answers_end_at_the_next_user(tokenizer):
    conversation = Conversation(tokenizer)
    said = commands._Said(conversation)
    assert not said.hear("it was") and not said.hear(" so\nUs")
    assert said.hear("er: what") and said.finish() == "it was so"


def test_the_start_of_a_stop_text_is_held_back(tokenizer, capsys):
    said = commands._Said(Conversation(tokenizer))
    said.hear("it was so\nUs")
    assert capsys.readouterr().out == "it was"
    said.hear("er:")
    assert said.finish() == "it was so" and capsys.readouterr().out == " so\n"


def test_ctrl_c_stops_an_answer_then_leaves(monkeypatch, gemq_run, model_folder):
    steps, plain = [], Decoding._step

    def step(self):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        plain(self)

    monkeypatch.setattr(Decoding, "_step", step)
    code, out, err = chat(monkeypatch, gemq_run, model_folder, "it was", "the")
    assert code == 0 and "stopped" in err
    assert [len(line.split()) for line in out.splitlines()] == [3, 6]

    class Interrupted:
        def readline(self):
            raise KeyboardInterrupt

        def isatty(self):
            return False

    monkeypatch.setattr(sys, "stdin", Interrupted())
    code, _, err = gemq_run("chat", model_folder)
    assert code == 130 and "interrupted" in err


def test_a_full_conversation(monkeypatch, gemq_run, model_folder):
    long = " ".join(["it"] * 130)
    code, out, err = chat(monkeypatch, gemq_run, model_folder, long, "it was")
    assert code == 0 and len(out.splitlines()) == 1
    assert "128 positions: /clear to go on" in err
