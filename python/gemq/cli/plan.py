"""``gemq plan``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from gemq.algorithms.progressive import MethodConfig
from gemq.algorithms.router_tuning import RouterTuningConfig
from gemq.bench.architectures import PUBLISHED, load_config
from gemq.cli import display, options
from gemq.pipeline import check_model, parse_dtype, pick_device
from gemq.planning import Machine, Plan, PlanConfig, make_plan, other_machine, this_machine
from gemq.planning.memory import peak
from gemq.planning.plan import ENGINE


def plan(
    model: Annotated[str, typer.Argument(
        help="Folder or hub name of a model, a config.json, or mixtral-8x7b, deepseek-v2-lite, qwen1.5-moe, "
        "qwen3-30b-a3b.")],
    bits: Annotated[str, typer.Option("--bits", "-b", help="Bits per expert; several, falling: 3,2.5,2.")] = "2.5",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where it would be written.")] = Path("."),
    method: Annotated[str, typer.Option(help="gemq, pmq or uniform.")] = "gemq",
    candidates: Annotated[str, typer.Option(help="Widths an expert may take, of 0..8.")] = "1,2,3",
    constraints: Annotated[str, typer.Option(help="none, c2, c3 or c2c3.")] = "c2c3",
    samples: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 128,
    length: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 2048,
    attention_bits: Annotated[int, typer.Option(help="1..8, or 16 to leave as is.")] = 4,
    dense_bits: Annotated[int, typer.Option(help="Dense MLP layers: 1..8, or 16.")] = 4,
    shared_bits: Annotated[str, typer.Option(help="Shared experts: auto, 1..8 or 16.")] = "auto",
    perturbation: Annotated[str, typer.Option(help="Costs by gptq or rtn.")] = "gptq",
    tune_routers: Annotated[bool, typer.Option(help="Fine-tune the routers after quantizing.")] = True,
    router_epochs: Annotated[int, typer.Option(help="Passes over the text.", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.", min=1)] = 4,
    engine: Annotated[str, typer.Option(help="memory: the whole model at once; stream: one decoder layer.")] = ENGINE,
    device: Annotated[str | None, typer.Option(
        help="cpu, cuda, cuda:1, or h100, h200, a100-80gb, a100-40gb, l40s, rtx4090 by data sheet.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    context: Annotated[int, typer.Option(help="Tokens a row when the result runs.", min=1)] = 4096,
    rows: Annotated[int, typer.Option(help="Rows when the result runs.", min=1)] = 1,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What quantizing a model will take, from its config alone: memory, disk, time, and the size of the result.

    [dim]gemq plan mixtral-8x7b --bits 2.5 --device rtx4090[/dim]
    """
    chosen = parse_dtype(dtype)
    wanted = None if isinstance(chosen, str) else chosen
    config = PlanConfig(
        MethodConfig(
            options.budgets(bits), method, options.widths(candidates), constraints, attention_bits, dense_bits,
            options.shared(shared_bits), tune=tune_routers, perturbation=perturbation, batch_size=batch_size,
            router=RouterTuningConfig(epochs=router_epochs),
        ),
        samples, length, engine, wanted, context, rows,
    )
    local = model in PUBLISHED or Path(model).suffix == ".json"
    architecture = load_config(model) if local else check_model(model, trust_remote_code)
    found = make_plan(architecture, config, _machine(device, output, wanted))
    if as_json:
        print(json.dumps({"model": model, **found.to_dict()}))
        return
    _show(model, found)


def _machine(device: str | None, output: Path, dtype: torch.dtype | None) -> Machine:
    if device is not None and device.partition(":")[0] not in ("cpu", "cuda"):
        return other_machine(device, dtype or torch.bfloat16)
    here = pick_device(device)
    computed = dtype or (torch.float32 if here.type == "cpu" else torch.bfloat16)
    return this_machine(here, output, computed, rates=True)


def duration(seconds: float) -> str:
    """A time for people: 12 s, 34 min, 5.6 h."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 1 else "under 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _show(model: str, found: Plan) -> None:
    out, machine = display.output(), found.machine
    options = found.config
    seconds = found.seconds or {}
    rows = [
        [name, *(display.size(sum(getattr(need, place).values())) for place in ("device", "host", "scratch")),
         duration(seconds[name]) if name in seconds else "-"]
        for name, need in found.stages.items()
    ]
    most = peak(found.stages)
    total = duration(sum(seconds.values())) if seconds else "-"
    rows.append(["most" if len(options.method.budgets) == 1 else "most (time: one budget)",
                 *(display.size(most[place]) for place in ("device", "host", "scratch")), total])
    disk = None if machine.disk_free is None or machine.host_free is None else machine.disk_free
    free = [machine.device_free, machine.host_free, disk]
    rows.append(["free", *("-" if size is None else display.size(size) for size in free), ""])
    title = (f"quantizing {model} ({found.parts.parameters / 1e9:.2f} billion parameters) on {machine.name} in "
             f"{found.dtype}, engine {options.engine}, {options.samples} x {options.length} tokens")
    out.print(display.table(title, ["stage", "device", "memory", "scratch", "time"], rows))
    results = []
    for budget, size in found.outputs.items():
        run = found.inference[budget]
        speed = f"{machine.rates.bandwidth / run.read:,.0f}" if machine.rates else "-"
        results.append([f"{budget:g}", display.size(size.files), display.size(run.weights), display.size(run.cache),
                        display.size(run.total), speed])
    columns = ["bits", "checkpoint", "weights", "cache", "to run", "tokens/s at most"]
    title = f"the result, and running it with {options.rows} x {options.context} tokens"
    out.print(display.table(title, columns, results))
    if machine.rates:
        out.print(f"times and tokens/s: {machine.rates.source}; the disk's rate is assumed to be "
                  f"{machine.rates.disk / 1e9:g} GB/s; memory by the formulas of docs/plan.md", soft_wrap=True)
    for shortage in found.shortages():
        out.print(f"does not fit: {shortage.stage} needs {display.size(shortage.needed)} of {shortage.place}, "
                  f"{display.size(shortage.free)} are free", style="bold red", soft_wrap=True)
