"""Answers of ``vllm serve`` over HTTP, for ``serve_check.py``."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

_LONGEST = 600


def arguments(options: dict[str, Any]) -> list[str]:
    """``LLM`` options as the program takes them."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def complete(url: str, job: dict, prompt: list[int], asked: bool) -> dict[str, list]:
    """One completion, as ``serve_vllm.answer`` gives it."""
    body = {
        "model": job["folder"], "prompt": prompt, "max_tokens": job["tokens"], "temperature": 0, "logprobs": 0,
        "ignore_eos": True, "return_token_ids": True, **({"prompt_logprobs": 0} if asked else {}),
    }  # fmt: skip
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})  # fmt: skip
    with urllib.request.urlopen(request, timeout=_LONGEST) as reply:
        choice = json.load(reply)["choices"][0]
    given = choice.get("prompt_logprobs") or []
    steps = [step[str(token)]["logprob"] for step, token in zip(given[1:], prompt[1:], strict=False)]
    return {"tokens": choice["token_ids"], "logprobs": choice["logprobs"]["token_logprobs"], "prompt_logprobs": steps}


def answers(url: str, job: dict) -> dict[str, list]:
    """All prompts, by number of requests at a time, with and without the prompt's log-probabilities."""
    found = {}
    for streams in job["streams"]:
        with ThreadPoolExecutor(streams) as pool:
            for name, asked in ((str(streams), True), (f"{streams} again", False)):
                found[name] = list(pool.map(lambda p, asked=asked: complete(url, job, p, asked), job["prompts"]))
    return found


def served(job: dict, python: Path, env: dict[str, str], log: IO[str]) -> None:
    """Start the server, ask it, end it, and write the job's answers or its error."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [str(python.parent / "vllm"), "serve", job["folder"], "--host", "127.0.0.1", "--port", str(port),
               *arguments(job["options"])]  # fmt: skip
    server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=Path(job["out"]).parent)
    try:
        wait_for(url, server)
        result: dict = answers(url, job)
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        result = {"error": f"{type(error).__name__}: {error}"[:500]}
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
    Path(job["out"]).write_text(json.dumps(result), encoding="utf-8")


def wait_for(url: str, server: subprocess.Popen) -> None:
    """Return when the server answers. Raises ``RuntimeError`` if it ends or takes ten minutes."""
    began = time.monotonic()
    while time.monotonic() - began < _LONGEST:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise RuntimeError("the server did not answer")
