"""A checkpoint on disk that is converted: its model's structure, its tensors one by one, and the files beside them."""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from gemq.errors import CheckpointError, GemqError
from gemq.integrity import INDEX_FILE
from gemq.models.families import check_supported

_TEMPLATES = "additional_chat_templates"
# what belongs to the quantized model alone
_LEFT_OUT = ("config.json", "quantize_config.json", INDEX_FILE, "README.md")


def meta_model(source: str | os.PathLike) -> tuple[nn.Module, Any]:
    """The unquantized model of a checkpoint on the meta device, and its config without ``quantization_config``.

    Raises :class:`CheckpointError` or :class:`gemq.errors.UnsupportedModelError`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source)
        check_supported(config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config), config
    except GemqError:
        raise
    except Exception as error:
        # the fields of config.json reach code of transformers that checks few of them: it may fail with anything
        raise CheckpointError(f"{source} could not be read: {type(error).__name__}: {error}") from error


class TensorReader:
    """Tensors of several safetensors files by name."""

    def __init__(self, files: list[Path], stack: ExitStack):
        self.handles = {}
        for file in files:
            handle = stack.enter_context(safe_open(file, framework="pt"))
            self.handles |= dict.fromkeys(handle.keys(), handle)

    def take(self, name: str) -> Tensor:
        """A tensor, read from its file."""
        return self.handles[name].get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """A tensor's shape, from the header."""
        return list(self.handles[name].get_slice(name).get_shape())


def disk_name(model: nn.Module, name: str) -> str:
    """The name under which a tensor that no conversion splits is stored."""
    (stored,) = revert_weight_conversion(model, {name: torch.empty(0, device="meta")})
    return stored


def disk_names(model: nn.Module, name: str) -> list[str]:
    """The names under which the parts of the parameter ``name`` are stored."""
    return list(revert_weight_conversion(model, {name: model.get_parameter(name).to("meta")}))


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files, the generation config and the like."""
    for file in sorted(source.iterdir()):
        mine = file.name in _LEFT_OUT or file.name.startswith("gemq_") or file.suffix == ".safetensors"
        if file.is_file() and not mine:
            shutil.copyfile(file, folder / file.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, folder / _TEMPLATES)
