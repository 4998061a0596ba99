"""``gemq serve`` over loopback, with the real openai client and curl."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import time
from contextlib import closing
from typing import Any

import openai
import pytest
import torch
from served import NAME, serving
from step_models import step_model
from tiny_text import word_tokenizer, words

from gemq.generation import Decoding, GenerationOptions
from gemq.server.answers import Answer
from gemq.server.jobs import Token


@pytest.fixture(scope="module")
def server():
    with serving(step_model("mixtral"), word_tokenizer()) as found:
        yield found


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="any", max_retries=0) as found:
        yield found


def expected(prompt: str, new: int) -> str:
    tokenizer = word_tokenizer()
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    found = torch.stack(list(Decoding(step_model("mixtral"), ids, None, GenerationOptions(new), compile="none")), 1)[0]
    return tokenizer.decode([token for token in found.tolist() if token != tokenizer.eos_token_id])


def post(address: str, path: str, body: Any, headers: dict[str, str] | None = None) -> tuple[int, dict]:
    """Status and JSON of a request whose body is sent as it is, if it is bytes."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with closing(connection):
        connection.request("POST", path, data, {"Content-Type": "application/json"} | (headers or {}))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def test_completions(client):
    prompt = words(6, 1)
    found = client.completions.create(model=NAME, prompt=prompt, max_tokens=8, temperature=0)
    assert found.choices[0].text.strip() == expected(prompt, 8)
    assert found.choices[0].finish_reason in ("length", "stop")
    assert found.usage.prompt_tokens == 6 and found.usage.total_tokens == 6 + found.usage.completion_tokens
    ids = word_tokenizer()(prompt)["input_ids"]
    assert client.completions.create(model=NAME, prompt=ids, max_tokens=8, temperature=0).choices[0].text == (
        found.choices[0].text)


