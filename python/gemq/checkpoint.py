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

import torch
from huggingface_hub import save_torch_state_dict
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from gemq import durable
from gemq.algorithms.sequential import QuantizedWeights
from gemq.errors import CheckpointError, GemqError
from gemq.folders import HUB_OPTIONS, checkpoint_folder
from gemq.format import UNQUANTIZED
from gemq.integrity import read_json, weight_files, write_manifest
from gemq.integrity import verify as verify_files
from gemq.model_config import generation_config, model_config
from gemq.models import MoeModel, describe, packed_modules, replace_with_packed
from gemq.nn import LowBitExperts, LowBitLinear
from gemq.output_folder import check_output
from gemq.packed_config import PackedConfig
from gemq.staging import staged
from gemq.tensor_files import check_finite

MAX_SHARD = "5GB"


def packed_skeleton(
    model: nn.Module, config: PackedConfig, device: str | None = None, under: str = ""
) -> dict[str, nn.Module]:
    """Empty packed modules for an unquantized model, by module path; ``under`` is a path prefix to keep to.

    Raises :class:`CheckpointError` on a misfit.
    """
    moe = describe(model)
    modules: dict[str, nn.Module] = {}
    if set(config.expert_bits) != {layer.index for layer in moe.moe}:
        raise CheckpointError(
            f"quantization_config.expert_bits names layers {sorted(config.expert_bits)}, but the model's MoE layers "
            f"are {[layer.index for layer in moe.moe]}"
        )
    for layer in moe.moe:
        bits, down = config.widths(layer.index)
        if len(bits) != moe.num_experts:
            raise CheckpointError(
                f"quantization_config.expert_bits[{layer.index}] has {len(bits)} widths for {moe.num_experts} experts"
            )
        if f"{layer.path}.experts".startswith(under):
            modules[f"{layer.path}.experts"] = LowBitExperts(
                moe.hidden, moe.intermediate, bits, config.group_size, device, down
            )
    for path, (linear, width) in _linear_widths(moe, config).items():
        if path.startswith(under):
            modules[path] = LowBitLinear(
                linear.in_features, linear.out_features, width, config.group_size, linear.bias is not None,
                linear.weight.dtype, device,
            )
    return modules


def _linear_widths(moe: MoeModel, config: PackedConfig) -> dict[str, tuple[nn.Linear, int]]:
    found = {path: (module, config.attention_bits) for path, module in moe.attention.items()}
    found |= {path: (module, config.dense_bits) for path, module in moe.dense.items()}
    for layer in moe.moe:
        if layer.shared is None:
            continue
        width = config.shared_bits.get(layer.index)
        if width is None:
            raise CheckpointError(f"quantization_config.shared_bits has no layer {layer.index}")
        for name in ("gate_proj", "up_proj", "down_proj"):
            found[f"{layer.shared_path}.{name}"] = (getattr(layer.shared, name), width)
    unknown = sorted(set(config.linear_bits) - set(found))
    if unknown:
        raise CheckpointError(f"quantization_config.linear_bits names {unknown[0]!r}, which the model does not have")
    found = {path: (module, config.linear_bits.get(path, width)) for path, (module, width) in found.items()}
    return {path: item for path, item in found.items() if item[1] != UNQUANTIZED}


def pack_model(moe: MoeModel, weights: QuantizedWeights, *, budget: float | None = None, method: str | None = None):
    """Replace the quantized parts of the model by packed modules, in place, and return its :class:`PackedConfig`.

    The modules are left in the canonical layout; :func:`gemq.models.prepare` makes them ready to run.
    """
    replace_with_packed(moe.model, packed_parts(moe, weights))
    return PackedConfig.of_plan(weights.plan, weights.group_size, budget, method)


def packed_parts(moe: MoeModel, weights: QuantizedWeights) -> dict[str, LowBitExperts | LowBitLinear]:
    """Packed modules of all that ``weights`` holds, which may be a part of the model, by module path."""
    modules: dict[str, LowBitExperts | LowBitLinear] = {}
    for layer in moe.moe:
        if layer.index in weights.stacks:
            gate_up, down = weights.stacks[layer.index]
            modules[f"{layer.path}.experts"] = LowBitExperts.from_stacks(
                gate_up, down, moe.hidden, moe.intermediate, weights.group_size
            )
    for path, (codes, meta, width) in weights.linears.items():
        bias = moe.model.get_submodule(path).bias
        group = codes.shape[1] // meta.shape[1]
        modules[path] = LowBitLinear.from_codes(codes, meta, width, group, bias)
    return modules


