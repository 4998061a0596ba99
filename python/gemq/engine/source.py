"""A full-precision model on disk: a skeleton without weights, into which one decoder layer at a time is read.

Names in the checkpoint (per-expert matrices of hub checkpoints, older prefixes) become the model's own through
transformers' conversion mapping, one parameter at a time, so a layer never exists twice.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers import logging as transformers_logging
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from gemq.checkpoint import kept_in_float32
from gemq.engine.experts import Stack, StoredStack, run_experts
from gemq.engine.fingerprint import SourceWatch
from gemq.engine.reading import places, read_into, stacked
from gemq.errors import CheckpointError
from gemq.folders import local_folder
from gemq.integrity import TensorEntry, read_header, weight_files
from gemq.models import MoeModel, describe
from gemq.nn.experts import PROJECTIONS
from gemq.tensor_files import DTYPES

# all that is not in a decoder layer: embeddings, the last norm, the head
OUTSIDE = -1


@dataclass
class _Unit:
    """The tensors of one decoder layer, or of the rest: parameter name to the checkpoint names it is made of."""

    parameters: dict[str, list[str]] = field(default_factory=dict)


def return_memory() -> None:
    """Give what was freed back to the system: glibc keeps blocks of up to 32 MiB, as large as experts are."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        # another C library
        return


