"""``gemq serve`` as a process: its address, its end, and errors before it serves."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import openai
import pytest
from packed_models import quantized
from tiny_text import word_tokenizer

from gemq.checkpoint import save_packed
from gemq.errors import GemqError
from gemq.server import run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    found = quantized("mixtral")
    save_packed(found.packed, found.config, folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@contextmanager
def start(*arguments: str) -> Iterator[subprocess.Popen]:
    """A server, ended with the block."""
    command = [sys.executable, "-m", "gemq", "serve", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_server_finishes_what_it_runs_when_told_to_stop(checkpoint):
    with start(str(checkpoint), "--port", "0", "--rows", "2", "--api-key", "k") as process:
        line = process.stdout.readline()
        assert line.startswith("serving 'tiny' at http://127.0.0.1:") and "2 requests at a time of up to 128" in line
        assert line.endswith("native step\n")
        address = line.split()[3].rstrip(":")
        with urllib.request.urlopen(address.removesuffix("/v1") + "/health") as answer:
            assert answer.status == 200
        with openai.OpenAI(base_url=address, api_key="k", max_retries=0) as client:
            texts = []

            def ask() -> None:
                found = client.completions.create(model="tiny", prompt="the of", max_tokens=100, temperature=1.0)
                texts.append(found.choices[0])

            asking = threading.Thread(target=ask)
            asking.start()
            time.sleep(0.3)
            process.send_signal(signal.SIGTERM)
            asking.join(30)
        assert process.wait(30) == 0 and texts and texts[0].finish_reason in ("length", "stop")
        assert process.stderr.read() == ""


@pytest.mark.parametrize("arguments, message", [
    (["nowhere"], "nowhere"), (["{tiny}", "--rows", "17"], "'--rows': Input should be less than or equal to 16"),
    (["{tiny}", "--context", "1"], "'--context': Input should be greater than or equal to 2"),
    (["{tiny}", "--host", "999.1.1.1"], "cannot serve at 999.1.1.1"),
])
def test_errors_before_it_serves(checkpoint, arguments, message):
    with start(*(part.format(tiny=checkpoint) for part in arguments), "--port", "0") as process:
        out, err = process.communicate(timeout=120)
    assert process.returncode in (1, 2) and out == ""
    assert message in err and "Traceback" not in err


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(GemqError, match=rf"cannot serve at 127.0.0.1:{port}: Address already in use; give another"):
            run.bind("127.0.0.1", port)


def test_without_the_packages_of_the_extra(monkeypatch):
    from gemq.cli.serve import serve

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(GemqError, match=r"gemq serve needs uvicorn: pip install 'gemq\[serve\]'"):
        serve("anything")
