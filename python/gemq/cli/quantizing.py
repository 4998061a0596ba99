"""Output of ``gemq quantize``: a preview, a line per layer, results, warnings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from gemq import distributed, pipeline
from gemq.algorithms.layer_report import LayerReport
from gemq.cli import display
from gemq.cli.formats import Column, Format, emit
from gemq.cli.layer_log import LayerLog
from gemq.dry_run import Preview, TensorPlan, preview
from gemq.generation.memory import peak_bytes
from gemq.hub import check_login, check_repo, upload
from gemq.pipeline import QuantizeConfig, QuantizeOutcome, pick_device
from gemq.run_log import logging_layers

_SHOWN_EXPERTS = 8


def repo_of(repo: str, config: QuantizeConfig, budget: float) -> str:
    """The repository of a budget: the name itself, with the budget behind it if there are several."""
    return repo if len(config.method.budgets) == 1 else f"{repo}-{budget:g}"


def show_preview(config: QuantizeConfig, form: Format) -> None:
    """Print what would become of every tensor."""
    for found in preview(config):
        if form is Format.table or form is Format.md:
            records = [_record(found, t) for t in found.tensors]
            emit(f"at {found.budget:g} bits per expert", _PREVIEW, [r | {"shown": _widths(r)} for r in records], form)
            line = (f"{display.size(found.before)} -> {display.size(found.after)}, "
                    f"{found.before / found.after:.2f} times smaller; nothing was written")
            display.output().print(line, highlight=False)
            if not found.exact:
                display.notes().print(
                    "experts are shown at the budget: their widths follow from costs, which are measured when "
                    "quantizing (--costs FILE takes those of an earlier run)", style="dim", soft_wrap=True)
        else:
            emit("", (), [_record(found, t) for t in found.tensors], form)


def _widths(record: dict) -> str:
    widths = record["widths"]
    if not widths:
        return f"{record['bits']:.3g}"
    return " ".join(f"{widths.count(b)}x{b}" for b in sorted(set(widths))) if len(set(widths)) > 1 else str(widths[0])


_PREVIEW = (
    Column("tensor", "tensor"), Column("shape", "shape", lambda s: "x".join(map(str, s))),
    Column("bits", "shown"), Column("before", "before", display.size), Column("after", "after", display.size),
)


def _record(found: Preview, tensor: TensorPlan) -> dict[str, Any]:
    return {"budget": found.budget, "tensor": tensor.name, "shape": list(tensor.shape), "bits": tensor.bits,
            "widths": None if tensor.widths is None else list(tensor.widths), "before": tensor.before,
            "after": tensor.after}


def layer_lines(log: LayerLog | None, report: display.Stages) -> Callable[[LayerReport], None]:
    """Return the callback that prints a line per quantized layer on standard error, and adds it to ``log``."""

    def seen(layer: LayerReport) -> None:
        bits = "dense" if layer.bits is None else f"{layer.bits:.2f} bits, at least {layer.tokens:,} tokens"
        rounded = f", {layer.rounded} rounded only" if layer.rounded else ""
        error = f"error {100 * layer.error:.2f}%{rounded}, {layer.seconds:.1f} s"
        report.print(f"budget {layer.budget:g}, layer {layer.layer}: {bits}, {error}")
        if log is not None:
            log.add(layer)

    return seen


def check_upload(repo: str | None) -> None:
    """Refuse a bad name, or a missing login, before hours of work."""
    if repo is not None:
        check_repo(repo)
        check_login()


def run(config: QuantizeConfig, log: Path | None, form: Format, repo: str | None, private: bool) -> None:
    """Quantize, show how it goes, print the results, and upload them if asked to."""
    check_upload(repo)
    if not config.output:
        raise typer.BadParameter("--output must be the path of a folder, got ''")
    with distributed.job(pick_device(config.device)) as place:
        lines = LayerLog(log, config) if log is not None and place.first else None
        with display.stages() as report:
            outcomes = pipeline.quantize(config, report, logging_layers(config.log, layer_lines(lines, report)))
    if not place.first:
        return
    emit("quantized", _OUTCOME, [_outcome(o) for o in outcomes], form)
    for outcome in outcomes:
        warn_starved(outcome)
    peak = peak_bytes()
    shown = ", ".join(f"{display.size(v)} {name.upper()}" for name, v in peak.items() if v is not None)
    if shown:
        display.notes().print(f"peak memory: {shown}", style="dim", highlight=False)
    if repo is not None:
        for outcome in outcomes:
            url = upload(outcome.path, repo_of(repo, config, outcome.budget), private=private)
            display.notes().print(f"uploaded {outcome.path} to {url}", style="dim", highlight=False, soft_wrap=True)


_OUTCOME = (
    Column("checkpoint", "path"), Column("bits/expert", "bits_per_expert", lambda v: f"{v:.3f}"),
    Column("gap", "gap", lambda v: f"{v:.1e}"), Column("size", "bytes", display.size),
    Column("seconds", "total_seconds", lambda v: f"{v:.1f}"), Column("rounded only", "fallbacks"),
)


def _outcome(o: QuantizeOutcome) -> dict:
    return {"path": str(o.path), "budget": o.budget, "bits_per_expert": o.bits_per_expert, "gap": o.gap,
            "bytes": o.bytes, "total_seconds": sum(o.seconds.values()), "fallbacks": o.fallbacks,
            "starved": len(o.starved), "seconds": o.seconds}


def warn_starved(outcome: QuantizeOutcome) -> None:
    """Name the experts that calibration hardly reached."""
    if not outcome.starved:
        return
    listed = ", ".join(f"{path} ({tokens})" for path, tokens in list(outcome.starved.items())[:_SHOWN_EXPERTS])
    more = f" and {len(outcome.starved) - _SHOWN_EXPERTS} more" if len(outcome.starved) > _SHOWN_EXPERTS else ""
    display.errors().print(
        f"warning: {outcome.path}: {len(outcome.starved)} experts saw fewer calibration tokens than they have inputs: "
        f"{listed}{more}; more --samples would calibrate them (gemq_report.json has all)",
        style="yellow", markup=False, highlight=False, soft_wrap=True,
    )
