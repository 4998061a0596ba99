"""``gemq plan``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemq.choices import Accounting, Constraints, Dtype, Keep, Method, Perturbation
from gemq.cli import display, former
from gemq.cli.formats import Column, Format, FormatOption, emit
from gemq.plain_json import dumps

if TYPE_CHECKING:
    import torch

    from gemq.planning import Machine, Plan


def plan(
    model: Annotated[str, typer.Argument(
        help="Folder or hub name of a model, a config.json, or a name that gemq knows, such as qwen3-30b-a3b or "
        "gpt-oss-20b.")],
    bits: Annotated[str, typer.Option("--bits", "-b", help="Bits per expert; several, falling: 3,2.5,2.")] = "2.5",
    output: Annotated[Path, typer.Option("--output", "-o", help="Where it would be written.")] = Path("."),
    method: Annotated[Method, typer.Option(help="How bits are allocated.")] = Method.gemq,
    candidates: Annotated[str, typer.Option(help="Widths an expert may take, of 0..8.")] = "1,2,3",
    constraints: Annotated[Constraints, typer.Option(help="Experts that every layer must have.")] = Constraints.none,
    samples: Annotated[int, typer.Option(help="Calibration windows.", min=1)] = 128,
    length: Annotated[int, typer.Option(help="Tokens per window.", min=2)] = 2048,
    attention_bits: Annotated[int, typer.Option(help="1..8, or 16 to leave as is.")] = 4,
    dense_bits: Annotated[int, typer.Option(help="Dense MLP layers: 1..8, or 16.")] = 4,
    shared_bits: Annotated[str, typer.Option(help="Shared experts: auto, 1..8 or 16.")] = "auto",
    head_bits: Annotated[int, typer.Option(help="Head (lm_head): 4..8, or 16 to leave as is.")] = 16,
    embedding_bits: Annotated[int, typer.Option(help="Token embedding: 4..8, or 16; one width if tied to the head.")]
    = 16,
    accounting: Annotated[Accounting, typer.Option(help="What shared experts count of the budget.")]
    = Accounting.exact,
    perturbation: Annotated[Perturbation, typer.Option(help="How an expert is quantized to measure it.")]
    = Perturbation.gptq,
    tune_routers: Annotated[bool, typer.Option(help="Fine-tune the routers after quantizing.")] = True,
    router_epochs: Annotated[int, typer.Option(help="Passes over the text.", min=1)] = 1,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.", min=1)] = 4,
    keep: Annotated[Keep, typer.Option(help="In memory: one layer, also the activations, or the model.")]
    = Keep.layer,
    device: Annotated[str | None, typer.Option(
        help="cpu, cuda, cuda:1, or h100, h200, a100-80gb, a100-40gb, l40s, rtx4090 by data sheet.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="To compute in.")] = Dtype.auto,
    context: Annotated[int, typer.Option(help="Tokens a row when the result runs.", min=1)] = 4096,
    rows: Annotated[int, typer.Option(help="Rows when the result runs.", min=1)] = 1,
    trust_remote_code: Annotated[bool, typer.Option(help="Run code that comes with the model.")] = False,
    form: FormatOption = Format.table,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    engine: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Predict from the config alone what quantizing takes (memory, disk, time), and running the result.

    [dim]gemq plan mixtral-8x7b --bits 2.5 --device rtx4090[/dim]
    """
    from gemq.algorithms.method import MethodConfig
    from gemq.algorithms.router_tuning import RouterTuningConfig
    from gemq.bench.architectures import KNOWN, load_config
    from gemq.cli import options
    from gemq.loading import check_model, parse_dtype
    from gemq.planning import PlanConfig, make_plan

    keep = former.planned(keep, engine)
    chosen = parse_dtype(dtype)
    wanted = None if isinstance(chosen, str) else chosen
    config = PlanConfig(
        MethodConfig(
            budgets=options.budgets(bits), method=method, candidates=options.widths(candidates), per_layer=constraints,
            attention_bits=attention_bits, dense_bits=dense_bits, shared_bits=options.shared(shared_bits),
            accounting=accounting, tune=tune_routers, perturbation=perturbation, batch_size=batch_size,
            router=RouterTuningConfig(epochs=router_epochs), head_bits=head_bits, embedding_bits=embedding_bits,
        ),
        samples, length, keep, wanted, context, rows,
    )
    local = model in KNOWN or Path(model).suffix == ".json"
    architecture = load_config(model) if local else check_model(model, trust_remote_code)
    found = make_plan(architecture, config, _machine(device, output, wanted), None if local else model)
    if as_json and form not in (Format.table, Format.json):
        raise typer.BadParameter(f"--json and --format {form.value} ask for different things")
    _print(model, found, Format.json if as_json else form)


