"""Predict the files of a packed checkpoint, to the byte, before anything is quantized.

Codes of a matrix are as many bits as its width, so the sum of widths that the budget sets gives their bytes whatever
the allocation; scales take 32 bits a row and group at every width above 0; everything else stays in 16 bits. The
headers of the files are written out with the names and shapes that they will have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gemq.format import codes_bytes, meta_elements
from gemq.models import MoeModel, packed_modules, replace_with_packed
from gemq.nn import LowBitEmbedding, LowBitExperts, TiedHead
from gemq.nn.experts import PROJECTIONS
from gemq.packed_config import PackedConfig
from gemq.packed_model import packed_skeleton, stored_state
from gemq.tensor_files import file_head

_SHARD = 5 * 10**9


@dataclass(frozen=True)
class OutputSize:
    """Bytes of a checkpoint: its ``tensors``, and its ``files`` of weights (with headers, and the index of shards).
    ``ahead`` are those of the tensors that belong to layers of multi-token prediction."""

    tensors: int
    files: int
    count: int
    ahead: int = 0


def output_size(
    moe: MoeModel, config: PackedConfig, dtype: torch.dtype, shard: int = _SHARD,
    ahead: Mapping[str, torch.Tensor] | None = None,
) -> OutputSize:
    """The size of the checkpoint of a model without storage (of :func:`gemq.planning.model_parts.located`) with these
    widths; unquantized tensors are stored in ``dtype``, a file holds about ``shard`` bytes. ``ahead``, of
    :func:`gemq.planning.ahead.ahead_tensors`, are in it as they are. The model is packed by this."""
    ahead = ahead or {}
    replace_with_packed(moe.model, packed_skeleton(moe, config.widths, config.group_size, "meta"))
    state = stored_state(moe.model, dtype) | dict(ahead)
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if size + tensor.nbytes > shard and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    tensors = sum(t.nbytes for t in state.values())
    files = tensors + sum(len(file_head(shard)[0]) for shard in shards)
    if len(shards) > 1:
        files += sum(len(name) + 45 for name in state)
    return OutputSize(tensors, files, len(shards), sum(t.nbytes for t in ahead.values()))


def resident_bytes(model: nn.Module, layout: str, dtype: torch.dtype) -> int:
    """Bytes of a packed model without storage once it is ready to run: codes and scales in ``layout``, the rest in
    ``dtype``."""
    total = sum(p.numel() * dtype.itemsize for p in model.parameters()) + experts_bytes(model, layout)
    for _, module in packed_modules(model):
        if not isinstance(module, LowBitExperts | TiedHead):
            bits, n, k, group = module.matrix
            own = "canonical" if isinstance(module, LowBitEmbedding) and not module.tied else layout
            total += matrix_bytes(n, k, bits, group, own)
    return total


def experts_bytes(model: nn.Module, layout: str) -> int:
    """Bytes of all routed experts of a packed model without storage, in ``layout``."""
    total = 0
    for _, module in packed_modules(model):
        if not isinstance(module, LowBitExperts):
            continue
        for name in PROJECTIONS:
            n, k = module.shape(name)
            group = module.group_sizes[name]
            total += sum(matrix_bytes(n, k, bits, group, layout) for bits in module.bits[name])
    return total


def matrix_bytes(n: int, k: int, bits: int, group_size: int, layout: str) -> int:
    """Bytes of one packed matrix, codes and metadata, in ``layout``."""
    return codes_bytes(n, k, bits, layout) + 2 * meta_elements(n, k, bits, group_size, layout)
