"""A full-precision model on disk: a skeleton without weights, into which one decoder layer at a time is read.

Names in the checkpoint (per-expert matrices of hub checkpoints, older prefixes) become the model's own through
transformers' conversion mapping, one parameter at a time, so a layer never exists twice.
"""

from __future__ import annotations

import copy
import ctypes
import logging
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import logging as transformers_logging
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from gemq.checkpoint import kept_in_float32
from gemq.engine.contents import contents, tell_unused
from gemq.engine.experts import Stack, StoredStack, run_experts
from gemq.engine.fingerprint import SourceWatch
from gemq.engine.numbers import Numbers
from gemq.engine.reading import read_into, same_tensor
from gemq.errors import CheckpointError
from gemq.folders import local_folder
from gemq.integrity import read_header, weight_files
from gemq.model_config import check_layers, check_sizes, generation_config, skeleton
from gemq.models import MoeModel, describe
from gemq.nn.experts import PROJECTIONS
from gemq.tensor_files import DTYPES, WEIGHTS

_log = logging.getLogger("gemq")
# unit of the parameters outside decoder layers: embeddings, the last norm, the head
OUTSIDE = -1
# tensors that stay unquantized are stored in 16 bits
_STORED = {torch.float64: torch.bfloat16, torch.float32: torch.bfloat16}


@dataclass
class _Unit:
    """The tensors of one decoder layer, or of the rest: parameter name to the checkpoint names it is made of."""

    parameters: dict[str, list[str]] = field(default_factory=dict)


def stored_dtype(declared: torch.dtype) -> torch.dtype:
    """The dtype of a checkpoint's unquantized tensors, given that of the full-precision model."""
    return _STORED.get(declared, declared)


