"""``gemq quantize``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from gemq.choices import (
    Accounting,
    Changed,
    Clip,
    Constraints,
    Dtype,
    Estimate,
    Granularity,
    Keep,
    Method,
    Perturbation,
    Recipe,
    RouterMethod,
)
from gemq.cli import former
from gemq.cli.formats import Format, FormatOption
from gemq.cli.panels import HelpAll
from gemq.cli.settings import ConfigFile, given

_CONSTRAINTS = "Per layer an expert at the highest width (c2), the second highest (c3), c2c3 or none (paper: Table 17)."
_ACCOUNTING = "What shared experts count of the budget: exact, their size; paper, as its experiments count them."
_GRANULARITY = "What has its own width: expert; matrix, gate-and-up or down; auto, matrix if 0 is no candidate."
_RECIPE = "best, paper, fast or default: sets what is not given."
_KEEP = "In memory: one layer, also the activations, or the whole model (without a run directory: not resumable)."
_TENSOR_BITS = "Width of every matrix whose path a regular expression finds: 'o_proj=8'; may be repeated."

Device = Annotated[str | None, typer.Option(
    metavar="NAME", help="cpu, cuda, cuda:1 (default: CUDA where there is one).")]
Length = Annotated[int, typer.Option(metavar="N", help="Tokens per window.", min=2)]


def quantize(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Folder or hub name of the full-precision model.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")] = None,
    bits: Annotated[str | None, typer.Option(
        "--bits", "-b", metavar="BITS",
        help="Bits per expert; several, falling: 3,2.5,2 (default: 2.5, or the allocation's).",
    )] = None,
    method: Annotated[Method, typer.Option(help="How bits are allocated.")] = Method.gemq,
    candidates: Annotated[str, typer.Option(help="Widths an expert may take, of 0..8 (paper: Table 18).")] = "1,2,3",
    granularity: Annotated[Granularity, typer.Option(help=_GRANULARITY)] = Granularity.auto,
    constraints: Annotated[Constraints, typer.Option(help=_CONSTRAINTS)] = Constraints.none,
    calibration: Annotated[str, typer.Option(
        metavar="TEXT", help="wikitext2, c4, file.txt, file.jsonl#field, or a mixture.")] = "wikitext2",
    samples: Annotated[int, typer.Option(metavar="N", help="Calibration windows.", min=1)] = 128,
    length: Length = 2048,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed for choosing calibration windows.")] = 0,
    attention_bits: Annotated[int, typer.Option(help="1..8, or 16 to leave as is (paper: Table 19).")] = 4,
    dense_bits: Annotated[int, typer.Option(help="Dense MLP layers: 1..8, or 16.")] = 4,
    shared_bits: Annotated[str, typer.Option(help="Shared experts: auto, 1..8 or 16.")] = "auto",
    head_bits: Annotated[int, typer.Option(help="Head (lm_head): 4..8, or 16 to leave as is.")] = 16,
    embedding_bits: Annotated[int, typer.Option(help="Token embedding: 4..8, or 16; one width if tied to the head.")]
    = 16,
    accounting: Annotated[Accounting, typer.Option(help=_ACCOUNTING)] = Accounting.exact,
    router_bits: Annotated[int, typer.Option(help="Routers after tuning: 1..8, or 16 (paper: Table 20).")] = 16,
    group_size: Annotated[int, typer.Option(help="Columns per scale: 32, 64 or 128.")] = 128,
    recipe: Annotated[Recipe, typer.Option(metavar="NAME", help=_RECIPE)] = Recipe.default,
    clip: Annotated[Clip | None, typer.Option(help="Range search (default: the recipe's).")] = None,
    refine: Annotated[int | None, typer.Option(
        help="Rounds that improve codes and grids after GPTQ (default: the recipe's).", min=0, max=100)] = None,
    compensate: Annotated[bool | None, typer.Option(
        help="Fit down projections to what quantized gate and up give them (default: the recipe's).")] = None,
    rescale: Annotated[bool | None, typer.Option(
        help="Scale rows so that their outputs keep their power (default: the recipe's).")] = None,
    perturbation: Annotated[Perturbation, typer.Option(help="How an expert is quantized to measure it.")]
    = Perturbation.gptq,
    damping: Annotated[float, typer.Option(help="Of the Hessian, in units of its mean diagonal.")] = 0.01,
    tune_routers: Annotated[bool, typer.Option(help="Fine-tune the routers after quantizing.")] = True,
    router_text: Annotated[str | None, typer.Option(help="Text for that (default: the calibration windows).")] = None,
    router_method: Annotated[RouterMethod, typer.Option(help="On the loss, or towards the full-precision routers.")]
    = RouterMethod.loss,
    router_lr: Annotated[float, typer.Option(help="AdamW learning rate.")] = 1e-4,
    router_epochs: Annotated[int, typer.Option(help="Passes over that text.", min=1)] = 1,
    router_batch: Annotated[int, typer.Option(help="Windows a step (paper: 1); processes share them.", min=1)] = 1,
    affinity: Annotated[float, typer.Option(help="Weight tokens in GPTQ by routing weight to this power.")] = 0.0,
    estimate: Annotated[Estimate, typer.Option(help="Model of later budgets' costs.")] = Estimate.tuned,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.", min=1)] = 4,
    device: Device = None,
    dtype: Annotated[Dtype, typer.Option(help="To compute in.")] = Dtype.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
    = False,
    check: Annotated[bool, typer.Option(help="Refuse to start where memory or disk will not do (gemq plan).")] = True,
    keep: Annotated[Keep, typer.Option(help=_KEEP)] = Keep.layer,
    run_dir: Annotated[str | None, typer.Option(help="Folder of unfinished work (default: OUTPUT.run).")] = None,
    resume: Annotated[Path | None, typer.Option(
        metavar="DIR", help="Continue the run of this folder with its options.")] = None,
    changed: Annotated[Changed, typer.Option(
        help="If the run directory was begun with other options: refuse it, redo what they touch, or restart.",
    )] = Changed.refuse,
    keep_run: Annotated[bool, typer.Option("--keep-run", help="Leave the run directory when done.")] = False,
    log: Annotated[str | None, typer.Option(metavar="FILE", help="File for JSON lines about every stage and layer.")]
    = None,
    allocation: Annotated[Path | None, typer.Option(
        help="Widths decided elsewhere (.json, .pkl or a checkpoint): nothing is measured; --bits is then a limit."
    )] = None,
    tensor_bits: Annotated[list[str] | None, typer.Option(help=_TENSOR_BITS)] = None,
    costs: Annotated[Path | None, typer.Option(help="Use costs that an earlier run saved: its folder, or the file.")]
    = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show widths and sizes by tensor; write nothing.")] = False,
    upload_repo: Annotated[str | None, typer.Option(help="Put the result on the hub, as owner/name.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository private.")] = False,
    form: FormatOption = Format.table,
    config_file: ConfigFile = None,
    help_all: HelpAll = False,
    # former names
    stream: Annotated[bool | None, typer.Option("--stream/--no-stream", hidden=True)] = None,
    scratch: Annotated[str | None, typer.Option(hidden=True)] = None,
    redo: Annotated[bool, typer.Option("--redo", hidden=True)] = False,
    restart: Annotated[bool, typer.Option("--restart", hidden=True)] = False,
    layer_log: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure, allocate, quantize, tune the routers, and save a packed checkpoint.

    The same command, given again after it was ended, continues where it was.

    [dim]gemq quantize mistralai/Mixtral-8x7B-v0.1 --bits 2.5 -o mixtral-2.5[/dim]

    [dim]torchrun --nproc-per-node 4 -m gemq quantize ...[/dim] shares the work among processes.
    """
    from gemq import distributed
    from gemq.cli import options, quantizing
    from gemq.cli.resume import resumed
    from gemq.recipes import quantize_config

    keep, changed = former.kept(keep, stream, scratch), former.changing(changed, redo, restart)
    if layer_log is not None:
        former.tell("--layer-log", "--log, one JSON lines file for stages and layers")
    if resume is None and (model is None or output is None):
        raise typer.BadParameter("give a MODEL and --output, or --resume with the folder of a run")
    own = distributed.own_device()
    device = device or own
    told: dict[str, Any] = {
        "constraints": constraints, "samples": samples, "perturbation": perturbation, "estimate": estimate,
        "tune_routers": tune_routers, "accounting": accounting, "granularity": granularity,
    }
    with options.named("bits", "candidates", "shared_bits", "tensor_bits", "allocation"):
        config = quantize_config(
            model or "", output or "", bits=bits, recipe=recipe, method=method.value, candidates=candidates,
            calibration=calibration, length=length, seed=seed, attention_bits=attention_bits, dense_bits=dense_bits,
            shared_bits=shared_bits, router_bits=router_bits, group_size=group_size, clip=clip.value if clip else None,
            refine=refine, compensate=compensate, rescale=rescale, damping=damping, router_text=router_text,
            router_method=router_method.value, router_lr=router_lr, router_epochs=router_epochs,
            router_batch=router_batch, affinity=affinity, batch_size=batch_size, device=device, dtype=dtype,
            overwrite=overwrite, trust_remote_code=trust_remote_code, check=check, keep=keep, changed=changed,
            run_dir=run_dir, keep_run=keep_run, log=log, allocation=allocation,
            tensor_bits=tensor_bits, costs=costs, head_bits=head_bits, embedding_bits=embedding_bits,
            # a recipe sets what is not given
            **{name: value if given(context, name) else None for name, value in told.items()},
        )
    if resume is not None:
        # each process of a job has a GPU of its own
        config = resumed(resume, config, context)
        config = config if own is None else replace(config, device=own)
    if dry_run:
        quantizing.show_preview(config, form)
    else:
        quantizing.run(config, layer_log, form, upload_repo, private)
