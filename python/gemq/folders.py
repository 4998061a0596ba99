"""Resolve a path or the name of a hub repository to a folder, and recognise the files of a model."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from gemq.errors import CheckpointError, first_line

TEMPLATES = "additional_chat_templates"
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
# files of a model's folder that a tokenizer, a processor or a reader needs; none is code or a pickle
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v*", "tekken.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "generation_config.json", "chat_template.json", "chat_template.jinja", f"{TEMPLATES}/*.jinja",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json",
)
# what may be passed on only together with this
LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
# files that gemq itself writes beside the weights
OWN = ("config.json", "gemq_*.json", "README.md")
# how a repository is fetched, as transformers spells it
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only")
# never to be copied or published, whatever else their names are: code, pickles, archives
_REFUSED = (
    ".py", ".pyc", ".pyi", ".so", ".sh", ".js", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz",
    ".joblib", ".h5", ".zip", ".tar", ".gz",
)


def is_companion(name: str) -> bool:
    """Tell a tokenizer's, processor's or licence file by its path inside the folder, with ``/`` between parts."""
    return _matches(name, (*COMPANIONS, *LEGAL)) and not name.lower().endswith(_REFUSED)


def is_legal(name: str) -> bool:
    """Tell a licence or notice."""
    return _matches(name, LEGAL)


def is_known(name: str) -> bool:
    """Tell a file that belongs to a checkpoint: companions, weights, and what gemq writes."""
    return is_companion(name) or _matches(name, (*WEIGHTS, *OWN))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    # fnmatch lets * pass over /
    return not name.startswith(".") and any(
        name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in patterns
    )


def lies_inside(file: Path, folder: Path) -> bool:
    """Tell if a path's content lies in ``folder``, or among the blobs that the hub's cache links to from there."""
    real, root = file.resolve(), folder.resolve()
    blobs = root.parent.parent / "blobs"
    return real.is_relative_to(root) or (root.parent.name == "snapshots" and real.parent == blobs)


def is_hub_name(text: str) -> bool:
    """Tell if a text can be the name of a hub repository (``owner/name`` or ``name``) and is no path on this disk."""
    from huggingface_hub.utils import validate_repo_id

    if not text or os.path.lexists(text) or Path(text).is_absolute() or text.startswith((".", "~")):
        return False
    try:
        validate_repo_id(text)
    except ValueError:
        return False
    return True


def file_or_folder(path: str | os.PathLike) -> Path:
    """Resolve ``path`` where a file or a checkpoint is expected. ``owner/name`` that is no file here is a hub
    repository.

    Raises :class:`CheckpointError`.
    """
    text = os.fspath(path)
    named = "/" in text and not text.endswith((".json", ".pkl", ".pickle")) and is_hub_name(text)
    return checkpoint_folder(text) if named else Path(text)


def local_folder(
    path: str | os.PathLike, patterns: tuple[str, ...] = ("*.safetensors", "*.json"), **options: Any
) -> Path:
    """``path`` if it is a folder, else the hub's snapshot of that name, of files that fit ``patterns``.

    The cache is used as far as it goes; ``HF_HUB_OFFLINE`` is heeded. ``options`` are those of
    :data:`HUB_OPTIONS`. Raises :class:`CheckpointError` if there is neither.
    """
    if Path(path).is_dir():
        return Path(path)
    name = os.fspath(path)
    if Path(path).exists():
        raise CheckpointError(f"{name!r} is a file; a folder or the name of a hub repository is needed")
    if not is_hub_name(name):
        raise CheckpointError(f"there is no folder {name!r}, and it cannot be the name of a hub repository")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns), **options))
    except Exception as error:
        # no network, no such repository, no right to it, a disk that is full, a broken cache
        raise CheckpointError(
            f"there is no folder {name!r}, and no repository of that name could be had: {first_line(error)}"
        ) from error


def checkpoint_folder(path: str | os.PathLike, **options: Any) -> Path:
    """The folder of a packed checkpoint, given as a folder or as the name of a hub repository.

    Of a repository only files of known names are fetched: no code, no pickles. ``options`` are those of
    :data:`HUB_OPTIONS`. Raises :class:`CheckpointError`.
    """
    return local_folder(path, (*WEIGHTS, *COMPANIONS, *LEGAL, *OWN), **options)
