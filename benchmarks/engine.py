"""The streaming engine: peak memory by depth, seconds and peak memory of every stage with streaming on and off, the
price of coefficients in units of one forward and backward pass, and GPTQ against an eager loop over experts.

    OMP_NUM_THREADS=1 python benchmarks/engine.py --output engine.json
    python benchmarks/record.py engine engine.json --command "OMP_NUM_THREADS=1 python benchmarks/engine.py"

Every measurement of memory is a process of its own: the peak resident size of a stage, less what was resident after
the same quantization of a tiny model. Seconds are of processor time: the machine may be shared.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from quantize_time import save_random
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig
from transformers import logging as transformers_logging

from gemq.algorithms.gptq import GptqConfig
from gemq.algorithms.layerwise import Hessian
from gemq.algorithms.matrices import quantize_experts
from gemq.algorithms.method import MethodConfig
from gemq.algorithms.perturbation import Perturbation
from gemq.checkpoint import save_packed
from gemq.choices import Keep
from gemq.engine.disk_source import DiskSource
from gemq.engine.journal import opened
from gemq.engine.layers import Weights
from gemq.engine.measure import measure
from gemq.engine.session import RunOptions, Session
from gemq.engine.source import return_memory
from gemq.engine.walk import Sweep, group_budget
from gemq.format import default_group_size
from gemq.models import describe
from gemq.reference import gptq_group
from gemq.reference.importance import expert_calls

MIB = 1 << 20
METHOD = MethodConfig(
    budgets=(2.0,), per_layer="none", perturbation="rtn", batch_size=2, gptq=GptqConfig(clip="none")
)


def resident(key: str = "VmRSS") -> int:
    """Bytes resident now, or (``VmHWM``) at most since :func:`forget_peak`."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Reset the peak of resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def save_model(folder: Path, layers: int, hidden: int, intermediate: int, experts: int, top_k: int) -> None:
    """A random Mixtral in bfloat16."""
    config = MixtralConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_local_experts=experts, num_experts_per_tok=top_k, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=512,
    )
    save_random(config, folder, "cpu", "200MB")


def windows(count: int, length: int) -> torch.Tensor:
    """Random tokens: the routers of a random model spread them over all experts."""
    return torch.randint(0, 512, (count, length), generator=torch.Generator().manual_seed(1))


class Stages:
    """Seconds of processor time and peak bytes above ``base`` by stage."""

    def __init__(self, base: int):
        self.base, self.rows, self._began = base, {}, 0.0

    def __call__(self, name: str, done: int, total: int) -> None:
        """The progress callback of a run."""
        if done == 0:
            forget_peak()
            self._began = time.process_time()
        elif done == total:
            self.rows[name] = {
                "seconds": round(time.process_time() - self._began, 2),
                "peak_mib": round((resident("VmHWM") - self.base) / MIB),
            }


def quantized(folder: Path, text: torch.Tensor, work: Path, report: Stages, keep: str) -> int:
    """One whole quantization; the bytes of the largest layer in 16 bits."""
    source = DiskSource(
        str(folder), AutoConfig.from_pretrained(folder), torch.float32, torch.device("cpu"), resident=keep == "model"
    )
    with Session(source, text, text[:2], METHOD).working(RunOptions(work / "run", keep), report) as run:
        for result in run.results():
            report("save", 0, 1)
            assembly, _ = run.assembly(result)
            save_packed(assembly.model, assembly.config, work / "out", dtype=assembly.dtype, weights=assembly.write)
            report("save", 1, 1)
    return source.layer_bytes()


def worker(folder: Path, keep: str, count: int, length: int) -> dict:
    """One whole quantization in this process, after one of a tiny model that loads what the libraries load late."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        tiny, base = Path(work) / "tiny", resident()
        save_model(tiny, 2, hidden=128, intermediate=128, experts=4, top_k=2)
        quantized(tiny, windows(2, 32), Path(work) / "first", Stages(base), keep)
        gc.collect()
        return_memory()
        loaded, report = resident(), Stages(resident())
        layer = quantized(folder, windows(count, length), Path(work) / "second", report, keep)
    return {"layer_16bit_mib": round(layer / MIB), "base_mib": round(loaded / MIB),
            "before_first_run_mib": round(base / MIB), "stages": report.rows}


def in_process(*arguments: object) -> dict:
    """The result of this file with these arguments in a fresh process."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def memory_and_stages(base: Path, shape: dict, depths: list[int], count: int, length: int) -> list[dict]:
    """A row per depth with a layer in memory, and one of the smallest depth with the whole model."""
    rows = []
    for layers in depths:
        folder = base / f"layers-{layers}"
        save_model(folder, layers, **shape)
        for keep in ("layer", "model") if layers == min(depths) else ("layer",):
            found = in_process("--worker", folder, "--keep", keep, "--count", count, "--length", length)
            peak = max(row["peak_mib"] for row in found["stages"].values())
            rows.append({"what": "quantize", "layers": layers, "keep": keep, **shape, "windows": count,
                         "length": length, "peak_mib": peak, **found})
            print(json.dumps(rows[-1]), flush=True)
    return rows


