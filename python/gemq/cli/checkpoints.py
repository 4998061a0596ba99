"""``gemq inspect`` and ``gemq verify``."""

from __future__ import annotations

from typing import Annotated

import typer

import gemq
from gemq.cli import display
from gemq.cli.formats import Column, Format, FormatOption, emit
from gemq.cli.former import FormerForm
from gemq.plain_json import dumps

_BYTES = (
    Column("tensors", "tensors"), Column("size", "bytes", display.size),
    Column("share", "share", lambda v: f"{100 * v:.1f}%".replace("100.0%", "100%")),
)


def inspect(
    model: Annotated[str, typer.Argument(help="Packed checkpoint: a folder or hub name.")],
    form: FormatOption = Format.table,
    former_form: FormerForm = None,
) -> None:
    """Bits and sizes of a packed checkpoint, and its bit map.

    [dim]gemq inspect mixtral-2.5 --format json[/dim]
    """
    from gemq.checkpoint_summary import summarize

    form, summary = former_form or form, summarize(model)
    config, widths, total = summary.config, summary.config.widths, summary.tensor_bytes
    counts = summary.bytes_by_kind | {"all tensors": total, "files": summary.file_bytes}
    rows = [{"tensors": kind, "bytes": count, "share": count / max(total, 1)} for kind, count in counts.items()]
    if form in (Format.json, Format.jsonl):
        whole = config.to_dict() | {"bits_per_expert": summary.expert_bits, "bytes": summary.bytes_by_kind,
                                    "tensor_bytes": total, "file_bytes": summary.file_bytes}
        print(dumps(whole, indent=1 if form is Format.json else None))
        return
    if form is Format.table:
        out = display.output()
        out.print(
            f"{summary.expert_bits:.3f} bits per routed expert, attention {widths.attention}, dense {widths.dense}, "
            f"routers {widths.router}, head {widths.head}, embedding {widths.embedding}, groups of "
            f"{config.group_size}, method {config.method}",
            highlight=False, markup=False,
        )
        for path, width in widths.linears.items():
            out.print(f"{path}: {width} bits", highlight=False, markup=False)
        out.print(display.bit_map(widths.experts, widths.shared, widths.down))
    emit("bytes", _BYTES, rows, form)


def verify(
    model: Annotated[str, typer.Argument(help="Packed checkpoint: a folder or hub name.")],
    form: FormatOption = Format.table,
    former_form: FormerForm = None,
) -> None:
    """Compare every file of a checkpoint with the SHA-256 sums recorded when it was saved.

    [dim]gemq verify mixtral-2.5[/dim]
    """
    form, found = former_form or form, gemq.verify(model)
    if form is not Format.table:
        columns = (Column("checkpoint", "checkpoint"), Column("files", "files"), Column("size", "bytes", display.size))
        emit("", columns, [{"checkpoint": model, "files": found.files, "bytes": found.bytes}], form)
        return
    display.output().print(
        f"{model}: {found.files} files, {display.size(found.bytes)}, as saved", markup=False, highlight=False,
        soft_wrap=True,
    )
