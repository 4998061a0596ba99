"""``gemq report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemq.cli import display


def report(
    folders: Annotated[list[str], typer.Argument(help="Checkpoints (or hub names), or folders that hold some.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("gemq-report.html"),
    png: Annotated[Path | None, typer.Option(help="Also write the figures as PNGs into this folder.")] = None,
    scores: Annotated[list[Path] | None, typer.Option(
        help="Files of gemq eval --format json, for instance of the original model; may be repeated.")] = None,
    source: Annotated[str | None, typer.Option(help="The original model (folder or hub name), to compare its routers.")]
    = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "gemq report",
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """One HTML page of what quantizing did: bits, importance, routers, perplexity against size, run times.

    The page needs no network. Perplexities are those that gemq eval --record left with the checkpoints.

    [dim]gemq report out/2.5 out/2 -o report.html --png figures[/dim]
    """
    from gemq.report import load, write_pictures, write_report

    if output.is_dir():
        raise typer.BadParameter(f"--output {output} is a folder; name an .html file")
    if output.exists() and not overwrite:
        raise typer.BadParameter(f"--output {output} exists; choose another or pass --overwrite")
    data = load(folders, scores=scores or (), source=source)
    written = [write_report(data, output, title)]
    if png is not None:
        written += write_pictures(data, png)
    for path in written:
        display.output().print(str(path), markup=False, highlight=False, soft_wrap=True)
