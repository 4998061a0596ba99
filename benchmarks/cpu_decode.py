"""Decoding of a whole model on the CPU: tokens a second at four widths, beside llama.cpp's.

``python benchmarks/cpu_decode.py`` builds a Mixtral of random weights with the numbers of a bfloat16 checkpoint (by
default hidden 1024, ffn 3584, 4 layers, 8 experts, top 2, vocabulary 4096, attention at 4 bits), decodes at batch 1
with the compiled step and with the step in torch's operations in turns, prints a table and writes
``benchmarks/results/cpu-decode-<date>.json``. ``best`` is the fastest step of all, which other load on the machine
touches least; ``p50`` the median of the best run. ``inside`` is the share of the fastest step that the compiled program
takes: the rest is sampling and the loop in Python. ``experts`` is the rate at which the median step reads the experts.

llama.cpp's figures come from ``--llama 4=616,3=353`` (tokens a second by bits) or ``--llama-bench FILE``, what
``llama-bench -o json -p 0 -n 128`` wrote about Q4_0, Q3_K, Q2_K and IQ1_S files of the same shapes.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from record import ROOT, conditions
from torch import nn

from gemq import ops
from gemq.bench import random_model
from gemq.bench.roofline import expert_sizes
from gemq.generation import Decoding, GenerationOptions

# times llama.cpp at the format of that many bits
TARGETS = {4.0: 1.25, 3.0: 1.5, 2.0: 1.5, 1.5: 2.5}
FORMATS = {"Q4_0": 4.0, "Q3_K": 3.0, "Q2_K": 2.0, "IQ1_S": 1.5}
STEPS = ("native", "lean")
_SETTLING = 5


def build(options: argparse.Namespace, bits: float) -> nn.Module:
    """A Mixtral whose experts have ``bits`` on average; float32 models hold bfloat16 numbers, as when loaded so."""
    from transformers import MixtralConfig

    config = MixtralConfig(
        hidden_size=options.hidden, intermediate_size=options.ffn, num_hidden_layers=options.layers,
        num_local_experts=8, num_experts_per_tok=2, num_attention_heads=options.hidden // 128,
        num_key_value_heads=2, head_dim=128, vocab_size=options.vocabulary, max_position_embeddings=4096,
    )
    plan = random_model.packed_plan(config, random_model.mix_for(bits), options.attention_bits, 4)
    model = random_model.build_packed(config, plan, torch.bfloat16, torch.device("cpu"))
    return model.to(getattr(torch, options.dtype)).eval()


@dataclass(frozen=True)
class Run:
    """Seconds of every step after the first few, and of the program's experts and of all its operations in each."""

    tokens: list[int]
    times: list[float]
    experts: list[float]
    inside: list[float]


def decode(model: nn.Module, step: str, options: argparse.Namespace) -> Run:
    """Run one step once; the program measures itself."""
    prompt = torch.randint(
        0, options.vocabulary, (1, options.prompt_length), generator=torch.Generator().manual_seed(0)
    )
    limits = GenerationOptions(options.tokens, ignore_eos=True)
    decoding = Decoding(model, prompt, None, limits, compile="none", step=step)
    tokens, times, sums, before = [], [], [], None
    for token in decoding:
        now = time.perf_counter()
        tokens.append(int(token[0]))
        if before is not None:
            times.append(now - before)
        if step == "native" and len(times) == 1:
            decoding.step.program.measure()
        if step == "native" and times:
            sums.append(decoding.step.program.seconds())
        before = time.perf_counter()
    experts = [sum(seconds for name, seconds in found if name == "experts") for found in sums]
    inside = [sum(seconds for _, seconds in found) for found in sums]
    differences = ([b - a for a, b in itertools.pairwise(values)][_SETTLING - 1 :] for values in (experts, inside))
    return Run(tokens, times[_SETTLING:], *differences)


def expert_bytes(model: nn.Module) -> float:
    """Bytes of experts that a token reads: two of the mean size in every layer."""
    layers = model.model.layers
    return sum(2 * statistics.mean(expert_sizes(layer.mlp.experts)) for layer in layers)


def measure(bits: float, options: argparse.Namespace) -> dict:
    """Measure one width, with both steps in turns."""
    model = build(options, bits)
    runs: dict[str, list[Run]] = {step: [] for step in STEPS}
    for _ in range(options.repeats):
        for step in STEPS:
            runs[step].append(decode(model, step, options))
    native = runs["native"]
    steps = [(time, inside) for run in native for time, inside in zip(run.times, run.inside, strict=True)]
    fastest = min(steps)
    row = {
        "bits": bits, "inside": fastest[1] / fastest[0],
        "experts_gb_s": expert_bytes(model) / min(statistics.median(run.experts) for run in native) / 1e9,
        "same_tokens": native[0].tokens == runs["lean"][0].tokens,
    }
    for step, found in runs.items():
        row[step] = {
            "best": 1 / min(min(run.times) for run in found),
            "p50": 1 / min(statistics.median(run.times) for run in found),
        }
    return row


