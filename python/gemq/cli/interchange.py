"""``gemq export`` and ``gemq import-gptq``: checkpoints for, and of, programs without gemq."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemq.cli import display, former

_SHOWN = 20
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")]
# how the output was given before
FormerOutput = Annotated[Path | None, typer.Argument(hidden=True, metavar="")]
ShardSize = Annotated[str, typer.Option(help="Largest file: 5GB, 500MB.")]


def export(
    model: Annotated[str, typer.Argument(help="Packed checkpoint: a folder or hub name.")],
    former_output: FormerOutput = None,
    output: Output = None,
    dtype: Annotated[str, typer.Option(help="auto (the checkpoint's), float16 or bfloat16.")] = "auto",
    shard_size: ShardSize = "5GB",
) -> None:
    """Write a packed checkpoint as a plain 16-bit one, which transformers loads without gemq.

    [dim]gemq export mixtral-2.5 -o mixtral-2.5-dense[/dim]
    """
    from gemq import interchange
    from gemq.loading import parse_dtype
    from gemq.shards import parse_size

    output = former.written(output, former_output, "export")
    with display.stages() as report:
        done = interchange.export(
            model, output, dtype=parse_dtype(dtype), shard_bytes=parse_size(shard_size),
            progress=lambda step, total: report("export", step, total),
        )
    kind = str(done.dtype).removeprefix("torch.")
    display.output().print(
        f"{done.path}: {done.tensors} tensors, {display.size(done.bytes)}, {kind}", markup=False, highlight=False,
        soft_wrap=True,
    )
    say_left_out(done.left_out)


def say_left_out(names: list[str]) -> None:
    """Name files that were not passed on."""
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        display.notes().print(
            f"left out, as no files of a checkpoint: {', '.join(names[:_SHOWN])}{more}", style="dim", highlight=False,
            soft_wrap=True,
        )


def import_gptq(
    source: Annotated[str, typer.Argument(help="GPTQ checkpoint (AutoGPTQ's or GPTQModel's): a folder or hub name.")],
    former_output: FormerOutput = None,
    output: Output = None,
    shard_size: ShardSize = "5GB",
) -> None:
    """Write a GPTQ checkpoint of a Mixture-of-Experts model as a packed checkpoint of gemq: the same codes.

    [dim]gemq import-gptq Mixtral-8x7B-GPTQ -o mixtral-4[/dim]
    """
    from gemq import interchange
    from gemq.shards import parse_size

    output = former.written(output, former_output, "import-gptq")
    with display.stages() as report:
        done = interchange.import_gptq(
            source, output, shard_bytes=parse_size(shard_size),
            progress=lambda step, total: report("import", step, total),
        )
    out = display.output()
    widths = sorted(set(done.config.widths.weight_bits))
    out.print(
        f"{done.path}: experts {', '.join(map(str, widths))} bits, attention {done.config.widths.attention}, "
        f"{display.size(done.bytes)}", markup=False, highlight=False, soft_wrap=True,
    )
    say_left_out(done.left_out)
    if done.wrapped:
        display.errors().print(
            f"note: {done.wrapped} zero points are stored as -1 and were read as 0, as AutoGPTQ reads them",
            style="yellow", markup=False, highlight=False, soft_wrap=True,
        )