def return_memory() -> None:
    """Return freed memory to the system: glibc keeps blocks of up to 32 MiB, as large as experts are."""
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
        self.files = weight_files(self.folder, getattr(config, "transformers_weights", None))
        # state of the files before any of them is read
        self.watch = watch or SourceWatch([self.folder / "config.json", *self.files])
        self._headers = {file: read_header(file) for file in self.files}
        check_sizes(config, self.folder)
        check_layers(config, sum(map(len, self._headers.values())), self.folder)
        # the weights decide a dtype that the config leaves open
        declared = getattr(config, "dtype", None)
        self.declared: torch.dtype = declared if isinstance(declared, torch.dtype) else self._first_float()
        self.dtype = self.declared if dtype == "auto" else dtype
        self._build(config, trust_remote_code, quiet=watch is not None)
        if self._untie(quiet=watch is not None):
            config = copy.deepcopy(config)
            config.tie_word_embeddings = False
            self._build(config, trust_remote_code, quiet=True)
        self._made_of = (str(self.folder), config, self.dtype, device, trust_remote_code)
        self._fill_computed_buffers()
        self.experts: dict[int, tuple[Stack, Stack]] = {}
        self._stacks: dict[str, int] = {}
        self._held: set[str] = set()
        for layer in self.moe.moe:
            self._stacks |= {f"{layer.path}.experts.{name}": layer.index for name in PROJECTIONS}
            layer.experts.forward = partial(self._run_experts, layer.index, layer.experts.act_fn)

    def _build(self, config, trust_remote_code: bool, quiet: bool) -> None:
        """The skeleton, and where its weights are."""
        self.model = skeleton(config, trust_remote_code, dtype=self.dtype)
        self.model.eval().requires_grad_(False)
        stored = generation_config(self.folder)
        if stored is not None:
            self.model.generation_config = stored
        self.moe: MoeModel = describe(self.model)
        self._float32 = kept_in_float32(self.model)
        self._tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        self._stored: dict[str, torch.dtype] = {}
        self._units: dict[int, _Unit] = {index: _Unit() for index in range(OUTSIDE, len(self.moe.layers))}
        self._index_files(quiet)

    @property
    def stored(self) -> torch.dtype:
        """The dtype of a checkpoint's unquantized tensors: 16 bits."""
        return stored_dtype(self.declared)

    def numbers(self) -> Numbers:
        """Return the checker that finds NaN, infinity and numbers out of range as the files are read."""
        owners = {original: target for target, names in self._contents.made_of.items() for original in names}
        packed = {f"{path}.weight" for path in (*self.moe.attention, *self.moe.dense)}
        packed |= {f"{layer.path}.experts.{name}" for layer in self.moe.moe for name in PROJECTIONS}

        def kind(original: str) -> torch.dtype | None:
            target = owners.get(original)
            if target is None:
                return None
            # scales and offsets are float16
            return torch.float16 if target in packed else torch.float32 if target in self._float32 else self.stored

        return Numbers(self._headers, kind)

    def again(self) -> Source:
        """A second skeleton of the same model."""
        return Source(*self._made_of, watch=self.watch)

    def _run_experts(self, index: int, act: nn.Module, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return run_experts(self.experts[index], act, *args, **kwargs)

    def _first_float(self) -> torch.dtype:
        entries = (entry for header in self._headers.values() for entry in header.values())
        found = next((DTYPES[e.dtype] for e in entries if e.dtype in WEIGHTS), None)
        if found is None:
            raise CheckpointError(f"{self.folder} holds no tensor in {', '.join(WEIGHTS)}")
        return found

    def unit_of(self, name: str) -> int:
        """The decoder layer of a parameter, or :data:`OUTSIDE`."""
        prefix = f"{self.moe.decoder_path}.layers."
        return int(name[len(prefix) :].partition(".")[0]) if name.startswith(prefix) else OUTSIDE

    def _index_files(self, quiet: bool) -> None:
        """Find the checkpoint tensors of every parameter, from the headers alone. All must be there."""
        self._contents = contents(self.folder, self._headers, self.model)
        if not quiet:
            tell_unused(self._contents, f"{self.moe.decoder_path}.layers", len(self.moe.layers))
        for target, originals in self._contents.made_of.items():
            self._units[self.unit_of(target)].parameters[target] = originals
            # conversion then runs on what is stored, which is often half as large as what is computed with
            dtype = DTYPES[self._contents.entry(originals[0]).dtype]
            parameter = self.model.get_parameter_or_buffer(target)
            if parameter.is_floating_point():
                self._stored[target] = dtype
                self.put(target, torch.empty_like(parameter, dtype=dtype))

    def _untie(self, quiet: bool) -> bool:
        """Return True, and warn, if the files hold different values for weights that the config ties: transformers does
        not tie them then."""
        found = self._contents
        for target, source in (getattr(self.model, "all_tied_weights_keys", None) or {}).items():
            both = [found.made_of.get(target), found.made_of.get(source)]
            if all(both) and not same_tensor(*((found.file[n], found.entry(n)) for (n,) in both)):
                if not quiet:
                    _log.warning("%s: %s and %s are tied by the config and differ in the files: they are not tied, as "
                                 "in transformers", self.folder, target, source)
                return True
        return False

    def put(self, name: str, value: Tensor) -> None:
        """Set a parameter or buffer of the skeleton."""
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        is_buffer = leaf in module._buffers
        setattr(module, leaf, value if is_buffer else nn.Parameter(value, requires_grad=False))

    def _fill_computed_buffers(self) -> None:
        """Fill the buffers that no checkpoint holds (rotary frequencies) by the family's own initialisation."""
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
        """Read these parameters and keep them: no :meth:`load` reads them again, and no :meth:`drop` frees them."""
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
        found = self._contents
        kinds = found.kinds(originals)
        parameter = self.model.get_parameter_or_buffer(name)
        dtypes = {DTYPES[found.entry(original).dtype] for original in originals}
        if kinds is None or dtypes != {parameter.dtype}:
            return False
        whole, stack = parameter.shape, found.pattern[originals[0]] is not None
        rows = whole[1] // len(kinds) if stack else 0
        value = torch.empty(whole, dtype=parameter.dtype)
        for kind, names in enumerate(kinds):
            for expert, original in enumerate(names):
                out = value[expert, kind * rows : (kind + 1) * rows] if stack else value
                read_into(found.file[original], found.entry(original), out)
        self.put(name, value)
        return True

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
                    for file in sorted({self._contents.file[o] for o in originals})
                }
                slices = {o: handles[self._contents.file[o]].get_slice(o) for o in originals}
                # the mapping collects tensors, so each conversion has its own
                mapping = copy.deepcopy(self._contents.mapping)
                found, _ = convert_and_load_state_dict_in_model(
                    self.model, slices, LoadStateDictConfig(weight_mapping=mapping, device_map={"": "cpu"}), None
                )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder} could not be read: {error}") from error
        finally:
            if shown:
                transformers_logging.enable_progress_bar()
            # transformers keeps this for save_pretrained; gemq saves from another skeleton, so clear it
            self.model._weight_conversions = None
        self._refuse(sorted(name for name, *_ in found.mismatched_keys) + sorted(found.conversion_errors))

    def drop(self, unit: int) -> None:
        """Free the weights of a unit."""
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
