"""``gemq upload``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemq.cli import display
from gemq.cli.interchange import say_left_out
from gemq.errors import CheckpointError


def upload(
    checkpoint: Annotated[Path, typer.Argument(help="Packed checkpoint folder.")],
    repo: Annotated[str, typer.Argument(help="Repository, like owner/name; it is made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private.")] = False,
) -> None:
    """Put a checkpoint on the Hugging Face hub, after comparing its files with its manifest.

    [dim]gemq upload out/2.5 me/mixtral-2.5[/dim]
    """
    from gemq import hub

    if not checkpoint.is_dir():
        raise CheckpointError(f"there is no folder {str(checkpoint)!r} to upload")
    hub.check_repo(repo)
    hub.check_login()
    url = hub.upload(checkpoint, repo, private=private)
    display.output().print(url, markup=False, highlight=False, soft_wrap=True)
    say_left_out(hub.published(checkpoint)[1])
