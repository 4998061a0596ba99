"""Compare the decoding steps of the families whose steps are gemq's own, in one run on the CPU.

``python benchmarks/cpu_steps.py`` prints a table and writes ``benchmarks/results/cpu-steps-<date>.json``: tokens a
second of transformers' step, the lean step and the compiled one, on a few layers of each architecture with random
weights of 2 bits (attention 4) and a vocabulary of 32,768, whose head stays in 16 bits. The three take turns and the
medians are shown. ``--operations`` adds the compiled step's time by operation.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import torch
from record import ROOT, conditions

from gemq.bench.architectures import load_config
from gemq.bench.random_model import build_packed, packed_plan
from gemq.generation import Decoding, GenerationOptions

# layers that hold each kind at least once
ARCHITECTURES = {
    "qwen3.5-35b-a3b": 4, "gpt-oss-20b": 4, "gemma-4-26b-a4b": 6, "nemotron-3-nano-30b-a3b": 8, "glm-4.7-flash": 4,
    "qwen3-30b-a3b": 4,
}
VOCABULARY = 32768
STEPS = ("transformers", "lean", "native")


def rate(model: torch.nn.Module, prompt: torch.Tensor, step: str, tokens: int) -> tuple[float, Decoding]:
    """Tokens a second behind the prompt."""
    run = Decoding(model, prompt, None, GenerationOptions(tokens, ignore_eos=True), compile="none", step=step)
    list(run)
    return run.timing.steps / run.timing.decode, run


def operations(model: torch.nn.Module, prompt: torch.Tensor, tokens: int) -> dict[str, float]:
    """Microseconds a token by operation of the compiled step."""
    run = Decoding(model, prompt, None, GenerationOptions(tokens, ignore_eos=True), compile="none", step="native")
    stream = iter(run)
    next(stream), next(stream)
    run.eager_step.program.measure()
    rest = sum(1 for _ in stream)
    found: dict[str, float] = defaultdict(float)
    for name, seconds in run.eager_step.program.seconds():
        found[name] += seconds / rest * 1e6
    return dict(found)


def measure(name: str, args: argparse.Namespace) -> dict:
    """Medians of the steps on one architecture."""
    config = load_config(name, ARCHITECTURES[name])
    config.get_text_config().vocab_size = VOCABULARY
    model = build_packed(config, packed_plan(config, ((2, 1.0),), 4, 4), torch.bfloat16, torch.device("cpu")).eval()
    prompt = torch.randint(0, VOCABULARY, (args.batch, args.prompt), generator=torch.Generator().manual_seed(0))
    rates: dict[str, list[float]] = {step: [] for step in STEPS}
    for step in STEPS:
        rate(model, prompt, step, 4)
    for _ in range(args.rounds):
        for step in STEPS:
            rates[step].append(rate(model, prompt, step, args.tokens)[0])
    found = {"layers": ARCHITECTURES[name], **{step: statistics.median(rates[step]) for step in STEPS}}
    return found | ({"operations": operations(model, prompt, args.tokens)} if args.operations else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=ARCHITECTURES, nargs="+", default=list(ARCHITECTURES))
    for name, default in (("rounds", 3), ("tokens", 24), ("prompt", 64), ("batch", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--operations", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    table = {}
    print(f"{'':26}{'layers':>7}" + "".join(f"{step:>14}" for step in STEPS))
    for name in args.only:
        found = table[name] = measure(name, args)
        print(f"{name:26}{found['layers']:7}" + "".join(f"{found[step]:14.1f}" for step in STEPS), flush=True)
        for operation, microseconds in sorted(found.get("operations", {}).items(), key=lambda item: -item[1]):
            print(f"{'':30}{operation:16}{microseconds:10.0f} us")
    output = args.output or ROOT / "benchmarks" / "results" / f"cpu-steps-{datetime.date.today()}.json"
    found = {"conditions": conditions(" ".join(["python", *sys.argv])), "steps": table}
    output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
