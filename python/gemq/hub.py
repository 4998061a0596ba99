"""Put a checkpoint on the Hugging Face hub."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemq.card import write_card
from gemq.checkpoint import load_packed_config
from gemq.errors import CheckpointError, GemqError, first_line
from gemq.folders import is_known, is_legal, lies_inside
from gemq.integrity import CARD_FILE, MANIFEST_FILE, NOTES, recorded_files, verify

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class UploadError(GemqError, OSError):
    """The hub could not be reached, or did not take the files."""


def check_repo(repo: str) -> str:
    """``repo`` if it can be the name of a repository, ``owner/name`` or ``name``; else ``ValueError``."""
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except ValueError as error:
        raise ValueError(f"upload_repo must be like owner/name, got {repo!r} ({error})") from None
    return repo


def check_login(api: Any | None = None) -> str:
    """The user's name at the hub, asked before long work starts. Raises :class:`UploadError` without a valid token."""
    try:
        return str((api or _api()).whoami()["name"])
    except Exception as error:
        raise UploadError(f"uploading needs a login at the hub: run `hf auth login` ({first_line(error)})") from error


def upload(folder: str | os.PathLike, repo: str, *, private: bool = False, api: Any | None = None) -> str:
    """Create ``repo`` if it is not there, put the checkpoint's files into it in one commit; returns its URL.

    The files are compared with the manifest first, so what is damaged is not published, nor is what the manifest and
    :func:`published` do not know. The card is written anew with the repository's name in it. ``api`` is a
    ``huggingface_hub.HfApi``. Raises :class:`UploadError` or :class:`CheckpointError`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {str(folder)!r} to upload")
    load_packed_config(folder)
    check_repo(repo)
    verify(folder)
    text = (folder / CARD_FILE).read_text(encoding="utf-8") if (folder / CARD_FILE).is_file() else None
    # a card that someone wrote by hand stays; ours gets the name that readers need
    if text is None or re.search(r"^- gemq$", text, flags=re.M):
        write_card(folder, repo)
    api = api or _api()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        # patterns, in which a bracket is no letter
        names = [glob.escape(name) for name in published(folder)[0]]
        api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message="Quantized with gemq", allow_patterns=names
        )
    except CheckpointError:
        raise
    except Exception as error:
        raise UploadError(
            f"{repo} could not be uploaded ({first_line(error)}); the checkpoint is in {folder}: `gemq upload` tries "
            f"again"
        ) from error
    return str(url)


def published(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files of a checkpoint that go to the hub, and of those in its folder that do not.

    What goes is recorded in the manifest and of a known name, or is a note or licence beside it.
    """
    beside = {MANIFEST_FILE, *NOTES}
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_symlink() or not p.is_dir())
    recorded = set(recorded_files(folder))
    goes = [
        name for name in files if is_known(name) and (name in recorded or name in beside or is_legal(name))
        and (folder / name).is_file() and lies_inside(folder / name, folder)
    ]
    return goes, [name for name in files if name not in goes]


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(library_name="gemq")