class Source:
    """A model whose decoder layers are read on demand.

    ``moe`` describes the skeleton; its parameters are on the meta device until :meth:`load`. ``dtype`` is that of
    computing ("auto": the model's own), but parameters that the family keeps in float32 stay so, and experts as they
    are stored, where that is smaller: ``experts`` gives both projections of a loaded layer. Raises
    :class:`CheckpointError` for files that are missing, malformed, or lack weights of the model.
    """

    def __init__(
        self, path: str, config, dtype: torch.dtype | str, device: torch.device, trust_remote_code: bool = False,
        watch: SourceWatch | None = None,
    ):
        self.folder, self.device = local_folder(path), device
        self.files = weight_files(self.folder)
        # as the files are before anything of them is read
        self.watch = watch or SourceWatch([self.folder / "config.json", *self.files])
        self._headers = {file: read_header(file) for file in self.files}
        # what a config leaves open, the weights say
        self.declared: torch.dtype = getattr(config, "dtype", None) or self._first_float()
        self.dtype = self.declared if dtype == "auto" else dtype
        dtype = self.dtype
        self._made_of = (str(self.folder), config, dtype, device, trust_remote_code)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=trust_remote_code, dtype=dtype
            )
        self.model.eval().requires_grad_(False)
        if (self.folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(self.folder)
        self.moe: MoeModel = describe(self.model)
        self._float32 = kept_in_float32(self.model)
        self._tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        self._mapping = get_model_conversion_mapping(self.model)
        self._where: dict[str, Path] = {}
        self._stored: dict[str, torch.dtype] = {}
        # the conversion's pattern that a tensor of the checkpoint fits, None for one that is stored as it is
        self._pattern: dict[str, str | None] = {}
        self._units: dict[int, _Unit] = {index: _Unit() for index in range(OUTSIDE, len(self.moe.layers))}
        self._index_files()
        self._fill_computed_buffers()
        self.experts: dict[int, tuple[Stack, Stack]] = {}
        self._stacks: dict[str, int] = {}
        self._held: set[str] = set()
        for layer in self.moe.moe:
            self._stacks |= {f"{layer.path}.experts.{name}": layer.index for name in PROJECTIONS}
            layer.experts.forward = partial(self._run_experts, layer.index, layer.experts.act_fn)

    def again(self) -> Source:
        """A second skeleton of the same model."""
        return Source(*self._made_of, watch=self.watch)

    def _run_experts(self, index: int, act: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return run_experts(self.experts[index], act, *args, **kwargs)

    def _first_float(self) -> torch.dtype:
        entries = (entry for header in self._headers.values() for entry in header.values())
        return next(DTYPES[e.dtype] for e in entries if DTYPES[e.dtype].is_floating_point)

    def unit_of(self, name: str) -> int:
        """The decoder layer of a parameter, or :data:`OUTSIDE`."""
        prefix = f"{self.moe.decoder_path}.layers."
        return int(name[len(prefix) :].partition(".")[0]) if name.startswith(prefix) else OUTSIDE

    def _index_files(self) -> None:
        """Which checkpoint tensors make which parameter, by the headers alone; all must be there."""
        state = self.model.state_dict()
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = self._converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        for file, header in self._headers.items():
            for original, entry in header.items():
                target, converted = rename_source_key(
                    original, renamings, converters, self.model.base_model_prefix, state
                )
                if target not in state and original in state:
                    target = original
                if target in state:
                    self._where[original], self._pattern[original] = file, converted
                    self._units[self.unit_of(target)].parameters.setdefault(target, []).append(original)
                    self._as_stored(target, DTYPES[entry.dtype])
        found = {name for unit in self._units.values() for name in unit.parameters}
        missing = sorted(set(state) - found - self._tied)
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise CheckpointError(f"{self.folder} lacks weights of the model: {', '.join(missing[:5])}{more}")

    def _as_stored(self, target: str, dtype: torch.dtype) -> None:
        """Conversion then runs on what is stored, which is often half as large as what is computed with."""
        parameter = self.model.get_parameter_or_buffer(target)
        if dtype.is_floating_point and parameter.is_floating_point():
            self._stored[target] = dtype
            self.put(target, torch.empty_like(parameter, dtype=dtype))

    def put(self, name: str, value: Tensor) -> None:
        """Give the skeleton a parameter or buffer."""
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        is_buffer = leaf in module._buffers
        setattr(module, leaf, value if is_buffer else nn.Parameter(value, requires_grad=False))

    def _fill_computed_buffers(self) -> None:
        """Buffers that no checkpoint holds (rotary frequencies) from the family's own initialisation."""
        for module in self.model.modules():
            names = [n for n in module._non_persistent_buffers_set if getattr(module, n) is not None]
            for name in names:
                setattr(module, name, torch.empty_like(getattr(module, name), device=self.device))
            if names:
                self.model._init_weights(module)

    def load(self, unit: int, without: Collection[str] = ()) -> None:
        """Read a decoder layer (or :data:`OUTSIDE`) onto the device, in the dtype of computing, experts as stored.

        ``without`` are paths of modules whose weights are not wanted. Raises :class:`CheckpointError` for tensors that
        are truncated or misshapen.
        """
        parameters = self._units[unit].parameters
        names = [name for name in parameters if name not in self._held and not self._unwanted(name, without)]
        # one stack of experts at a time, the small rest together
        stacks = [name for name in names if len(parameters[name]) > 1 or ".experts." in name]
        rest = [name for name in names if name not in stacks]
        for group in [[name] for name in stacks] + ([rest] if rest else []):
            self._read(group, parameters)
        for layer in self.moe.moe:
            if layer.index == unit and f"{layer.path}.experts" not in without:
                self.experts[unit] = tuple(StoredStack(getattr(layer.experts, n), self.dtype) for n in PROJECTIONS)
        if unit == OUTSIDE:
            self.model.tie_weights()
            self.model.requires_grad_(False)

    @staticmethod
    def _unwanted(name: str, without: Collection[str]) -> bool:
        owner, _, leaf = name.rpartition(".")
        return owner in without and leaf != "bias"

    def hold(self, names: list[str]) -> None:
        """Read these parameters for good: no :meth:`load` reads them again, no :meth:`drop` forgets them."""
        for name in names:
            self._read([name], self._units[self.unit_of(name)].parameters)
        self._held |= set(names)

    def _read(self, names: list[str], parameters: dict[str, list[str]]) -> None:
        others = [name for name in names if not self._fill(name, parameters[name])]
        if others:
            self._convert(others, parameters)
        for name in names:
            value = self.model.get_parameter_or_buffer(name)
            if value.is_meta:
                raise CheckpointError(f"{self.folder}: {name} could not be made of {parameters[name][:3]}")
            dtype = value.dtype
            if value.is_floating_point():
                dtype = torch.float32 if name in self._float32 else self.dtype
            if name in self._stacks and value.dtype.itemsize <= dtype.itemsize:
                dtype = value.dtype
            self.put(name, value.detach().to(self.device, dtype))

    def _fill(self, name: str, originals: list[str]) -> bool:
        """Read a parameter that is one tensor of the checkpoint, or a stack of them; False if it is made otherwise."""
        kinds = self._kinds(originals)
        parameter = self.model.get_parameter_or_buffer(name)
        dtypes = {DTYPES[self._entry(original).dtype] for original in originals}
        if kinds is None or dtypes != {parameter.dtype}:
            return False
        whole, stack = parameter.shape, self._pattern[originals[0]] is not None
        rows = whole[1] // len(kinds) if stack else 0
        wanted = [rows, *whole[2:]] if stack else list(whole)
        full = not stack or {len(names) for names in kinds} == {whole[0]}
        if not full or any(self._entry(original).shape != wanted for original in originals):
            self._refuse([name])
        value = torch.empty(whole, dtype=parameter.dtype)
        for kind, names in enumerate(kinds):
            for expert, original in enumerate(names):
                out = value[expert, kind * rows : (kind + 1) * rows] if stack else value
                read_into(self._where[original], self._entry(original), out)
        self.put(name, value)
        return True

    def _entry(self, original: str) -> TensorEntry:
        return self._headers[self._where[original]][original]

    def _kinds(self, originals: list[str]) -> list[list[str]] | None:
        """How a parameter is put together: its tensors by kind and expert; None if by something else."""
        pattern = self._pattern[originals[0]]
        if pattern is None:
            return [originals] if len(originals) == 1 else None
        converter = next(c for c in self._converters if pattern in c.source_patterns)
        if not stacked(converter):
            return None
        return places(converter, {original: self._pattern[original] for original in originals})

    def _refuse(self, wrong: list[str]) -> None:
        if wrong:
            raise CheckpointError(f"{self.folder} does not fit its config: {', '.join(wrong[:5])}")

    def _convert(self, names: list[str], parameters: dict[str, list[str]]) -> None:
        originals = [original for name in names for original in parameters[name]]
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            with ExitStack() as stack:
                handles = {
                    file: stack.enter_context(safe_open(file, framework="pt"))
                    for file in sorted({self._where[o] for o in originals})
                }
                slices = {o: handles[self._where[o]].get_slice(o) for o in originals}
                # the mapping collects tensors, so each conversion has its own
                found, _ = convert_and_load_state_dict_in_model(
                    self.model, slices,
                    LoadStateDictConfig(weight_mapping=copy.deepcopy(self._mapping), device_map={"": "cpu"}), None,
                )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder} could not be read: {error}") from error
        finally:
            if shown:
                transformers_logging.enable_progress_bar()
            # noted for saving, which is a twin's affair
            self.model._weight_conversions = None
        self._refuse(sorted(name for name, *_ in found.mismatched_keys) + sorted(found.conversion_errors))

    def drop(self, unit: int) -> None:
        """Forget the weights of a unit."""
        self.experts.pop(unit, None)
        for name in [*self._units[unit].parameters, *(self._tied if unit == OUTSIDE else ())]:
            if name in self._held:
                continue
            value = self.model.get_parameter_or_buffer(name)
            self.put(name, torch.empty_like(value, device="meta", dtype=self._stored.get(name, value.dtype)))
        return_memory()

    def layer_bytes(self, size: int = 2) -> int:
        """Bytes of the largest decoder layer at ``size`` bytes a weight."""
        return max(sum(p.numel() for p in layer.parameters()) * size for layer in self.moe.layers)
