"""The transformers plug-in: ``AutoModelForCausalLM.from_pretrained`` loads packed checkpoints after ``import gemq``."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gemq.checkpoint import PackedConfig, packed_skeleton
from gemq.errors import CheckpointError
from gemq.models import packed_modules, prepare, replace_with_packed


@register_quantization_config("gemq")
class GemqConfig(QuantizationConfigMixin):
    """``quantization_config`` as transformers sees it: a validated :class:`gemq.checkpoint.PackedConfig`."""

    def __init__(self, **kwargs: Any):
        self.quant_method = "gemq"
        self.packed = PackedConfig.from_dict({"quant_method": "gemq", **kwargs})

    @classmethod
    def of(cls, packed: PackedConfig) -> GemqConfig:
        """Wrap a :class:`PackedConfig`."""
        data = packed.to_dict()
        data.pop("quant_method")
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """As it goes into ``config.json``."""
        return self.packed.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """All of it: nothing is a default that could be left out."""
        return self.to_dict()


@register_quantizer("gemq")
class GemqQuantizer(HfQuantizer):
    """Builds the packed modules before loading, checks the files against them, prepares the kernels' layout after."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, checkpoint_files=None, **kwargs):
        modules = packed_skeleton(model, self.quantization_config.packed, device="meta")
        replace_with_packed(model, modules)
        if checkpoint_files:
            check_files(model, [Path(f) for f in checkpoint_files])

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs):
        _check_metadata(model)
        prepare(model)
        return model

    def is_serializable(self) -> bool:
        """Loaded models can be saved again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Packed weights are frozen; gradients flow to activations and routing weights."""
        return False

    @property
    def is_compileable(self) -> bool:
        """All ops have fake implementations."""
        return True


def attach(model: nn.Module, packed: PackedConfig) -> None:
    """Make a model that was packed in memory save like one that was loaded."""
    config = GemqConfig.of(packed)
    model.config.quantization_config = config
    model.hf_quantizer = GemqQuantizer(config)


def read_header(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Names, dtypes and shapes of a safetensors file, whose size must be what the header says."""
    import json

    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size - 8:
                raise CheckpointError(f"{file.name} is truncated or corrupt: its header claims {length} bytes")
            header = json.loads(handle.read(length))
    except (struct.error, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file.name} has no readable safetensors header ({error})") from None
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise CheckpointError(f"{file.name} is truncated or corrupt: {size} bytes, its header says {8 + length + end}")
    return {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()}


def check_files(model: nn.Module, files: list[Path]) -> None:
    """Compare the checkpoint's headers with the packed model (on the meta device) before anything is loaded.

    Raises :class:`CheckpointError` that lists every missing tensor and every wrong shape.
    """
    found: dict[str, list[int]] = {}
    for file in files:
        for name, (_, shape) in read_header(file).items():
            if name in found:
                raise CheckpointError(f"the tensor {name} is in more than one file")
            found[name] = shape
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = {k: v.to("meta") for k, v in model.state_dict().items() if k not in tied}
    expected = {k: list(v.shape) for k, v in revert_weight_conversion(model, state).items()}
    missing = sorted(set(expected) - set(found))
    wrong = [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if missing or wrong:
        problems = [*(f"{name} is missing" for name in missing), *wrong]
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"the checkpoint does not fit its config: {shown}")


def _check_metadata(model: nn.Module) -> None:
    for path, module in packed_modules(model):
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype == torch.float16 and not bool(torch.isfinite(buffer).all()):
                raise CheckpointError(f"{path}.{name} holds NaN or infinity: the checkpoint is corrupt")
