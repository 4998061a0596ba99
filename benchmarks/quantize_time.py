"""Measure how long a published architecture takes to quantize: a few of its layers with random weights, stage by stage,
and the whole extrapolated from them.

    python benchmarks/quantize_time.py deepseek-v2-lite --layers 3 --device cuda --json times.json

Layers have the published shapes; calibration tokens are random, which spreads them over all experts. The streaming
engine runs as ``gemq quantize`` does, one budget, default options: the log's seconds of each MoE layer (the first
one, which warms up, is left out where there are others) times how many the model has.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers import logging as transformers_logging

from gemq.algorithms.gptq import GptqConfig
from gemq.algorithms.method import MethodConfig
from gemq.bench.architectures import PUBLISHED, load_config
from gemq.engine.disk_source import DiskSource
from gemq.engine.session import RunOptions, Session
from gemq.models import describe
from gemq.planning.model_parts import meta_model


def save_random(config, folder: Path, device: str, shard: str = "2GB") -> None:
    """A model of ``config`` in bfloat16 with the family's random initialisation."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder, max_shard_size=shard)


def by_stage(lines: list[dict], moe_layers: set[int], count: int) -> list[dict]:
    """Seconds by stage and MoE layer, and for ``count`` such layers; seconds of a stage outside layers as they are."""
    rows = []
    for end in (line for line in lines if line.get("event") == "end"):
        layers = [
            line["seconds"] for line in lines
            if line["stage"] == end["stage"] and line.get("layer") in moe_layers
        ]
        row = {"stage": end["stage"], "seconds": end["seconds"], "layers": layers,
               "device_peak_bytes": end.get("device_peak_bytes")}
        if layers:
            steady = layers[1:] or layers
            row["whole_model_seconds"] = round(sum(steady) / len(steady) * count, 1)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help=f"{', '.join(PUBLISHED)} or a config.json")
    parser.add_argument("--layers", type=int, default=3, help="decoder layers to run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--refine", type=int, help="rounds after GPTQ (default: the default recipe's)")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    whole = describe(meta_model(load_config(given.model)))
    config = load_config(given.model, given.layers)
    refine = {} if given.refine is None else {"refine": given.refine}
    method = MethodConfig(
        budgets=(given.bits,), per_layer="none", batch_size=given.batch_size, tune=False,
        gptq=GptqConfig.for_recipe("default", **refine),
    )
    text = torch.randint(
        0, config.vocab_size, (given.windows, given.length), generator=torch.Generator().manual_seed(1)
    )
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        save_random(config, base / "model", given.device)
        dtype = torch.float32 if given.device == "cpu" else torch.bfloat16
        source = DiskSource(str(base / "model"), config, dtype, torch.device(given.device))
        options = RunOptions(base / "run", log=base / "log.jsonl")
        with Session(source, text, text[:2], method).working(options) as run:
            for _ in run.results():
                pass
        lines = [json.loads(line) for line in (base / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = by_stage(lines, {layer.index for layer in source.moe.moe}, len(whole.moe))
    for row in rows:
        estimate = row.get("whole_model_seconds")
        print(f"{row['stage']:<16} {row['seconds']:>9.1f} s"
              + (f", all {len(whole.moe)} MoE layers {estimate:.0f} s" if estimate else ""), flush=True)
    if given.json:
        notes = {"model": given.model, "layers": given.layers, "device": given.device, "windows": given.windows,
                 "length": given.length, "bits": given.bits, "refine": method.gptq.refine}
        given.json.write_text(json.dumps({"notes": notes, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
