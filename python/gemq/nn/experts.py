"""A stack of experts of different widths: the drop-in for a transformers ``experts`` module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemq import format as fmt
from gemq.activation import SILU, Activation, Between
from gemq.nn.base import PackedModule
from gemq.ops import (
    PackedStack,
    backends,
    checks,
    expert_tables,
    layout_for,
    moe_lowbit_ffn,
    pack_experts,
    unpack_experts,
)
from gemq.ops.expert_buffers import convert_experts
from gemq.ops.packed_stack import Stack
from gemq.ops.packing import dequantize, pack

PROJECTIONS = ("gate_up_proj", "down_proj")
_IDS = (torch.int32, torch.int64)
_TABLES = ("bits", "code_offsets", "meta_offsets")


def stored_name(projection: str, part: str) -> str:
    """The buffer of ``"codes"`` or ``"meta"`` of a projection: ``gate_up_codes``.

    Not ``gate_up_proj_codes``: transformers before 5.21 takes whatever starts with ``gate_up_proj`` for that tensor.
    """
    return f"{projection.removesuffix('_proj')}_{part}"


def gate_first(value: Tensor, dim: int) -> Tensor:
    """Put rows of gate and up that take turns along ``dim``, which counts from the end, in halves: the gate's first."""
    return value.unflatten(dim, (-1, 2)).transpose(dim - 1, dim).flatten(dim - 1, dim)


@dataclass(frozen=True)
class QuantizedStack:
    """Codes of one projection of all experts of a layer: ``codes[e]`` uint8 ``[n, k]``, ``meta[e]`` float16
    ``[n, k // group_size, 2]``, both ``None`` for an expert of 0 bits."""

    codes: list[Tensor | None]
    meta: list[Tensor | None]
    bits: list[int]


