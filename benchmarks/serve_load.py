"""Load a server over loopback: many clients for a while, no answer lost, mixed up or other than it is alone.

``python benchmarks/serve_load.py CHECKPOINT`` starts ``gemq serve`` and writes
``benchmarks/results/serve-<date>.json``: tokens a second, time to the first token and time a request with 1, 4, 16 and
``--clients`` clients, each over ``--seconds``. Prompts are of 1 to 120 tokens drawn from seeds, answers of 1 to 48;
greedy and seeded samples, streamed and whole. Every answer is compared with the one that the same request got alone
before. The exit status is 1 if one differs or is lost.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import openai
from record import ROOT, conditions

KINDS = 48


def requests(vocabulary: int) -> list[dict]:
    """Different requests, the same for every client."""
    drawn = random.Random(0)
    shared = [drawn.randrange(10, vocabulary) for _ in range(300)]
    found = []
    for kind in range(KINDS):
        own = [drawn.randrange(10, vocabulary) for _ in range(drawn.randint(1, 120))]
        # every fourth prompt begins as others do
        prompt = shared + own[:20] if kind % 4 == 0 else own
        sampled = {"temperature": 0.9, "top_p": 0.95, "seed": kind} if kind % 2 else {"temperature": 0}
        found.append({"prompt": prompt, "max_tokens": drawn.randint(1, 48), "stream": kind % 3 == 0, **sampled})
    return found


def ask(client: openai.OpenAI, model: str, request: dict) -> tuple[str, int, float]:
    """Text, new tokens and seconds up to the first of them."""
    begun = time.perf_counter()
    if not request["stream"]:
        found = client.completions.create(model=model, **request)
        return found.choices[0].text, found.usage.completion_tokens, time.perf_counter() - begun
    text, first, new = "", 0.0, 0
    for part in client.completions.create(model=model, **request, stream_options={"include_usage": True}):
        first = first or time.perf_counter() - begun
        text += part.choices[0].text if part.choices else ""
        new = part.usage.completion_tokens if part.usage else new
    return text, new, first


def load(address: str, model: str, asked: list[dict], alone: list[str], clients: int, seconds: float) -> dict:
    """Figures of ``clients`` at once."""
    end, lock = time.monotonic() + seconds, threading.Lock()
    found: dict = {"requests": 0, "tokens": 0, "wrong": 0, "errors": {}, "first": [], "whole": []}

    def run(number: int) -> None:
        drawn = random.Random(number)
        with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client:
            while time.monotonic() < end:
                kind = drawn.randrange(len(asked))
                begun = time.perf_counter()
                try:
                    text, new, first = ask(client, model, asked[kind])
                except openai.APIError as error:
                    with lock:
                        name = type(error).__name__
                        found["errors"][name] = found["errors"].get(name, 0) + 1
                    continue
                with lock:
                    found["requests"] += 1
                    found["tokens"] += new
                    found["wrong"] += text != alone[kind]
                    found["whole"].append(time.perf_counter() - begun)
                    if asked[kind]["stream"]:
                        found["first"].append(first)

    begun = time.perf_counter()
    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent = time.perf_counter() - begun
    first, whole = found.pop("first"), found.pop("whole")
    rates = {"seconds": spent, "tokens_a_second": found["tokens"] / spent}
    times = {f"{name}_{q}": statistics.quantiles(values, n=100)[q - 1] for name, values in
             (("first", first), ("whole", whole)) for q in (50, 95) if len(values) > 1}
    return {"clients": clients, **found, **rates, **times}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    vocabulary = json.loads((args.checkpoint / "config.json").read_text())["vocab_size"]
    command = [sys.executable, "-m", "gemq", "serve", str(args.checkpoint), "--port", "0", "--rows", str(args.rows),
               "--context", "512", "--queue", str(args.clients)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            line = server.stdout.readline()
            model, address = re.search(r"serving '(.+)' at (\S+): ", line).groups()
            asked, table = requests(vocabulary), []
            with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=600) as client:
                alone = [ask(client, model, request)[0] for request in asked]
            for clients in sorted({1, 4, 16, args.clients}):
                table.append(load(address, model, asked, alone, clients, args.seconds))
                print(json.dumps(table[-1]), flush=True)
        finally:
            server.terminate()
    output = args.output or ROOT / "benchmarks" / "results" / f"serve-{datetime.date.today()}.json"
    found = {"conditions": conditions(" ".join(["python", *sys.argv])), "serve": line.strip(), "load": table}
    output.write_text(json.dumps(found, indent=1) + "\n")
    return int(any(row["wrong"] or row["errors"] for row in table))


if __name__ == "__main__":
    sys.exit(main())
