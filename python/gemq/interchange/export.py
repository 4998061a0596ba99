"""Write a packed checkpoint as a plain 16-bit one, which transformers and others load without gemq."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from gemq.checkpoint import check_output, load_packed_config
from gemq.errors import CheckpointError
from gemq.folders import checkpoint_folder
from gemq.format import expert_layout
from gemq.hf import check_files
from gemq.integrity import weight_files
from gemq.interchange.reading import TensorReader, copy_companions, disk_name, meta_model
from gemq.models import Packed, describe, replace_with_packed
from gemq.nn import LowBitExperts
from gemq.ops import backends
from gemq.packed_model import kept_in_float32, packed_skeleton
from gemq.shards import ShardWriter
from gemq.staging import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Exported:
    """Result of :func:`export`: the folder, the number of tensors and their bytes, and the dtype. ``left_out`` are
    files of the source that were not copied: code, links, names that are not known."""

    path: Path
    tensors: int
    bytes: int
    dtype: torch.dtype
    left_out: list[str] = field(default_factory=list)


def export(
    source: str | os.PathLike, target: str | os.PathLike, *, dtype: torch.dtype | str = "auto",
    shard_bytes: int = 5 * 10**9, progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Write the packed checkpoint ``source``, a folder or hub name, with dequantized weights to ``target``.

    Every weight is ``q * s + m`` in float32 rounded once to ``dtype`` ("auto": the checkpoint's, float16 or bfloat16).
    Names are those of the family's own checkpoints. The packed tensors are read and written one by one: the memory
    taken is that of one projection of one layer's experts and of a shard. ``progress(done, total)`` counts tensors.

    Raises :class:`CheckpointError` for a source that is not a sound gemq checkpoint, a target that is not empty, and
    weights beyond float16's range.
    """
    source = checkpoint_folder(source)
    packed = load_packed_config(source)
    out = check_output(target, source)
    files = weight_files(source)
    model, config = meta_model(source)
    modules = packed_skeleton(describe(model), packed.widths, packed.group_size, "meta")
    replace_with_packed(model, modules)
    check_files(model, files)
    chosen = _dtype(dtype, config)
    with new_folder(out) as folder, ExitStack() as stack:
        reader = TensorReader(files, stack)
        writer = ShardWriter(folder, shard_bytes)
        count, steps = 0, sum(not name.endswith("_meta") for name in reader.handles)
        for done, (name, tensor) in enumerate(_tensors(model, modules, reader, chosen)):
            for stored, part in revert_weight_conversion(model, {name: tensor}).items():
                writer.add(stored, part)
                count += 1
            if progress:
                progress(done + 1, steps)
        writer.finish()
        left_out = copy_companions(source, folder)
        config.dtype = chosen
        (folder / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    return Exported(out, count, writer.total, chosen, left_out)


def _dtype(dtype: torch.dtype | str, config: PreTrainedConfig) -> torch.dtype:
    if dtype == "auto":
        return config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be auto, float16 or bfloat16, got {str(dtype).removeprefix('torch.')}")
    return dtype


def _tensors(
    model: nn.Module, modules: dict[str, Packed], reader: TensorReader, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the plain model under its module path, packed ones dequantized."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    kept = kept_in_float32(model)
    for name in model.state_dict():
        path, _, leaf = name.rpartition(".")
        if path in modules and leaf.endswith("_codes"):
            plain = leaf.removesuffix("_codes")
            # experts' buffers are named gate_up_codes and down_codes
            target = f"{plain}_proj" if isinstance(modules[path], LowBitExperts) else plain
            meta = disk_name(model, f"{path}.{plain}_meta")
            weight = _dense(modules[path], target, reader.take(disk_name(model, name)), reader.take(meta), dtype)
            if not bool(torch.isfinite(weight).all()):
                raise CheckpointError(
                    f"{path}.{target} has weights that are not finite in {str(dtype).removeprefix('torch.')}"
                )
            yield f"{path}.{target}", weight
        elif name not in tied and not (path in modules and leaf.endswith("_meta")):
            stored = reader.take(disk_name(model, name))
            yield name, stored.to(dtype) if stored.is_floating_point() and name not in kept else stored


def _dense(module: Packed, name: str, codes: Tensor, meta: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(module, LowBitExperts):
        return backends.dense_weight(codes, meta, *module.matrix, "canonical", dtype)
    (n, k), size = module.shape(name), module.group_sizes[name]
    plan = expert_layout(module.bits[name], n, k, size, "canonical")
    out = torch.zeros(module.num_experts, n, k, dtype=dtype)
    for e, (width, at, meta_at) in enumerate(zip(plan.bits, plan.code_offsets, plan.meta_offsets, strict=True)):
        if width:
            out[e] = backends.dense_weight(codes[at:], meta[meta_at:], width, n, k, size, "canonical", dtype)
    return out
