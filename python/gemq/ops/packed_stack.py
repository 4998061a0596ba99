"""Type of a packed stack: what both ops over experts take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# (qweight, meta, expert_bits, expert_offsets, meta_offsets), as runtimes without PackedStack pass them
Stack = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class PackedStack:
    """The matrices ``n`` x ``k`` of one projection of all experts of a layer: their buffers, and how to read them.

    Attributes:
        qweight: uint8, all experts' codes in ``layout`` (:mod:`gemq.format`).
        meta: float16, all experts' scales and offsets ``(s, m)`` in ``layout``.
        expert_bits: int32 ``[E]``, the width of each expert; 0 contributes zero.
        expert_offsets: int64 ``[E]``, bytes into ``qweight``.
        meta_offsets: int64 ``[E]``, float16 elements into ``meta``.
        n: rows, which are output features.
        k: columns, a multiple of ``group_size``.
        group_size: columns that share one ``(s, m)``: 32, 64 or 128.
        layout: ``canonical``, ``cpu_tile`` or ``gpu_tile``.

    Nothing is checked here: the ops check a stack when they first see it.
    """

    qweight: Tensor
    meta: Tensor
    expert_bits: Tensor
    expert_offsets: Tensor
    meta_offsets: Tensor
    n: int
    k: int
    group_size: int = 128
    layout: str = "canonical"

    @property
    def tensors(self) -> Stack:
        """The five tensors, in the order of the ops' arguments."""
        return self.qweight, self.meta, self.expert_bits, self.expert_offsets, self.meta_offsets

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.expert_bits.numel()

    def to(self, device: torch.device | str) -> PackedStack:
        """Move the tensors; the layout stays, so the device must have kernels for it."""
        qweight, meta, bits, offsets, meta_offsets = (t.to(device) for t in self.tensors)
        return PackedStack(qweight, meta, bits, offsets, meta_offsets, self.n, self.k, self.group_size, self.layout)
