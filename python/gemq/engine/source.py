"""A full-precision model of which one decoder layer at a time is loaded into a skeleton without weights.

What is loaded is never written to: a resident model lends its own tensors.
"""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gemq.engine.stored_experts import Stack, StoredStack, run_experts
from gemq.models import MoeLayer, MoeModel, describe, empty_twin
from gemq.models.weighted_inputs import call_by_ids, takes_inputs_alone
from gemq.packed_model import kept_in_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# unit of the parameters outside decoder layers: embeddings, the last norm, the head
OUTSIDE = -1
# tensors that stay unquantized are stored in 16 bits
_STORED = {torch.float64: torch.bfloat16, torch.float32: torch.bfloat16}


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


def put(model: nn.Module, name: str, value: Tensor) -> None:
    """Set the parameter or buffer of this name, without gradient."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    is_buffer = leaf in module._buffers
    setattr(module, leaf, value if is_buffer else nn.Parameter(value, requires_grad=False))


class Source(ABC):
    """A model whose decoder layers are loaded on demand.

    ``moe`` describes the skeleton; its parameters are on the meta device until :meth:`load`. ``dtype`` is that of
    computing, but parameters that the family keeps in float32 stay so, and experts as they are stored, where that is
    smaller: ``experts`` gives both projections of a loaded layer. ``stored`` is the dtype of a checkpoint's
    unquantized tensors.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, device: torch.device, declared: torch.dtype):
        self.model, self.dtype, self.device = model, dtype, device
        self.declared, self.stored = declared, stored_dtype(declared)
        model.eval().requires_grad_(False)
        self.moe: MoeModel = describe(model)
        self.experts: dict[int, tuple[Stack, Stack]] = {}
        self._float32 = kept_in_float32(model)
        self._tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        self._held: set[str] = set()
        self._units: dict[int, list[str]] = {index: [] for index in range(OUTSIDE, len(self.moe.layers))}
        self._expert_stacks = {path for layer in self.moe.moe for path in layer.stacks()}
        for layer in self.moe.moe:
            experts: Any = layer.experts
            if takes_inputs_alone(experts):
                call_by_ids(layer.block)
            experts.forward = partial(self._run_experts, layer)

    @abstractmethod
    def again(self) -> Source:
        """A second skeleton of the same model."""

    @abstractmethod
    def _read(self, names: list[str]) -> None:
        """Put parameters into the skeleton, as they are stored."""

    def _run_experts(self, layer: MoeLayer, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return run_experts(self.experts[layer.index], layer.form.between(layer.experts, self.dtype), *args, **kwargs)

    def kept(self) -> dict[str, Callable[[], Tensor]]:
        """Tensors of the checkpoint that belong to no module and are written back as they are, by name."""
        return {}

    def kept_sizes(self) -> dict[str, Tensor]:
        """:meth:`kept` without storage."""
        return {}

    def unit_of(self, name: str) -> int:
        """The decoder layer of a parameter, or :data:`OUTSIDE`."""
        prefix = f"{self.moe.decoder_path}.layers."
        return int(name[len(prefix) :].partition(".")[0]) if name.startswith(prefix) else OUTSIDE

    def names(self, unit: int) -> list[str]:
        """The parameters and stored buffers of a decoder layer, or of :data:`OUTSIDE`; tied ones once."""
        return self._units[unit]

    def put(self, name: str, value: Tensor) -> None:
        """Set a parameter or buffer of the skeleton."""
        put(self.model, name, value)

    def load(self, unit: int, without: Collection[str] = ()) -> None:
        """Load a decoder layer (or :data:`OUTSIDE`) onto the device, in the dtype of computing, experts as stored.

        ``without`` are paths of modules whose weights are not wanted. Raises :class:`gemq.errors.CheckpointError` for
        files that cannot be read.
        """
        names = [n for n in self._units[unit] if n not in self._held and not self._unwanted(n, without)]
        # one stack of experts at a time, the small rest together
        stacks = [name for name in names if name in self._expert_stacks]
        rest = [name for name in names if name not in self._expert_stacks]
        for group in [[name] for name in stacks] + ([rest] if rest else []):
            self._load(group)
        for layer in self.moe.moe:
            if layer.index == unit and f"{layer.path}.experts" not in without:
                gate_up, down = (
                    StoredStack(getattr(layer.experts, own), self.dtype, partial(layer.form.standard, name))
                    for name, own in layer.form.names.items()
                )
                self.experts[unit] = gate_up, down
        if unit == OUTSIDE:
            self.model.tie_weights()
            self.model.requires_grad_(False)

    @staticmethod
    def _unwanted(name: str, without: Collection[str]) -> bool:
        owner, _, leaf = name.rpartition(".")
        return owner in without and not leaf.endswith("bias")

    def _load(self, names: list[str]) -> None:
        self._read(names)
        for name in names:
            value = self.model.get_parameter_or_buffer(name)
            dtype = value.dtype
            if value.is_floating_point():
                dtype = torch.float32 if name in self._float32 else self.dtype
            if name in self._expert_stacks and value.dtype.itemsize <= dtype.itemsize:
                dtype = value.dtype
            self.put(name, value.detach().to(self.device, dtype))

    def hold(self, names: list[str]) -> None:
        """Load copies of these parameters and keep them: no :meth:`load` reads them again, no :meth:`drop` frees them.
        """
        for name in names:
            self._load([name])
            self.put(name, self.model.get_parameter_or_buffer(name).clone())
        self._held |= set(names)

    def drop(self, unit: int) -> None:
        """Free the weights of a unit."""
        self.experts.pop(unit, None)
        for name in [*self._units[unit], *(self._tied if unit == OUTSIDE else ())]:
            if name not in self._held:
                value = self.model.get_parameter_or_buffer(name)
                self.put(name, torch.empty_like(value, device="meta", dtype=self._skeleton_dtype(name, value.dtype)))
        return_memory()

    def _skeleton_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a parameter that is not loaded, given that of computing."""
        return dtype

    def layer_bytes(self, size: int = 2) -> int:
        """Bytes of the largest decoder layer at ``size`` bytes a weight."""
        return max(sum(p.numel() for p in layer.parameters()) * size for layer in self.moe.layers)


class ResidentSource(Source):
    """A full-precision ``model`` in memory. Its weights stay as they are; its hooks are not called."""

    def __init__(self, model: PreTrainedModel):
        skeleton = empty_twin(model)
        skeleton.generation_config = model.generation_config
        super().__init__(skeleton, model.dtype, next(model.parameters()).device, model.dtype)
        self._resident = model
        stored = model.state_dict()
        self._tensors = {name: t.detach() for name, t in stored.items() if name not in self._tied}
        for name in self._tensors:
            self._units[self.unit_of(name)].append(name)
        for name, buffer in model.named_buffers():
            if name not in stored:
                self.put(name, buffer)

    def again(self) -> ResidentSource:
        return ResidentSource(self._resident)

    def _read(self, names: list[str]) -> None:
        for name in names:
            self.put(name, self._tensors[name])
