"""The configuration of whatever model a name or folder stands for."""

from __future__ import annotations

from pathlib import Path

from gemq.errors import CheckpointError, first_line


def model_config(path: str, trust_remote_code: bool = False):
    """The transformers config of any model; :class:`CheckpointError` if there is none or its type is not known."""
    from transformers import AutoConfig

    # what cannot be a hub name is a folder
    if not Path(path).exists() and (Path(path).is_absolute() or path.count("/") > 1 or path.startswith(".")):
        raise CheckpointError(f"no model in {path!r}: there is no such folder")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no model in {path!r}: {first_line(error)}") from error
