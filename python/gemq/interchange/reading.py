"""Read a checkpoint on disk that is to be converted: its model's structure, its tensors one by one, and the files
beside them."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from gemq.folders import TEMPLATES, is_companion, is_known, lies_inside
from gemq.integrity import read_bytes, read_header
from gemq.model_config import check_sizes, model_config, skeleton
from gemq.models.families import check_supported

# files that belong to the quantized model alone
_ITS_OWN = ("quantize_config.json", TEMPLATES)


def meta_model(source: str | os.PathLike) -> tuple[nn.Module, Any]:
    """The unquantized model of a checkpoint on the meta device, and its config without ``quantization_config``.

    Raises :class:`CheckpointError` or :class:`gemq.errors.UnsupportedModelError`.
    """
    config = model_config(os.fspath(source))
    check_supported(config)
    check_sizes(config, os.fspath(source))
    # the code that it names is neither run nor copied
    for name in ("quantization_config", "auto_map"):
        if hasattr(config, name):
            delattr(config, name)
    return skeleton(config), config


class TensorReader:
    """Tensors of several safetensors files by name."""

    def __init__(self, files: list[Path], stack: ExitStack):
        self.handles: dict[str, Any] = {}
        for file in files:
            # the library's own errors say less
            read_header(file)
            handle = stack.enter_context(safe_open(file, framework="pt"))
            self.handles |= dict.fromkeys(handle.keys(), handle)

    def take(self, name: str) -> Tensor:
        """A tensor, read from its file."""
        return self.handles[name].get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """A tensor's shape, from the header."""
        return list(self.handles[name].get_slice(name).get_shape())


def disk_name(model: nn.Module, name: str) -> str:
    """Name under which a tensor is stored that no conversion splits."""
    (stored,) = revert_weight_conversion(model, {name: torch.empty(0, device="meta")})
    return stored


def disk_names(model: nn.Module, name: str) -> list[str]:
    """The names under which the parts of the parameter ``name`` are stored."""
    return list(revert_weight_conversion(model, {name: model.get_parameter(name).to("meta")}))


def copy_companions(source: Path, folder: Path) -> list[str]:
    """Copy the tokenizer's files, the generation config, licences and the like: regular files of known names.

    Returns the names of what else lay there and was left out: code, pickles, links out of the folder, unknown files.
    """
    left_out = []
    for path in sorted([*source.iterdir(), *(source / TEMPLATES).glob("*")]):
        name = path.relative_to(source).as_posix()
        if is_companion(name) and path.is_file() and lies_inside(path, source):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(read_bytes(path))
        elif is_companion(name):
            left_out.append(f"{name} (no regular file of the folder)")
        elif not is_known(name) and name not in _ITS_OWN and not name.startswith("."):
            left_out.append(name)
    return left_out
