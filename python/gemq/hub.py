"""Put a checkpoint on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from gemq.card import write_card
from gemq.checkpoint import load_packed_config
from gemq.errors import CheckpointError, GemqError, first_line
from gemq.integrity import CARD_FILE, verify


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
    """Create ``repo`` if it is not there, put every file of the checkpoint into it in one commit; returns its URL.

    The files are compared with the manifest first, so what is damaged is not published. The card is written anew with
    the repository's name in it. ``api`` is a ``huggingface_hub.HfApi``. Raises :class:`UploadError` or
    :class:`CheckpointError`.
    """
    folder = Path(folder)
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
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Quantized with gemq")
    except CheckpointError:
        raise
    except Exception as error:
        raise UploadError(
            f"{repo} could not be uploaded ({first_line(error)}); the checkpoint is in {folder}: `gemq upload` tries "
            f"again"
        ) from error
    return str(url)


def _api():
    from huggingface_hub import HfApi

    return HfApi(library_name="gemq")
