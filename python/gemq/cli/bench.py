"""``gemq bench``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gemq.choices import Compile, Dtype
from gemq.cli import display, former
from gemq.cli.formats import Column, Format, FormatOption, emit
from gemq.cli.generation import Device, DtypeOption
from gemq.cli.settings import ConfigFile
from gemq.plain_json import dumps

if TYPE_CHECKING:
    from gemq.bench import BenchResult
    from gemq.bench.measuring import Measurement, Memory

_SHOWN_KERNELS = 12
_GIB = 1 << 30


def bench(
    model_config: Annotated[str, typer.Option(
        help="A name that gemq knows, such as qwen3-30b-a3b or gpt-oss-20b, or a config.json.")],
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Required: a config has no weights.")]
    = False,
    bits: Annotated[float | None, typer.Option("--bits", "-b", help="Mean bits of the routed experts; 16: baseline.")]
    = None,
    mix: Annotated[str | None, typer.Option(help="Instead of --bits, shares of widths: 1:0.3,2:0.4,3:0.3.")] = None,
    layers: Annotated[int | None, typer.Option(help="Only this many decoder layers.", min=1)] = None,
    attention_bits: Annotated[int, typer.Option(help="Attention and dense MLPs: 1..8, or 16.")] = 4,
    shared_bits: Annotated[int | None, typer.Option(help="Shared experts: 1..8, or 16 (DeepSeek: 3, else 4).")]
    = None,
    head_bits: Annotated[int, typer.Option(help="Head: 4..8, or 16.")] = 16,
    embedding_bits: Annotated[int, typer.Option(help="Token embedding: 4..8, or 16.")] = 16,
    baseline: Annotated[str, typer.Option(help="With --bits 16: grouped_mm, batched_mm, gather, eager or all.")]
    = "all",
    tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 200,
    batch: Annotated[int, typer.Option(help="Rows, 1..64.")] = 1,
    prompt_length: Annotated[int, typer.Option(help="Random tokens before them.")] = 128,
    compile: Annotated[Compile, typer.Option(help="How a step runs; auto is graph on CUDA (baseline: compile).")]
    = Compile.auto,
    profile_steps: Annotated[int, typer.Option(help="Steps of the breakdown by kernel; 0 leaves it out.", min=0)] = 4,
    seed: Annotated[int, typer.Option(help="Of the weights and the prompt.")] = 0,
    device: Device = None,
    dtype: DtypeOption = Dtype.auto,
    prompt_repeats: Annotated[int, typer.Option(help="Runs of the prompt, for the spread of the first token.", min=1)]
    = 3,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="File for the result as JSON.")]
    = None,
    form: FormatOption = Format.table,
    config_file: ConfigFile = None,
    former_output: Annotated[Path | None, typer.Option("--json", hidden=True)] = None,
) -> None:
    """Decoding speed, memory and kernels of a real architecture with random packed weights.

    [dim]gemq bench --model-config mixtral-8x7b --bits 2.5 --random-weights -o mixtral-2.5.json[/dim]
    """
    from gemq.bench import BenchConfig, run_bench, write_json

    if not random_weights:
        raise typer.BadParameter("a config has no weights: say --random-weights")
    if output is not None and str(output) in set(Format):
        # what -o was before
        former.tell(f"-o {output}", f"--format {output}")
        form, output = Format(str(output)), None
    if former_output is not None:
        former.tell("--json", "--output")
        output = former_output
    _check_writable(output)
    config = BenchConfig(
        model_config, bits, None if mix is None else _parse_mix(mix), layers, attention_bits, shared_bits, baseline,
        tokens, batch, prompt_length, compile.value, device, dtype, seed, profile_steps,
        prompt_repeats, head_bits, embedding_bits,
    )
    note = display.notes()
    result = run_bench(config, lambda text: note.print(text, style="dim", highlight=False))
    if output is not None:
        write_json(result, output)
    if form is Format.table:
        _show(result)
    else:
        _emit(result, form)


def _emit(result: BenchResult, form: Format) -> None:
    """Rows to paste or to parse; JSON holds the whole result."""
    if form in (Format.json, Format.jsonl):
        print(dumps(result.to_dict(), indent=1 if form is Format.json else None))
        return
    config = result.config
    records = [{
        "model": config.model_config, "layers": result.layers, "bits": result.bits_per_expert, "run": name,
        "mode": run.mode, "batch": run.batch, "prompt": run.prompt_length, "device": result.device,
        "dtype": result.dtype, "tokens_per_second": run.tokens_per_second, "step_ms": _milliseconds(run.step_seconds),
        "first_token_ms": _milliseconds(run.first_token), "weights": run.memory.weights,
        "peak": run.memory.reserved or run.memory.resident, "roofline": run.roofline.share,
        "rate": _spread(run.tokens_per_second, "p20", "p80"), "step": _spread(_milliseconds(run.step_seconds), "p50",
                                                                            "p95"),
        "first": _spread(_milliseconds(run.first_token), "p20", "p80"),
    } for name, run in result.runs.items()]
    if form is Format.csv:
        records = [{k: v for k, v in r.items() if k not in ("rate", "step", "first")} for r in records]
    emit("", _MARKDOWN, records, form)


def _milliseconds(times: dict[str, float]) -> dict[str, float]:
    return {name: 1e3 * value for name, value in times.items()}


def _spread(values: dict[str, float], low: str, high: str) -> str:
    """The median, and between which two percentiles it lies."""
    return f"{values['p50']:.4g} ({values[low]:.4g} to {values[high]:.4g})"


_MARKDOWN = (
    Column("model", "model"), Column("bits", "bits", lambda v: f"{v:.3g}"), Column("run", "run"),
    Column("batch", "batch"), Column("prompt", "prompt"), Column("tokens/s (p20 to p80)", "rate"),
    Column("ms a token (p50 to p95)", "step"), Column("first token ms (p20 to p80)", "first"),
    Column("weights", "weights", display.size), Column("peak", "peak", display.size),
    Column("roofline", "roofline", lambda v: f"{100 * v:.0f}%"),
)


def _check_writable(file: Path | None) -> None:
    if file is None:
        return
    if file.is_dir() or not os.access(file.absolute().parent, os.W_OK):
        raise typer.BadParameter(f"--output {file} cannot be written")


def _parse_mix(text: str) -> tuple[tuple[int, float], ...]:
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return tuple((int(width), float(share)) for width, share in pairs)
    except ValueError:
        raise typer.BadParameter(f"--mix must be like 1:0.3,2:0.4,3:0.3, got {text!r}") from None


def _show(result: BenchResult) -> None:
    out = display.output()
    config = result.config
    rows = [_row(name, run) for name, run in result.runs.items()]
    columns = ["run", "tokens/s", "p20", "p80", "ms/step", "p95 ms", "first token ms", "weights", "peak", "GB/step",
               "roofline"]
    title = (f"{config.model_config}, {result.layers} layers, {result.bits_per_expert:.3g} bits per expert, "
             f"batch {config.batch}, {result.device}, {result.dtype}")
    out.print(display.table(title, columns, rows))
    best = result.runs[result.strongest]
    if len(rows) > 1:
        out.print(f"strongest: {result.strongest}", highlight=False)
    for name, why in result.failures.items():
        out.print(f"{name} could not run: {why}", markup=False, highlight=False, soft_wrap=True)
    out.print(f"copy bandwidth {best.roofline.bandwidth / 1e9:.1f} GB/s", highlight=False)
    if best.kernels:
        kernels = [[k.name[:70], f"{k.microseconds:.1f}", f"{k.calls:g}", f"{100 * k.share:.1f}%"]
                   for k in best.kernels[:_SHOWN_KERNELS]]
        out.print(display.table(f"kernels of {result.strongest}", ["kernel", "us/step", "calls", "share"], kernels))


def _row(name: str, run: Measurement) -> list[str]:
    rate = run.tokens_per_second
    return [
        f"{name} ({run.mode})", f"{rate['p50']:.1f}", f"{rate['p20']:.1f}", f"{rate['p80']:.1f}",
        f"{1e3 * run.step_seconds['p50']:.2f}", f"{1e3 * run.step_seconds['p95']:.2f}",
        f"{1e3 * run.first_token['p50']:.0f}",
        f"{run.memory.weights / _GIB:.2f} GiB", _peak(run.memory), f"{run.roofline.bytes_per_step / 1e9:.3f}",
        f"{100 * run.roofline.share:.0f}%",
    ]


def _peak(memory: Memory) -> str:
    held = memory.reserved if memory.reserved is not None else memory.resident
    return "unknown" if held is None else f"{held / _GIB:.2f} GiB"
