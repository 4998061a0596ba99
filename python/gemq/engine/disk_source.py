"""A full-precision model in files, read one decoder layer at a time.

Names in the checkpoint (per-expert matrices of hub checkpoints, older prefixes) become the model's own through
transformers' conversion mapping, one parameter at a time, so a layer never exists twice.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import logging as transformers_logging
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from gemq.engine import mxfp4
from gemq.engine.contents import contents, tell_unused
from gemq.engine.fingerprint import SourceWatch
from gemq.engine.numbers import Numbers
from gemq.engine.read_tensor import read_into, same_tensor
from gemq.engine.source import Source
from gemq.errors import CheckpointError
from gemq.folders import local_folder
from gemq.integrity import read_header, weight_files
from gemq.model_config import check_layers, check_sizes, generation_config, skeleton
from gemq.models.packed import fill_computed_buffers
from gemq.packed_model import tower_prefixes
from gemq.tensor_files import DTYPES, WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_log = logging.getLogger("gemq")


class DiskSource(Source):
    """The model of a folder or hub name. ``dtype`` is that of computing ("auto": the model's own).

    ``resident`` keeps what was read in memory, and reads no tensor twice. Raises :class:`CheckpointError` for files
    that are missing, malformed, or lack weights of the model.
    """

    def __init__(
        self, path: str, config: PreTrainedConfig, dtype: torch.dtype | str, device: torch.device,
        trust_remote_code: bool = False, *, resident: bool = False, first: DiskSource | None = None,
    ):
        self.folder = local_folder(path)
        self.files = weight_files(self.folder, getattr(config, "transformers_weights", None))
        # state of the files before any of them is read
        self.watch: SourceWatch = first.watch if first else SourceWatch([self.folder / "config.json", *self.files])
        self._headers = {file: read_header(file) for file in self.files}
        check_sizes(config, self.folder)
        check_layers(config, sum(map(len, self._headers.values())), self.folder)
        # the weights decide a dtype that the config leaves open
        given = getattr(config, "dtype", None)
        declared: torch.dtype = given if isinstance(given, torch.dtype) else self._first_float()
        computing = declared if dtype == "auto" else cast(torch.dtype, dtype)
        quiet = first is not None
        self._made_of = (str(self.folder), config, computing, device, trust_remote_code)
        self._kept: dict[str, Tensor] | None = first._kept if first else {} if resident else None
        model = self._skeleton(config, computing, trust_remote_code)
        if self._untie(model, quiet):
            config = copy.deepcopy(config)
            config.tie_word_embeddings = False
            self._made_of = (str(self.folder), config, computing, device, trust_remote_code)
            model = self._skeleton(config, computing, trust_remote_code)
        super().__init__(model, computing, device, declared)
        self._stored: dict[str, torch.dtype] = {}
        self._index_files(quiet)
        fill_computed_buffers(self.model, self.device)

    def _skeleton(self, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
        """The model without weights, and ``_contents``: where they are."""
        model = skeleton(config, trust_remote_code, dtype=dtype)
        stored = generation_config(self.folder)
        if stored is not None:
            model.generation_config = stored
        self._contents = contents(self.folder, self._headers, model)
        return model

    def numbers(self) -> Numbers:
        """Return the checker that finds NaN, infinity and numbers out of range as the files are read."""
        owners = {original: target for target, names in self._contents.made_of.items() for original in names}
        towers = tower_prefixes(self.model)
        packed = {f"{path}.weight" for path in (*self.moe.attention, *self.moe.dense)}
        packed |= {path for layer in self.moe.moe for path in layer.stacks()}

        def kind(original: str) -> torch.dtype | None:
            target = owners.get(original)
            if target is None or target.startswith(towers):
                return None
            # scales and offsets are float16
            return torch.float16 if target in packed else torch.float32 if target in self._float32 else self.stored

        return Numbers(self._headers, kind)

    def kept(self) -> dict[str, Callable[[], Tensor]]:
        return {name: partial(self._whole, name) for name in self._contents.ahead}

    def kept_sizes(self) -> dict[str, Tensor]:
        entries = {name: self._contents.entry(name) for name in self._contents.ahead}
        return {n: torch.empty(e.shape, dtype=DTYPES[e.dtype], device="meta") for n, e in entries.items()}

    def _whole(self, original: str) -> Tensor:
        """One tensor of the files."""
        entry = self._contents.entry(original)
        value = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        read_into(self._contents.file[original], entry, value)
        return value

    def again(self) -> DiskSource:
        return DiskSource(*self._made_of, first=self)

    def _first_float(self) -> torch.dtype:
        entries = (entry for header in self._headers.values() for entry in header.values())
        found = next((DTYPES[e.dtype] for e in entries if e.dtype in WEIGHTS), None)
        if found is None:
            raise CheckpointError(f"{self.folder} holds no tensor in {', '.join(WEIGHTS)}")
        return found

    def _index_files(self, quiet: bool) -> None:
        """Sort the parameters by unit, and give the skeleton the dtypes of the files."""
        if not quiet:
            tell_unused(self._contents, f"{self.moe.decoder_path}.layers", len(self.moe.layers))
        for target, originals in self._contents.made_of.items():
            self._units[self.unit_of(target)].append(target)
            stored = DTYPES[self._contents.entry(originals[0]).dtype]
            dtype = torch.bfloat16 if target in self._contents.mxfp4 else stored
            parameter = self.model.get_parameter_or_buffer(target)
            if parameter.is_floating_point():
                self._stored[target] = dtype
                self.put(target, torch.empty_like(parameter, dtype=dtype))

    def _untie(self, model: PreTrainedModel, quiet: bool) -> bool:
        """Return True, and warn, if the files hold different values for weights that the config ties: transformers does
        not tie them then."""
        found = self._contents
        for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            both = [found.made_of.get(name, []) for name in (target, source)]
            if all(both) and not same_tensor(*((found.file[n], found.entry(n)) for (n,) in both)):
                if not quiet:
                    _log.warning("%s: %s and %s are tied by the config and differ in the files: they are not tied, as "
                                 "in transformers", self.folder, target, source)
                return True
        return False

    def _read(self, names: list[str]) -> None:
        kept = self._kept or {}
        missing = [name for name in names if name not in kept]
        for name in names:
            if name in kept:
                self.put(name, kept[name])
        parameters = self._contents.made_of
        others = [name for name in missing if not self._fill(name, parameters[name])]
        if others:
            self._convert(others, parameters)
        for name in others:
            if self.model.get_parameter_or_buffer(name).is_meta:
                raise CheckpointError(f"{self.folder}: {name} could not be made of {parameters[name][:3]}")

    def _load(self, names: list[str]) -> None:
        super()._load(names)
        if self._kept is not None:
            self._kept |= {name: self.model.get_parameter_or_buffer(name).detach() for name in names}

    def _skeleton_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        # conversion runs on what is stored, which is often half as large as what is computed with
        return self._stored.get(name, dtype)

    def _fill(self, name: str, originals: list[str]) -> bool:
        """Read a parameter that is one tensor of the checkpoint, or a stack of them; False if it is made otherwise."""
        found = self._contents
        if name in found.mxfp4:
            self._fill_from_mxfp4(name, originals)
            return True
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

    def _fill_from_mxfp4(self, name: str, originals: list[str]) -> None:
        parts = (self._whole(next(o for o in originals if o.endswith(part))) for part in mxfp4.PARTS)
        self.put(name, mxfp4.dequantize(*parts))

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