def test_streams_are_what_is_answered_at_once(client):
    asked = {"model": NAME, "prompt": words(5, 2), "max_tokens": 10, "temperature": 0.8, "seed": 7, "n": 2}
    whole = client.completions.create(**asked)
    texts, ends, usage = ["", ""], ["", ""], None
    for chunk in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.text for choice in whole.choices] and texts[0] != texts[1]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_chat(client):
    asked = {"model": NAME, "messages": [{"role": "system", "content": "the"}, {"role": "user", "content": [
        {"type": "text", "text": words(4, 3)}]}], "max_completion_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    message = whole.choices[0].message
    assert message.role == "assistant" and message.content
    told = whole.choices[0].logprobs.content
    assert len(told) == whole.usage.completion_tokens and all(len(entry.top_logprobs) == 3 for entry in told)
    assert all(entry.logprob == entry.top_logprobs[0].logprob <= 0 for entry in told)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_stop_texts_end_an_answer(client):
    prompt = words(6, 1)
    text = client.completions.create(model=NAME, prompt=prompt, max_tokens=9, temperature=0).choices[0].text
    stop = text.split()[3]
    found = client.completions.create(model=NAME, prompt=prompt, max_tokens=9, temperature=0, stop=[stop, "zzz"])
    assert found.choices[0].finish_reason == "stop" and found.choices[0].text == text[: text.index(stop)]
    parts = client.completions.create(model=NAME, prompt=prompt, max_tokens=9, temperature=0, stop=stop, stream=True)
    assert "".join(part.choices[0].text for part in parts) == found.choices[0].text


def test_completion_log_probabilities(client):
    asked = {"model": NAME, "prompt": words(6, 1), "max_tokens": 5, "temperature": 0}
    told = client.completions.create(**asked, logprobs=2).choices[0].logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
    assert all(max(top, key=top.get) == token for token, top in zip(told.tokens, told.top_logprobs, strict=True))


def test_what_a_server_tells_of_itself(server, client):
    address, engine = server
    (model,) = client.models.list().data
    assert model.id == NAME and client.models.retrieve(NAME).id == NAME and model.max_model_len == engine.slots
    with pytest.raises(openai.NotFoundError, match="there is no model 'other'; this server has 'tiny'"):
        client.models.retrieve("other")
    if curl := shutil.which("curl"):
        health = subprocess.run([curl, "-sf", f"{address}/health"], capture_output=True, check=True).stdout
        assert json.loads(health) == {"status": "ok", "running": 0, "waiting": 0}
        text = subprocess.run([curl, "-sf", f"{address}/metrics"], capture_output=True, check=True, text=True).stdout
        assert float(re.search(r"^gemq_generated_tokens_total (\S+)$", text, re.M)[1]) > 0
        assert "gemq_running_requests 0.0" in text


@pytest.mark.parametrize("changes, status, message", [
    ({"model": "other"}, 404, "there is no model 'other'; this server has 'tiny'"),
    ({"model": 5}, 400, "model: Input should be a valid string"),
    ({"prompt": ""}, 400, "the prompt must not be empty"),
    ({"prompt": [96]}, 400, "input_ids must be in 0..95, got 96"), ({"prompt": {"a": 1}}, 400, "prompt"),
    ({"prompt": ["a", "b"]}, 400, "prompt must be one text or one list of token ids, got 2; send a request each"),
    ({"prompt": "\ud800"}, 400, "must be Unicode"), ({"max_tokens": 0}, 400, "max_tokens: Input should be greater"),
    ({"max_tokens": 96}, 400, "this server holds 96 of both"),
    ({"max_tokens": "5"}, 400, "max_tokens: Input should be"),
    ({"temperature": -1}, 400, "temperature: Input should be greater"), ({"n": 17}, 400, "n: Input should be less"),
    ({"stop": ["a"] * 5}, 400, "stop: List should have at most 4 items"),
    ({"stop": [""]}, 400, "stop.0: String should"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias is not supported, leave it out"),
    ({"suffix": "x"}, 400, "suffix is not supported"), ({"logprobs": 21}, 400, "logprobs: Input should be less"),
    ({"echo": False, "presence_penalty": 0, "user": "me", "seed": -3}, 200, None),
])
def test_bad_completions(server, changes, status, message):
    body = {"model": NAME, "prompt": "the", "max_tokens": 2, "temperature": 0} | changes
    found, answer = post(server[0], "/v1/completions", body)
    assert found == status
    assert message is None or message in answer["error"]["message"]


@pytest.mark.parametrize("changes, message", [
    ({"messages": []}, "messages: List should have at least 1 item"), ({"messages": "hello"}, "messages: Input should"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role: Input should be 'system', 'developer'"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "0.type: Input should be 'text'"),
    ({"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
    ({"tools": [{}]}, "tools is not supported, leave it out"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
])
def test_bad_chats(server, changes, message):
    body = {"model": NAME, "messages": [{"role": "user", "content": "the"}], "max_tokens": 2} | changes
    status, answer = post(server[0], "/v1/chat/completions", body)
    assert status == 400 and message in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"


def test_bodies_that_are_none(server):
    assert post(server[0], "/v1/completions", b"{not json")[0] == 400
    assert post(server[0], "/v1/completions", b"")[0] == 400
    status, answer = post(server[0], "/v1/completions", b" " * ((1 << 20) + 1))
    assert status == 413 and answer["error"]["message"] == "the body must have at most 1048576 bytes"
    assert post(server[0], "/v1/nothing", {})[0] == 404
    # and it lives on
    assert post(server[0], "/v1/completions", {"model": NAME, "prompt": "the", "max_tokens": 1})[0] == 200


def slowed(engine, monkeypatch, seconds: float) -> None:
    step = engine.rows.step
    monkeypatch.setattr(engine.rows, "step", lambda *given: (time.sleep(seconds), step(*given))[1])


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_row(server, monkeypatch, stream):
    address, engine = server
    slowed(engine, monkeypatch, 0.05)
    body = {"model": NAME, "prompt": "the", "max_tokens": 90, "ignore_eos": True, "stream": stream}
    with closing(http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        if stream:
            connection.getresponse().read(20)
        else:
            time.sleep(0.2)
        assert engine.busy
    begun = time.monotonic()
    while engine.busy and time.monotonic() - begun < 3:
        time.sleep(0.01)
    assert not engine.busy


def test_keys_queues_times_and_ends(monkeypatch):
    options = {"engine": {"queue": 1, "rows": 1}, "api_key": "secret", "timeout": 1.0}
    with serving(step_model("mixtral"), word_tokenizer(), **options) as (url, engine):
        body = {"model": NAME, "prompt": "the", "max_tokens": 90, "ignore_eos": True, "temperature": 0}
        key = {"Authorization": "Bearer secret"}
        status, answer = post(url, "/v1/completions", body)
        assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert post(url, "/v1/completions", body, {"Authorization": "Bearer Secret"})[0] == 401
        assert post(url, "/v1/completions", body | {"max_tokens": 2}, key)[0] == 200
        status, answer = post(url, "/v1/completions", body | {"n": 5}, key)
        assert status == 429 and "wait already; try again later" in answer["error"]["message"]
        slowed(engine, monkeypatch, 0.1)
        status, answer = post(url, "/v1/completions", body, key)
        assert status == 504 and "took longer than this server allows" in answer["error"]["message"]
        monkeypatch.setattr(engine.rows, "step", lambda *given: 1 / 0)
        status, answer = post(url, "/v1/completions", body, key)
        assert status == 500 and answer["error"]["message"] == "division by zero"


@pytest.mark.parametrize("stops, pieces, texts", [
    (("stop",), ["the", "of", "and"], ["the ", "of ", "and"]), (("of",), ["the", "of", "and"], ["the ", ""]),
    (("of and to",), ["the", "of", "and", "in"], ["the ", "of and in"]),
])
def test_text_that_may_begin_a_stop_text_is_held_back(stops, pieces, texts):
    tokenizer = word_tokenizer()
    answer = Answer(tokenizer, tokenizer("it was")["input_ids"], stops, chat=False)
    found = [answer.add(Token(token)) for token in tokenizer(" ".join(pieces))["input_ids"]]
    found.append(answer.end())
    assert "".join(found).strip() == "".join(texts).strip()
    assert answer.stopped == (stops == ("of",))
