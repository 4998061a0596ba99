"""Keep the experts of a decoder layer as stored, and convert one at a time to the dtype of computing.

A CPU computes in float32 what is stored in 16 bits or packed: a layer converted whole would be the largest thing in
memory. Here a stack stays as it is stored, and an expert is converted when it is used, in the backward pass again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gemq import format as fmt
from gemq.nn import LowBitExperts
from gemq.ops import unpack_experts
from gemq.reference.grid import dequantize_codes


class StoredStack:
    """A projection ``[E, n, k]`` as the checkpoint has it; an index or a slice gives experts in ``dtype``."""

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        self._weight, self._dtype, self.shape = weight, dtype, weight.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: int | slice) -> Tensor:
        return self._weight[which].to(self._dtype)


class PackedProjection:
    """A projection of packed experts in canonical layout; an index gives one dequantized, on ``device``."""

    def __init__(self, module: LowBitExperts, name: str, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        self._bits, self._size = module.bits[name], module.group_sizes[name]
        self.shape = torch.Size((module.num_experts, *module.shape(name)))
        self._codes, self._meta = module.stored(name)
        self._at = fmt.expert_layout(self._bits, *module.shape(name), self._size, "canonical")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, e: int) -> Tensor:
        bits, (n, k) = self._bits[e], self.shape[1:]
        if bits == 0:
            return torch.zeros(n, k, dtype=self._dtype, device=self._device)
        codes, meta = self._codes[self._at.code_offsets[e] :], self._meta[self._at.meta_offsets[e] :]
        (found,) = unpack_experts(codes, meta, [bits], n, k, self._size)
        assert found is not None
        codes, meta = found
        return dequantize_codes(codes.to(self._device), meta.to(self._device), self._dtype)


Stack = StoredStack | PackedProjection


class _Grouped(torch.autograd.Function):
    """Rows of ``x``, sorted by expert, times their experts' matrices; ``ends`` are the experts' last rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: Stack, ends: list[int]) -> Tensor:
        ctx.stack, ctx.ends = stack, ends
        return _each(x, stack, ends, stack.shape[1], transposed=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _each(gradient, ctx.stack, ctx.ends, ctx.stack.shape[2], transposed=False), None, None


def _each(x: Tensor, stack: Stack, ends: list[int], columns: int, transposed: bool) -> Tensor:
    out, start = x.new_empty(len(x), columns), 0
    for expert, end in enumerate(ends):
        if end > start:
            weight = stack[expert]
            torch.mm(x[start:end], weight.T if transposed else weight, out=out[start:end])
        start = end
    return out


def run_experts(
    stacks: tuple[Stack, Stack], act: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run the experts, ``[T, H] -> [T, H]``. The result equals that of transformers' grouped experts bit for bit: sums
    are taken in the same order."""
    tokens, top_k = top_k_index.shape
    ids, order = torch.sort(top_k_index.reshape(-1))
    ends = torch.bincount(ids, minlength=len(stacks[0])).cumsum(0).tolist()
    gate, up = _Grouped.apply(hidden_states[order // top_k], stacks[0], ends).chunk(2, dim=-1)
    out = _Grouped.apply(act(gate) * up, stacks[1], ends)
    out = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return out[back].view(tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)