def compare(row: dict, llama: dict[float, float]) -> dict:
    """Add llama.cpp's tokens a second at this width, the ratio of medians, and whether it reaches the target."""
    if row["bits"] in llama:
        ratio = row["native"]["p50"] / llama[row["bits"]]
        target = TARGETS.get(row["bits"])
        row |= {"llama.cpp": llama[row["bits"]], "ratio": ratio, "target": target}
        row["met"] = target is None or ratio >= target
    return row


def show(row: dict) -> str:
    """One line of the table."""
    parts = [f"{row['bits']:4g} bits"]
    parts += [f"{step} {row[step]['p50']:7.1f} (best {row[step]['best']:7.1f})" for step in STEPS]
    parts.append(f"inside {100 * row['inside']:3.0f}%, experts {row['experts_gb_s']:.1f} GB/s")
    parts += [] if row["same_tokens"] else ["tokens differ"]
    if "ratio" in row:
        met = "" if row["target"] is None else f" (target {row['target']:g}: {'met' if row['met'] else 'MISSED'})"
        parts.append(f"llama.cpp {row['llama.cpp']:.1f}, {row['ratio']:.2f} times{met}")
    return ", ".join(parts)


def parse_llama(text: str) -> dict[float, float]:
    """``4=616,1.5=180`` as numbers; ``ValueError`` that says how it must look."""
    try:
        found = {float(bits): float(rate) for bits, rate in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise ValueError(f"--llama must be like 4=616,3=353, got {text!r}") from None
    return found


def read_llama_bench(path: Path) -> dict[float, float]:
    """Tokens a second of the text generation in ``llama-bench -o json``, by the bits of the file's format; the best
    where there are several."""
    found: dict[float, float] = {}
    for entry in json.loads(path.read_text()):
        name = f"{entry['model_type']} {entry['model_filename']}"
        bits = next((bits for form, bits in FORMATS.items() if form in name), None)
        if bits is not None and entry["n_gen"] > 0 and not entry["n_prompt"]:
            found[bits] = max(found.get(bits, 0.0), entry["avg_ts"])
    if not found:
        raise ValueError(f"{path} holds no text generation with any of {', '.join(FORMATS)}")
    return found


def main() -> None:
    """Measure the widths, print, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="4,3,2,1.5", help="mean bits of the experts, one model each")
    parser.add_argument("--attention-bits", type=int, default=4, help="1..8, or 16")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the model")
    parser.add_argument("--activations", choices=["exact", "int16", "int8"], default="int16")
    for name, value in (("hidden", 1024), ("ffn", 3584), ("layers", 4), ("vocabulary", 4096), ("prompt-length", 32),
                        ("tokens", 200), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--llama", default="", help="llama.cpp's tokens a second by bits: 4=616,3=353")
    parser.add_argument("--llama-bench", type=Path, help="what llama-bench -o json wrote")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/cpu-decode-<date>.json")
    options = parser.parse_args()
    if options.tokens <= _SETTLING + 1:
        parser.error(f"--tokens must be at least {_SETTLING + 2}, got {options.tokens}")
    try:
        llama = read_llama_bench(options.llama_bench) if options.llama_bench else {}
        llama |= parse_llama(options.llama) if options.llama else {}
        widths = [float(b) for b in options.bits.split(",")]
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {error}")
    torch.set_num_threads(options.threads)
    ops.set_cpu_activations(options.activations)
    rows = []
    for bits in widths:
        rows.append(compare(measure(bits, options), llama))
        print(show(rows[-1]), flush=True)
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    given = conditions(" ".join(["python benchmarks/cpu_decode.py", *words]))
    shape = {n: getattr(options, n) for n in ("hidden", "ffn", "layers", "vocabulary", "attention_bits", "dtype",
                                              "activations", "prompt_length", "tokens", "repeats")}
    output = options.output or ROOT / "benchmarks" / "results" / f"cpu-decode-{datetime.date.today().isoformat()}.json"
    output.parent.mkdir(exist_ok=True)
    temporary = output.with_suffix(".tmp")
    content = {"kind": "cpu-decode", "conditions": given, "model": shape, "rows": rows}
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, output)
    print(output.name)


if __name__ == "__main__":
    main()