def save_packed(
    model: nn.Module, config: PackedConfig, path: str | os.PathLike, *, tokenizer=None,
    dtype: torch.dtype | None = None, max_shard_size: str = MAX_SHARD,
    extra_files: dict[str, Callable[[Path], None]] | None = None, overwrite: bool = False,
    weights: Callable[[Path], None] | None = None,
) -> Path:
    """Write a packed model (of :func:`pack_model`) as a checkpoint folder, with a manifest for :func:`gemq.verify`.

    Everything is written to a folder of gemq's own beside it and renamed at the end; what was there before stays until
    then. ``dtype`` (float16 or bfloat16) is that of the tensors that stay unquantized. ``extra_files`` maps file
    names to functions that write them; ``weights`` writes the weight files of a model that is not in memory.
    """
    target = check_output(path, overwrite=overwrite)
    with staged(target, overwrite) as folder:
        _write(model, config, folder, tokenizer, dtype, max_shard_size, extra_files or {}, weights)
    return target


def _write(
    model, config: PackedConfig, folder: Path, tokenizer, dtype, max_shard_size: str, extra: dict,
    weights: Callable[[Path], None] | None,
) -> None:
    from gemq.hf import attach

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


def stored_state(model, dtype: torch.dtype | None) -> dict[str, torch.Tensor]:
    """The tensors of a packed model as a checkpoint holds them: as :func:`stored_tensors`, tied ones once."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return stored_tensors(model, {k: v for k, v in model.state_dict().items() if k not in tied}, dtype)


def stored_tensors(
    model, state: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Some or all of a packed model's tensors as a checkpoint has them: by the names of the family's own checkpoints,
    unquantized ones in ``dtype``."""
    packed = {f"{path}.{name}" for path, module in packed_modules(model) for name, _ in module.named_buffers()}
    if dtype is not None:
        as_is = packed | kept_in_float32(model)
        state = {k: v.to(dtype) if v.is_floating_point() and k not in as_is else v for k, v in state.items()}
    return {k: check_finite(k, v).contiguous() for k, v in revert_weight_conversion(model, state).items()}


def kept_in_float32(model) -> set[str]:
    """Tensors that the family keeps in float32 in a 16-bit model: correction biases of routers, which rank experts."""
    modules = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    return {name for name in model.state_dict() if modules & set(name.split("."))}


def _config_text(model, dtype: torch.dtype | None) -> str:
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
    **kwargs,
):
    """Load a packed checkpoint for inference: a transformers model whose experts run on gemq's kernels.

    Args:
        path: a folder written by gemq (or by ``save_pretrained`` of a loaded model), or its name on the hub.
        dtype: of activations and unquantized tensors; "auto" takes the checkpoint's.
        device: where to put the model, for instance "cuda"; None leaves it on the CPU.
        verify: first compare every file with the SHA-256 sums of the manifest, as :func:`gemq.verify` does.
        kwargs: passed on to ``AutoModelForCausalLM.from_pretrained``. No code of the checkpoint is run unless
            ``trust_remote_code=True`` is among them.

    Raises :class:`CheckpointError` for a checkpoint that is truncated, inconsistent, newer than this version or
    not gemq's; nothing is ever filled in with random weights.
    """
    import transformers

    import gemq.hf  # noqa: F401  (registers the quantizer)

    folder = checkpoint_folder(path, **{name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs})
    if verify:
        verify_files(folder)
    load_packed_config(folder)
    weight_files(folder)
    trusted = kwargs.pop("trust_remote_code", False)
    model_config(str(folder), trusted)
    generation_config(folder)
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=trusted, **kwargs
        )
    except (GemqError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # the fields of config.json reach code of transformers that checks few of them: it may fail with anything
        raise CheckpointError(f"{path} could not be loaded: {type(error).__name__}: {error}") from error
    model.eval()
    return model if device is None else model.to(device)