class LowBitExperts(PackedModule):
    """Packed experts, called as ``experts(hidden [T, H], top_k_index [T, k], top_k_weights [T, k]) -> [T, H]``.

    ``bits`` are the experts' widths, ``down_bits`` those of their down projections where they are others.
    ``activation`` stands between the products. A ``biased`` module has parameters ``{projection}_bias [E, rows]``, in
    ``dtype``, named and ordered as the family's are: ``first`` is its name of ``gate_up_proj``, and the rows of gate
    and up take turns if ``interleaved``. A bias counts where its projection has bits.

    The state dict always holds the canonical layout: ``{gate_up,down}_codes`` (uint8) and ``_meta``
    (float16), flat, expert after expert. :meth:`prepare` must run once after the buffers are filled: it moves
    them to the layout of their device's kernels and builds the offset tables.
    """

    def __init__(
        self, hidden: int, intermediate: int, bits: list[int], group_size: int = 128,
        device: torch.device | str | None = None, down_bits: list[int] | None = None, *,
        activation: Activation = SILU, biased: bool = False, interleaved: bool = False, first: str = PROJECTIONS[0],
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if down_bits is not None and len(down_bits) != len(bits):
            raise ValueError(f"down_bits must be of {len(bits)} experts, as bits, got {len(down_bits)}")
        self.hidden, self.intermediate = hidden, intermediate
        self.activation, self.interleaved, self._first = activation, interleaved, first
        self.num_experts = len(bits)
        self.bits = {"gate_up_proj": list(bits), "down_proj": list(bits if down_bits is None else down_bits)}
        self.group_sizes = {
            "gate_up_proj": fmt.default_group_size(hidden, group_size),
            "down_proj": fmt.default_group_size(intermediate, group_size),
        }
        self.layout = "canonical"
        for name in PROJECTIONS:
            plan = fmt.expert_layout(self.bits[name], *self.shape(name), self.group_sizes[name], self.layout)
            codes = torch.zeros(plan.code_bytes, dtype=torch.uint8, device=device)
            meta = torch.zeros(plan.meta_elements, dtype=torch.float16, device=device)
            self.register_buffer(stored_name(name, "codes"), codes)
            self.register_buffer(stored_name(name, "meta"), meta)
            if biased:
                rows = torch.zeros(self.num_experts, self.shape(name)[0], dtype=dtype, device=device)
                self.register_parameter(self.bias_name(name), nn.Parameter(rows, requires_grad=False))

    def bias_name(self, name: str) -> str:
        """The parameter that holds the bias of a projection, if there is one."""
        return f"{self._first if name == PROJECTIONS[0] else name}_bias"

    def bias(self, name: str) -> Tensor | None:
        """The bias float32 ``[E, rows]`` of a projection, gate first; None without."""
        value = getattr(self, self.bias_name(name), None)
        if value is None:
            return None
        value = value.detach().float()
        return (gate_first(value, -1) if self.interleaved and name == PROJECTIONS[0] else value).contiguous()

    def stored(self, name: str) -> tuple[Tensor, Tensor]:
        """The flat ``(codes, meta)`` of a projection, in the current layout."""
        return getattr(self, stored_name(name, "codes")), getattr(self, stored_name(name, "meta"))

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of one expert's projection."""
        if name == "gate_up_proj":
            return self.activation.rows(self.intermediate), self.hidden
        return self.hidden, self.intermediate

    @classmethod
    def from_stacks(
        cls, gate_up: QuantizedStack, down: QuantizedStack, hidden: int, intermediate: int, group_size: int,
        **options: Any,
    ) -> LowBitExperts:
        """Pack quantized projections (see :class:`QuantizedStack`), whose widths may differ; ``options`` as the class
        has them.

        Raises ``ValueError`` if they are of different numbers of experts, or for codes or metadata of another shape.
        """
        module = cls(hidden, intermediate, gate_up.bits, group_size, down_bits=down.bits, **options)
        for name, stack in (("gate_up_proj", gate_up), ("down_proj", down)):
            codes, meta = pack_experts(
                stack.codes, stack.meta, stack.bits, *module.shape(name), module.group_sizes[name]
            )
            setattr(module, stored_name(name, "codes"), codes)
            setattr(module, stored_name(name, "meta"), meta)
        return module

    def _converted(self, name: str, layout: str) -> tuple[Tensor, Tensor]:
        return convert_experts(
            *self.stored(name), self.bits[name], *self.shape(name),
            self.group_sizes[name], self.layout, layout,
        )

    def prepare(self, layout: str | None = None) -> None:
        """Repack for the device's kernels (or to ``layout``) in place and build the offset tables there."""
        device = self.packed_device()
        layout = layout or layout_for(device)
        for name in PROJECTIONS:
            if layout != self.layout:
                codes, meta = self._converted(name, layout)
                setattr(self, stored_name(name, "codes"), codes)
                setattr(self, stored_name(name, "meta"), meta)
        self.layout = layout
        for name in PROJECTIONS:
            tables = expert_tables(self.bits[name], *self.shape(name), self.group_sizes[name], layout, device)
            for label, table in zip(_TABLES, tables, strict=True):
                self.register_buffer(f"_{name}_{label}", table, persistent=False)
            self.register_buffer(f"_{name}_bias", self.bias(name), persistent=False)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.layout != "canonical":
            for name in PROJECTIONS:
                codes, meta = self._converted(name, "canonical")
                destination[prefix + stored_name(name, "codes")] = codes
                destination[prefix + stored_name(name, "meta")] = meta

    def stack(self, name: str) -> PackedStack:
        """A projection as the ops take it. Raises ``RuntimeError`` before :meth:`prepare`."""
        return PackedStack(*self._tensors(name), *self.shape(name), self.group_sizes[name], self.layout)

    def _tensors(self, name: str) -> Stack:
        if not hasattr(self, f"_{name}_bits"):
            raise RuntimeError("the experts have no offset tables yet: call prepare() once their buffers are filled")
        bits, offsets, meta_offsets = (getattr(self, f"_{name}_{label}") for label in _TABLES)
        return *self.stored(name), bits, offsets, meta_offsets

    def dense(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantized weights ``[E, n, k]`` of a projection; zeros for experts of 0 bits."""
        n, k = self.shape(name)
        size = self.group_sizes[name]
        codes, meta = self.stored(name)
        parts = unpack_experts(codes, meta, self.bits[name], n, k, size, self.layout)
        out = torch.zeros(self.num_experts, n, k, dtype=dtype, device=codes.device)
        for e, part in enumerate(parts):
            if part is not None:
                bits = self.bits[name][e]
                out[e] = dequantize(pack(part[0], bits), part[1].contiguous(), bits, k, size, dtype)
        return out

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``[T, H] -> [T, H]``: the weighted sum of the routed experts' outputs."""
        if self.layout == "cpu_tile" and checks.unwatched(hidden_states, top_k_index, top_k_weights):
            out = self._direct(hidden_states, top_k_index, top_k_weights)
            if out is not None:
                return out
        between = self.between()
        return moe_lowbit_ffn(
            hidden_states, self.stack("gate_up_proj"), self.stack("down_proj"), top_k_index, top_k_weights,
            activation=between.activation, gate_up_bias=between.gate_up_bias, down_bias=between.down_bias,
        )

    def between(self) -> Between:
        """Activation and biases between and behind the products. Biases are None before :meth:`prepare`."""
        biases: list[Any] = [getattr(self, f"_{name}_bias", None) for name in PROJECTIONS]
        return Between(self.activation, *biases)

    def _direct(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
        """Direct kernel call without the dispatcher; None if the op must validate the arguments."""
        routed = x.shape[:1] + ids.shape[-1:]
        if not (
            x.dim() == 2 and x.shape[1] == self.hidden and x.dtype in checks.FLOATS
            and ids.shape == routed == weights.shape and ids.numel()
            and ids.dtype in _IDS and weights.dtype in checks.FLOATS and x.is_cpu and ids.is_cpu and weights.is_cpu
        ):
            return None
        return backends.moe_ffn(
            x.contiguous(), self._tensors("gate_up_proj"), self._tensors("down_proj"), ids, weights, self.intermediate,
            self.group_sizes["gate_up_proj"], self.group_sizes["down_proj"], self.layout, self.between(),
        )

    def extra_repr(self) -> str:
        """Shown by ``print(module)``."""
        gate_up, down = self.bits.values()
        bits = f"bits={gate_up}" if gate_up == down else f"bits={gate_up}, down_bits={down}"
        return f"experts={self.num_experts}, hidden={self.hidden}, intermediate={self.intermediate}, {bits}"
