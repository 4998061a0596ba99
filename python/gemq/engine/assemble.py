"""Write the weights of a packed checkpoint layer by layer, byte for byte as if the whole model were in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor, nn

from gemq import durable
from gemq.checkpoint import MAX_SHARD
from gemq.engine.layers import put_routers
from gemq.engine.quantize import Quantized
from gemq.engine.source import OUTSIDE, Source, put
from gemq.integrity import INDEX_FILE
from gemq.models import describe, empty_twin, replace_with_packed
from gemq.nn import LowBitEmbedding
from gemq.nn.base import PackedModule
from gemq.packed_config import PackedConfig
from gemq.packed_model import packed_skeleton, stored_tensors
from gemq.tensor_files import file_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Assembly:
    """Writer of a packed checkpoint of ``source``, from a skeleton without weights that it fills layer by layer."""

    def __init__(
        self, source: Source, quantized: Quantized, routers: dict[int, Tensor], config: PackedConfig,
        dtype: torch.dtype, progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.source, self.quantized, self.routers, self.config, self.dtype = source, quantized, routers, config, dtype
        self._progress = progress
        self.model: PreTrainedModel = empty_twin(source.model)
        moe = describe(self.model)
        replace_with_packed(self.model, packed_skeleton(moe, config.widths, config.group_size, "meta"))
        self.model.generation_config = source.model.generation_config
        self.model.eval()

    def write(self, folder: Path) -> None:
        """Write the shards, and their index if there are several."""
        kept = self.source.kept()
        sizes = stored_tensors(self.model, self._state(), self.dtype) | self.source.kept_sizes()
        split = split_torch_state_dict_into_shards(sizes, max_shard_size=MAX_SHARD)
        with durable.explained(folder), ExitStack() as stack:
            shards = {
                name: stack.enter_context(closing(_Shard(folder / name, {t: sizes[t] for t in names})))
                for name, names in split.filename_to_tensors.items()
            }
            layers = len(self.source.moe.layers)
            for unit in range(OUTSIDE, layers):
                for name, value in stored_tensors(self.model, self._unit(unit), self.dtype).items():
                    shards[split.tensor_to_filename[name]].put(name, value)
                self._progress(unit + 1, layers)
            for name, read in kept.items():
                shards[split.tensor_to_filename[name]].put(name, read())
            left = [name for shard in shards.values() for name in shard.left]
            if left:
                raise AssertionError(f"tensors that were not written: {left[:5]}")
            if split.is_sharded:
                index = {"metadata": {**split.metadata, "format": "pt"}, "weight_map": split.tensor_to_filename}
                (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")

    def tensor_bytes(self) -> int:
        """Bytes of the checkpoint's tensors."""
        return sum(tensor.nbytes for tensor in stored_tensors(self.model, self._state(), self.dtype).values())

    def _state(self) -> dict[str, Tensor]:
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        return {name: value for name, value in self.model.state_dict().items() if name not in tied}

    @torch.no_grad()
    def _unit(self, unit: int) -> dict[str, Tensor]:
        """The finished tensors of a decoder layer, or of the rest, by their names in the model, on the CPU."""
        modules: Mapping[str, nn.Module] = self.quantized.record(unit).modules
        buffers = {f"{p}.{leaf}": b for p, m in modules.items() for leaf, b in m.named_buffers()}
        self.source.load(unit, modules)
        put_routers(self.source, self.routers, unit)
        state = {}
        for name in self._state():
            if self.source.unit_of(name) == unit:
                value = buffers[name] if name in buffers else self.source.model.get_parameter_or_buffer(name)
                state[name] = value.detach().cpu()
        self.source.drop(unit)
        return state

    def in_memory(self) -> PreTrainedModel:
        """Fill the skeleton with all tensors, unquantized ones in the dtype of computing, and return it."""
        for unit in range(OUTSIDE, len(self.source.moe.layers)):
            for name, value in self._unit(unit).items():
                put(self.model, name, value.clone())
        for name, buffer in self.source.model.named_buffers():
            owner = self.model.get_submodule(name.rpartition(".")[0])
            # a packed embedding has its scale as a number
            if not isinstance(owner, PackedModule) and self.model.get_buffer(name).is_meta:
                put(self.model, name, buffer.clone())
        for module in self.model.modules():
            if isinstance(module, LowBitEmbedding):
                module.dtype = self.source.dtype
        self.model.tie_weights()
        return self.model.requires_grad_(False)


class _Shard:
    """One safetensors file whose tensors arrive in any order."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]):
        head, self._at = file_head(tensors)
        self.left = set(tensors)
        durable.passing(f"write {path.name}")
        # unbuffered: a failed write must not be tried again on closing
        self._handle: BinaryIO = path.open("wb", buffering=0)
        self._write(head)

    def put(self, name: str, value: Tensor) -> None:
        """Write one tensor where the header says."""
        durable.passing("write shard")
        self._handle.seek(self._at[name])
        self._write(value.contiguous().view(-1).view(torch.uint8).numpy().data)
        self.left.remove(name)

    def _write(self, data: bytes | memoryview) -> None:
        data = memoryview(data)
        while len(data):
            # one call writes 2 GiB at most
            data = data[self._handle.write(data) :]

    def close(self) -> None:
        """Close the file, even if it is incomplete."""
        self._handle.close()