def coefficients(base: Path, count: int) -> dict:
    """Eq. 6 of 64 experts and three widths, of experts alone and of their matrices too, against one forward and
    backward pass of the same ``count`` windows."""
    folder, text = base / "wide", windows(count, 256)
    save_model(folder, 4, hidden=256, intermediate=256, experts=64, top_k=8)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    moe = describe(model)
    plain = []
    for _ in range(2):
        began = time.process_time()
        for at in range(0, len(text), 4):
            expert_calls(moe.model, [layer.experts for layer in moe.moe], text[at : at + 4])
        plain.append(time.process_time() - began)
    row = {
        "what": "coefficients", "experts": 64, "layers": 4, "hidden": 256, "intermediate": 256, "top_k": 8,
        "tokens": text.numel(), "forward_backward_s": round(min(plain), 2),
    }
    for kind, matrices in itertools.product(("rtn", "gptq"), (False, True)):
        name = f"{kind}_matrices" if matrices else kind
        with opened(base / f"run-{name}-{count}", {}) as run:
            source = DiskSource(str(folder), AutoConfig.from_pretrained(folder), torch.float32, torch.device("cpu"))
            sweep = Sweep(text, 4, run.stage("measure"), lambda *a: None, lambda **e: None, group_budget(source))
            began = time.process_time()
            measure(Weights(source), sweep, (1, 2, 3), Perturbation(kind), matrices)
            row[f"{name}_s"] = round(time.process_time() - began, 2)
            row[f"{name}_times"] = round(row[f"{name}_s"] / row["forward_backward_s"], 2)
    print(json.dumps(row), flush=True)
    return row


def eager_gptq(weight: torch.Tensor, hessian: torch.Tensor, bits: int, config: GptqConfig) -> None:
    """One expert's matrix as published implementations quantize it: the inverse Hessian's upper Cholesky factor by
    Cholesky, inverse and Cholesky, a range search per group, a loop over its columns in torch, and one product that
    carries the group's errors to the later columns. No output error, no dequantized copy."""
    size = default_group_size(weight.shape[-1], config.group_size)
    damped = hessian[None].clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(config.damping * hessian.diagonal().mean())
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    w, widths = weight[None].clone(), torch.tensor([bits])
    for start in range(0, w.shape[-1], size):
        stop = start + size
        _, _, errors = gptq_group(
            w[..., start:stop], factor[:, start:stop, start:stop], widths, config.clip, config.propagate_from
        )
        w[..., stop:] -= errors @ factor[:, start:stop, stop:]


def gptq_stage(experts: int = 64) -> dict:
    """Time GPTQ of both projections of a layer of 64 experts of mixed widths, with propagation: expert by expert,
    batched, and batched with the refinement that follows by default. Seconds are of processor time and of the wall
    clock."""
    config, generator = Qwen3MoeConfig(), torch.Generator().manual_seed(0)
    hidden, intermediate = config.hidden_size // 2, config.moe_intermediate_size // 2
    bits = [1 + e % 3 for e in range(experts)]
    alone, default = GptqConfig(refine=0, rescale=False), GptqConfig()
    row = {"what": "gptq", "experts": experts, "hidden": hidden, "intermediate": intermediate, "clip": alone.clip}
    spent: dict[str, float] = {}

    def timed(name: str, run: Callable[[], object]) -> None:
        began = time.process_time(), time.perf_counter()
        run()
        for key, start, end in zip(("s", "wall_s"), began, (time.process_time(), time.perf_counter()), strict=True):
            spent[f"{name}_{key}"] = spent.get(f"{name}_{key}", 0.0) + end - start

    for n, k in ((2 * intermediate, hidden), (hidden, intermediate)):
        weight = torch.randn(experts, n, k, generator=generator) * 0.02
        hessians = [Hessian(k, weight.device) for _ in range(experts)]
        for h in hessians:
            h.add(torch.randn(2 * k, k, generator=generator))
        timed("eager", lambda w=weight, h=hessians: [
            eager_gptq(w[e], h[e].value, bits[e], alone) for e in range(experts)
        ])
        timed("batched", lambda w=weight, h=hessians: quantize_experts(w.clone(), h, bits, alone))
        timed("refined", lambda w=weight, h=hessians: quantize_experts(w.clone(), h, bits, default))
    row |= {key: round(value, 2) for key, value in spent.items()}
    row |= {"times": round(spent["eager_s"] / spent["batched_s"], 2),
            "wall_times": round(spent["eager_wall_s"] / spent["batched_wall_s"], 2)}
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--output", type=Path, default=Path("engine.json"))
    options.add_argument("--only", choices=("memory", "coefficients", "gptq"))
    options.add_argument("--depths", default="4,16")
    options.add_argument("--count", type=int, default=8)
    options.add_argument("--length", type=int, default=128)
    options.add_argument("--worker", type=Path, help="(internal) quantize this folder and print what it took")
    options.add_argument("--keep", choices=list(Keep), default="layer")
    given = options.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if given.worker:
        print(json.dumps(worker(given.worker, given.keep, given.count, given.length)))
        return
    shape = {"hidden": 512, "intermediate": 512, "experts": 32, "top_k": 4}
    depths, rows = [int(d) for d in given.depths.split(",")], []
    with tempfile.TemporaryDirectory() as folder:
        if given.only in (None, "gptq"):
            rows.append(gptq_stage())
        if given.only in (None, "coefficients"):
            rows += [coefficients(Path(folder), count) for count in (32, 128)]
        if given.only in (None, "memory"):
            rows += memory_and_stages(Path(folder), shape, depths, given.count, given.length)
    notes = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0], "clock": "process_time"}
    given.output.write_text(json.dumps({"notes": notes, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