def _machine(device: str | None, output: Path, dtype: torch.dtype | None) -> Machine:
    import torch

    from gemq.loading import pick_device
    from gemq.planning import other_machine, this_machine

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


def _print(model: str, found: Plan, form: Format) -> None:
    """Both tables and what they rest on; JSON holds all of it, CSV the rows of both tables."""
    options, machine = found.config, found.machine
    if form in (Format.json, Format.jsonl):
        print(dumps({"model": model, **found.to_dict()}, indent=1 if form is Format.json else None))
        return
    if form is Format.csv:
        rows = [{"model": model, "row": "stage"} | row for row in _stages(found)]
        emit("", (), rows + [{"model": model, "row": "result"} | row for row in _results(found)], form)
    else:
        title = (f"quantizing {model} ({found.parts.parameters / 1e9:.2f} billion parameters) on {machine.name} in "
                 f"{found.dtype}, keep {options.keep}, {options.samples} x {options.length} tokens")
        emit(title, _STAGES, _stages(found), form)
        _paragraph("", form)
        title = f"the result, and running it with {options.rows} x {options.context} tokens"
        emit(title, _RESULTS, _results(found), form)
    if machine.rates:
        _paragraph(f"times and tokens/s: {machine.rates.source}; the disk's rate is assumed to be "
                   f"{machine.rates.disk / 1e9:g} GB/s; memory by the formulas of docs/plan.md", form)
    for line in _does_not_run(found):
        _paragraph(line, form, "bold red")
    for shortage in found.shortages():
        _paragraph(f"does not fit: {shortage.stage} needs {display.size(shortage.needed)} of {shortage.place}, "
                   f"{display.size(shortage.free)} are free", form, "bold red")


def _does_not_run(found: Plan) -> Iterator[str]:
    """A line per budget whose result does not run on the machine, with what would."""
    bits = found.runnable_bits
    instead = f"{bits:g} bits would run" if bits is not None else "no budget would run"
    for budget, run in found.inference.items():
        if not run.fits:
            longest = f", or {run.longest:,} tokens a row at these" if run.longest else ""
            yield (f"the result of {budget:g} bits does not run on {found.machine.name}: it needs "
                   f"{display.size(run.total)}, {display.size(run.free or 0)} are free; {instead}{longest}")


def _paragraph(text: str, form: Format, style: str | None = None) -> None:
    """A line below a table: Markdown needs an empty one between, and rows for programs hold none."""
    if form is Format.md:
        print("\n" + text if text else "")
    elif form is Format.csv:
        (display.errors() if style else display.notes()).print(text, style=style, soft_wrap=True)
    elif text:
        display.output().print(text, style=style, soft_wrap=True)


_STAGES = (
    Column("stage", "stage"), Column("device", "device", display.size), Column("memory", "memory", display.size),
    Column("scratch", "scratch", display.size), Column("time", "seconds", duration),
)
_RESULTS = (
    Column("bits", "bits", lambda v: f"{v:g}"), Column("checkpoint", "checkpoint", display.size),
    Column("weights", "weights", display.size), Column("cache", "cache", display.size),
    Column("to run", "total", display.size), Column("longest context", "longest", lambda v: f"{v:,}"),
    Column("tokens/s at most", "tokens_per_second", lambda v: f"{v:,.0f}"),
)


def _stages(found: Plan) -> list[dict[str, Any]]:
    """Bytes and seconds of every stage, the most of all, and what is free; None where it is not known."""
    from gemq.planning.memory import peak

    seconds, machine = found.seconds or {}, found.machine
    rows = [
        {"stage": name, "device": sum(need.device.values()), "memory": sum(need.host.values()),
         "scratch": sum(need.scratch.values()), "seconds": seconds.get(name)}
        for name, need in found.stages.items()
    ]
    most = peak(found.stages)
    rows.append({
        "stage": "most" if len(found.config.method.budgets) == 1 else "most (time: one budget)",
        "device": most["device"], "memory": most["host"], "scratch": most["scratch"],
        "seconds": sum(seconds.values()) if seconds else None,
    })
    disk = None if machine.host_free is None else machine.disk_free
    rows.append({"stage": "free", "device": machine.device_free, "memory": machine.host_free, "scratch": disk,
                 "seconds": None})
    return rows


def _results(found: Plan) -> list[dict[str, Any]]:
    """Sizes of the checkpoint of each budget and of running it, bytes."""
    rates = found.machine.rates
    return [
        {"bits": budget, "checkpoint": size.files, "weights": run.weights, "cache": run.cache, "total": run.total,
         "longest": run.longest, "fits": run.fits,
         "tokens_per_second": rates.bandwidth / run.read if rates else None}
        for budget, size in found.outputs.items() for run in (found.inference[budget],)
    ]
