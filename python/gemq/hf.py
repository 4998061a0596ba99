"""The transformers plug-in: ``AutoModelForCausalLM.from_pretrained`` loads packed checkpoints after ``import gemq``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from gemq.errors import CheckpointError
from gemq.integrity import TensorEntry, check_inside, read_header, weight_files
from gemq.model_config import check_layers, check_sizes
from gemq.models import describe, empty_twin, packed_modules, prepare, replace_with_packed
from gemq.models.ahead import is_ahead
from gemq.models.packed import remember_ties
from gemq.models.weighted_inputs import call_as_before
from gemq.nn import LowBitEmbedding, LowBitExperts, LowBitLinear
from gemq.packed_config import PackedConfig
from gemq.packed_model import kept_in_float32, packed_skeleton
from gemq.tensor_files import DTYPES
from gemq.transformers_versions import ConfigSeer, cast_as_declared, dtypes_of

_FLOATS = ("F32", "F16", "BF16")
# a number of layers above this is believed only if there are as many tensors
_MANY_LAYERS = 1000


class GemqConfig(QuantizationConfigMixin):
    """``quantization_config`` as transformers sees it: a validated :class:`gemq.packed_config.PackedConfig`."""

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
        """Convert to the values stored in ``config.json``."""
        return self.packed.to_dict()

    def to_diff_dict(self) -> dict[str, Any]:
        """Convert all fields: none is a default that could be left out."""
        return self.to_dict()


class GemqQuantizer(ConfigSeer):
    """Builds the packed modules before loading, checks the files against them, prepares the kernels' layout after."""

    requires_calibration = True

    def see_config(self, config: Any) -> None:
        """Check sizes, layers and the asked parallelism before the model is built, layer by layer."""
        check_sizes(config, getattr(config, "name_or_path", "") or "the config")
        _check_layers(config)
        _refuse_tensor_parallelism(getattr(config, "distributed_config", None))

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if model.get_output_embeddings() is None:
            raise CheckpointError(
                f"a gemq checkpoint loads as a causal language model, not as {type(model).__name__}: use "
                "AutoModelForCausalLM, whose base_model is that"
            )
        files = [Path(f) for f in checkpoint_files or []]
        check_inside(files, model.config.name_or_path)
        packed = self.quantization_config.packed
        modules = packed_skeleton(describe(model), packed.widths, packed.group_size, "meta")
        replace_with_packed(model, modules)
        for path, module in modules.items():
            if isinstance(module, LowBitExperts):
                # a family may initialise its experts from the block around them, which has none now
                model.get_submodule(path.rpartition(".")[0])._is_hf_initialized = True
        if files:
            check_files(model, files)
        self._dtypes = dtypes_of(model, kept_in_float32(model))

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        cast_as_declared(model, self._dtypes)
        _check_metadata(model)
        prepare(model)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Return the family's own modules for ``model.dequantize()``, with weights ``q * s + m`` rounded once to
        ``dtype``."""
        # transformers names the model's own where the caller gives none
        kind = cast(torch.dtype, dtype)
        twin = empty_twin(model)
        forms = {f"{layer.path}.experts": layer.form for layer in describe(twin).moe}
        for path, packed in list(packed_modules(model)):
            plain: Any = twin.get_submodule(path)
            if isinstance(packed, LowBitEmbedding):
                plain.weight = nn.Parameter(packed.dense(kind))
                for name, _ in plain.named_buffers():
                    # Gemma's embed_scale
                    setattr(plain, name, torch.tensor(packed.scale, device=packed.packed_device()))
            elif isinstance(packed, LowBitLinear):
                plain.weight, plain.bias = nn.Parameter(packed.weight(kind)), packed.bias
            else:
                call_as_before(model.get_submodule(path.rpartition(".")[0]))
                form = forms[path]
                for name, own in form.names.items():
                    setattr(plain, own, nn.Parameter(form.as_stored(name, packed.dense(name, kind))))
                    if form.biased:
                        setattr(plain, f"{own}_bias", getattr(packed, f"{own}_bias"))
            model.set_submodule(path, plain.train(model.training))
        remember_ties(model, twin)
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
        """True: all ops have fake implementations."""
        return True


# in the places of what gemq.transformers_hook put there
AUTO_QUANTIZATION_CONFIG_MAPPING["gemq"] = GemqConfig
AUTO_QUANTIZER_MAPPING["gemq"] = GemqQuantizer


def attach(model: Any, packed: PackedConfig) -> None:
    """Prepare a model that was packed in memory so that it saves like one that was loaded."""
    config = GemqConfig.of(packed)
    model.config.quantization_config = config
    model.hf_quantizer = GemqQuantizer(config)


def _refuse_tensor_parallelism(distributed: Any) -> None:
    """Refuse tensor parallelism: rows of packed weights are not split, but transformers' plans would treat each part as
    if they were."""
    if distributed is not None and (getattr(distributed, "tp_size", None) not in (None, 1) or distributed.tp_plan):
        raise CheckpointError("gemq checkpoints are not split by tensor parallelism; use device_map, or one device")


def _check_layers(config: Any) -> None:
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int) or layers <= _MANY_LAYERS or not Path(config.name_or_path).is_dir():
        return
    tensors = sum(len(read_header(file)) for file in weight_files(config.name_or_path))
    check_layers(config, tensors, config.name_or_path)


def check_files(model: nn.Module, files: list[Path]) -> None:
    """Compare the checkpoint's headers with the packed model (on the meta device) before anything is loaded.

    Raises :class:`CheckpointError` that lists every tensor that is missing, unknown, or of another shape or dtype.
    """
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    state = {k: v.to("meta") for k, v in model.state_dict().items() if k not in tied}
    expected = revert_weight_conversion(model, state)
    found: dict[str, TensorEntry] = {}
    for file in files:
        for name, entry in read_header(file).items():
            if name in found:
                raise CheckpointError(f"the tensor {name} is in more than one file")
            # one size's layer ahead is among another's own
            if name in expected or not is_ahead(model, name):
                found[name] = entry
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(found))]
    problems += [f"{name} is not part of the model" for name in sorted(set(found) - set(expected) - tied)]
    for name in sorted(set(expected) & set(found)):
        problems += _misfit(name, expected[name], found[name])
    problems += _mixed_halves({k: v for k, v in found.items() if not k.endswith(("_codes", "_meta"))})
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"the checkpoint does not fit its config: {shown}")


def _mixed_halves(unquantized: dict[str, TensorEntry]) -> list[str]:
    """List the tensors of the rarer 16-bit dtype, if both occur. Both dtypes take the same bytes, so a wrong one would
    be read as other numbers."""
    kinds = [[name for name in sorted(unquantized) if unquantized[name].dtype == dtype] for dtype in ("F16", "BF16")]
    few, most = sorted(kinds, key=len)
    return [f"{name} is {unquantized[name].dtype} among tensors in {unquantized[most[0]].dtype}" for name in few]


def _misfit(name: str, expected: torch.Tensor, found: TensorEntry) -> list[str]:
    if found.shape != list(expected.shape):
        return [f"{name} has shape {found.shape}, expected {list(expected.shape)}"]
    exact = {"_codes": ("U8",), "_meta": ("F16",)}
    plain = _FLOATS if expected.is_floating_point() else tuple(k for k, v in DTYPES.items() if v == expected.dtype)
    allowed = next((v for k, v in exact.items() if name.endswith(k)), plain)
    return [] if found.dtype in allowed else [f"{name} is {found.dtype}, expected {' or '.join(allowed)}"]


def _check_metadata(model: nn.Module) -> None:
    """Check scales and offsets in the canonical layout, where they alternate. Raises :class:`CheckpointError`."""
    for path, module in packed_modules(model):
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype != torch.float16:
                continue
            if not bool(torch.isfinite(buffer).all()):
                raise CheckpointError(f"{path}.{name} holds NaN or infinity: the checkpoint is corrupt")
            # the quantizer's smallest scale is float16's smallest number above zero
            if not bool((buffer[::2] > 0).all()):
                raise CheckpointError(f"{path}.{name} holds a scale that is not above zero: the checkpoint is corrupt")
