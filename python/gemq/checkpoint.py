"""Save and load packed models: sharded safetensors and ``quantization_config`` in ``config.json``.

A checkpoint is a transformers checkpoint whose experts and linears are the packed buffers of
:mod:`gemq.nn`, canonical layout, next to the unquantized tensors in 16 bits. ``config.json`` is written last: a
partial output has none and is never loaded.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import save_torch_state_dict

from gemq import durable
from gemq.auto_class import auto_class
from gemq.errors import CheckpointError, GemqError
from gemq.folders import HUB_OPTIONS, checkpoint_folder
from gemq.hf import attach
from gemq.integrity import read_json, weight_files, write_manifest
from gemq.integrity import verify as verify_files
from gemq.model_config import generation_config, model_config
from gemq.output_folder import check_output
from gemq.packed_config import PackedConfig
from gemq.packed_model import stored_state
from gemq.staging import staged

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_SHARD = "5GB"


def save_packed(
    model: PreTrainedModel, config: PackedConfig, path: str | os.PathLike, *, tokenizer: Any = None,
    dtype: torch.dtype | None = None, max_shard_size: str = MAX_SHARD,
    extra_files: dict[str, Callable[[Path], None]] | None = None, overwrite: bool = False,
    weights: Callable[[Path], None] | None = None,
) -> Path:
    """Write a packed model as a checkpoint folder, with a manifest for :func:`gemq.verify`.

    Everything is written to a folder of gemq's own beside it and renamed at the end; what was there before stays until
    then. ``dtype`` (float16 or bfloat16) is that of the tensors that stay unquantized. ``extra_files`` maps file
    names to functions that write them; ``weights`` writes the weight files of a model that is not in memory.
    """
    target = check_output(path, overwrite=overwrite)
    with staged(target, overwrite) as folder:
        _write(model, config, folder, tokenizer, dtype, max_shard_size, extra_files or {}, weights)
    return target


def _write(
    model: PreTrainedModel, config: PackedConfig, folder: Path, tokenizer: Any, dtype: torch.dtype | None,
    max_shard_size: str, extra: dict[str, Callable[[Path], None]], weights: Callable[[Path], None] | None,
) -> None:
    attach(model, config)
    if weights is not None:
        weights(folder)
    else:
        metadata = {"format": "pt"}
        save_torch_state_dict(stored_state(model, dtype), folder, max_shard_size=max_shard_size, metadata=metadata)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name, write in extra.items():
        write(folder / name)
    text = _config_text(model, dtype).encode()
    write_manifest(folder, {"config.json": text})
    for file in [p for p in folder.rglob("*") if p.is_file()]:
        durable.sync(file)
    (folder / "config.json").write_bytes(text)
    durable.sync(folder / "config.json")
    durable.sync(folder)


def _config_text(model: PreTrainedModel, dtype: torch.dtype | None) -> str:
    config = copy.deepcopy(model.config)
    config.dtype = dtype or model.dtype
    config.architectures = [type(model).__name__]
    return config.to_json_string()


def load_packed_config(path: str | os.PathLike) -> PackedConfig:
    """The :class:`PackedConfig` of a checkpoint, a folder or hub name. Raises :class:`CheckpointError`."""
    file = checkpoint_folder(path) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} is not a complete checkpoint: it has no config.json")
    return PackedConfig.from_dict(read_json(file).get("quantization_config"))


def from_pretrained(
    path: str | os.PathLike, *, dtype: torch.dtype | str = "auto", device: str | None = None, verify: bool = False,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a packed checkpoint for inference: a transformers model whose experts run on gemq's kernels.

    Args:
        path: a folder written by gemq (or by ``save_pretrained`` of a loaded model), or its name on the hub.
        dtype: of activations and unquantized tensors; "auto" takes the checkpoint's.
        device: where to put the model, for instance "cuda"; None leaves it on the CPU.
        verify: first compare every file with the SHA-256 sums of the manifest, as :func:`gemq.verify` does.
        kwargs: passed on to transformers' ``from_pretrained``. No code of the checkpoint is run unless
            ``trust_remote_code=True`` is among them.

    Raises :class:`CheckpointError` for a checkpoint that is truncated, inconsistent, newer than this version or
    not gemq's; nothing is ever filled in with random weights.
    """
    folder = checkpoint_folder(path, **{name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs})
    if verify:
        verify_files(folder)
    load_packed_config(folder)
    weight_files(folder)
    trusted = kwargs.pop("trust_remote_code", False)
    config = model_config(str(folder), trusted)
    generation_config(folder)
    try:
        model = auto_class(config).from_pretrained(
            folder, dtype=dtype, trust_remote_code=trusted, **kwargs
        )
    except (GemqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # the fields of config.json reach code of transformers that checks few of them: it may fail with anything
        raise CheckpointError(f"{path} could not be loaded: {type(error).__name__}: {error}") from error
    model.eval()
    return model if device is None else model.to(device)
