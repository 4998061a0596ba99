"""Compute the bytes that a cache takes, the bytes that are free, and the sizes that would fit."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gemq.config_fields import field
from gemq.errors import OutOfMemoryError
from gemq.models.ends import embedding_dtype
from gemq.models.forward import decoder_of
from gemq.transformers_versions import INDEXED, cached_width

GIB = 2**30
_LINEAR = ("linear_attention", "conv")


def cache_bytes_per_token(model: Any) -> int:
    """Bytes of keys and values that one token of one row takes in the cache of a supported family."""
    config, size = model.config.get_text_config(), embedding_dtype(model).itemsize
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    layers = [layer for layer, kind in zip(decoder_of(model).layers, kinds, strict=False) if kind not in _LINEAR]
    indexer = getattr(config, "index_head_dim", None) or getattr(config, "indexer_head_dim", None) or 0
    indexed = sum(kind in INDEXED for kind in kinds)
    return (sum(_kept_width(layer, config) for layer in layers) + indexed * indexer) * size


def _kept_width(layer: Any, config: Any) -> int:
    """Numbers that a layer's attention keeps of a token."""
    mixer: Any = getattr(layer, "mixer", None)
    if mixer is not None and not hasattr(mixer, "k_proj"):
        return 0  # a MoE block or Mamba in a layer that is one thing
    attention: Any = getattr(layer, "self_attn", mixer)
    config = getattr(attention, "config", config)  # of the layer, where layers differ

    def own(name: str) -> Any:
        found = getattr(attention, name, None)
        return field(config, name) if found is None else found

    if own("kv_lora_rank") is not None:
        latent = own("kv_lora_rank") + own("qk_rope_head_dim")
        return cached_width(latent, own("num_attention_heads"), config)
    if getattr(attention, "v_proj", attention) is None:
        return 2 * attention.k_proj.out_features
    if all(hasattr(getattr(attention, name, None), "out_features") for name in ("k_proj", "v_proj")):
        return attention.k_proj.out_features + attention.v_proj.out_features
    head = own("head_dim") or config.hidden_size // own("num_attention_heads")
    return 2 * own("num_key_value_heads") * head


def state_bytes_per_row(model: Any) -> int:
    """Bytes that one row takes regardless of its length: the states of linear attention, Mamba and short convolutions;
    0 without them.

    The convolution's last inputs are in the model's dtype, the recurrent state in float32.
    """
    config, size = model.config.get_text_config(), embedding_dtype(model).itemsize
    layers = _linear_layers(config)
    if not layers:
        return 0
    convolved, recurrent = _states(config)
    return layers * (convolved * size + recurrent * 4)


def _states(config: Any) -> tuple[int, int]:
    """Numbers that the convolution, and the recurrent state, of one layer keep for a row."""
    if hasattr(config, "linear_num_key_heads"):  # gated delta net
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = config.linear_num_value_heads * config.linear_value_head_dim
        return (2 * keys + values) * config.linear_conv_kernel_dim, values * config.linear_key_head_dim
    if hasattr(config, "linear_num_heads"):  # Kimi's delta attention
        width = config.linear_num_heads * config.linear_head_dim
        return 3 * width * config.linear_conv_kernel_dim, width * config.linear_head_dim
    if hasattr(config, "mamba_num_heads"):  # Mamba 2 of Nemotron-H
        width = config.mamba_num_heads * config.mamba_head_dim
        inputs = width + 2 * config.n_groups * config.ssm_state_size
        return inputs * config.conv_kernel, width * config.ssm_state_size
    if hasattr(config, "mamba_n_heads"):  # Mamba 2
        width = config.mamba_n_heads * config.mamba_d_head
        inputs = width + 2 * config.mamba_n_groups * config.mamba_d_state
        return inputs * config.mamba_d_conv, width * config.mamba_d_state
    if hasattr(config, "mamba_d_state"):  # Mamba
        width = config.mamba_expand * config.hidden_size
        return width * config.mamba_d_conv, width * config.mamba_d_state
    return config.hidden_size * config.conv_L_cache, 0


def _linear_layers(config: Any) -> int:
    return sum(kind in _LINEAR for kind in getattr(config, "layer_types", None) or ())


def free_bytes(device: torch.device) -> int | None:
    """Bytes of memory that are still available on a device; None if unknown."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # memory that torch has reserved but does not use
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    meminfo = Path("/proc/meminfo")
    if device.type != "cpu" or not meminfo.is_file():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def peak_resident_bytes() -> int | None:
    """Peak resident memory of this process in bytes; None if the unit is unknown."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"linux": peak * 1024, "darwin": peak}.get(sys.platform)


def peak_bytes() -> dict[str, int | None]:
    """The most ``ram`` this process has held, and the most ``vram`` torch has reserved (None without a GPU)."""
    vram = torch.cuda.max_memory_reserved() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return {"ram": peak_resident_bytes(), "vram": vram}


def check_cache_fits(model: nn.Module, batch: int, length: int, device: torch.device) -> None:
    """Raise :class:`OutOfMemoryError` if a cache of ``batch`` x ``length`` tokens takes more than is free."""
    free = free_bytes(device)
    if free is not None and batch * (length * cache_bytes_per_token(model) + state_bytes_per_row(model)) > free:
        raise cache_error(model, batch, length, free)


def cache_error(model: nn.Module, batch: int, length: int, free: int | None) -> OutOfMemoryError:
    """Error for a generation that does not fit: the bytes it takes, the bytes that are free, and a size that would fit.
    """
    token = cache_bytes_per_token(model)
    needed = f"a cache of {batch} x {length} tokens takes {batch * length * token / GIB:.2f} GiB"
    if free is None:
        return OutOfMemoryError(f"out of memory: {needed}; try fewer or shorter prompts")
    tokens, rows = free // (batch * token), free // (length * token)
    fits = f"{tokens} tokens a row (prompt and new ones) would fit" if tokens else "no token would fit"
    fewer = f", or {rows} rows of {length}" if 0 < rows < batch else ""
    return OutOfMemoryError(f"out of memory: {needed}, {free / GIB:.2f} GiB are free; at most {fits}{fewer}")
