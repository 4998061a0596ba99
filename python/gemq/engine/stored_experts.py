"""Keep the experts of a decoder layer as stored, and convert one at a time to the dtype of computing.

A CPU computes in float32 what is stored in 16 bits or packed: a layer converted whole would be the largest thing in
memory. Here a stack stays as it is stored, and an expert is converted when it is used, in the backward pass again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemq import format as fmt
from gemq.activation import Between
from gemq.nn import LowBitExperts
from gemq.ops import unpack_experts
from gemq.reference.grid import dequantize_codes


class StoredStack:
    """A projection as the checkpoint has it; an index or a slice gives experts ``[.., n, k]`` in ``dtype``, which
    ``standard`` makes of what is stored."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, standard: Callable[[Tensor], Tensor] = lambda w: w):
        self._weight, self._dtype, self._standard = weight, dtype, standard
        self.shape = standard(torch.empty_like(weight, device="meta")).shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: int | slice) -> Tensor:
        return self._standard(self._weight[which]).to(self._dtype).contiguous()

    def stores(self, which: Tensor) -> None:
        """Say which experts have bits: all, which None stands for."""
        return None


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

    def stores(self, which: Tensor) -> Tensor | None:
        """Bool ``[t, 1]``: if the experts ``which [t]`` have bits; None where all have."""
        if all(self._bits):
            return None
        return (torch.tensor(self._bits, device=which.device) > 0)[which, None]

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


def _plus(product: Tensor, bias: Tensor | None, stack: Stack, ids: Tensor) -> Tensor:
    """Add the rows of a bias ``[E, n]``; an expert without bits has none."""
    if bias is None:
        return product
    rows, stores = bias[ids], stack.stores(ids)
    return product + (rows if stores is None else torch.where(stores, rows, 0))


def run_experts(
    stacks: tuple[Stack, Stack], between: Between, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run the experts, ``[T, H] -> [T, H]``. The result equals that of transformers' grouped experts bit for bit: sums
    are taken in the same order."""
    activation, gate_up_bias, down_bias = between
    tokens, top_k = top_k_index.shape
    ids, order = torch.sort(top_k_index.reshape(-1))
    ends = torch.bincount(ids, minlength=len(stacks[0])).cumsum(0).tolist()
    first = _Grouped.apply(hidden_states[order // top_k], stacks[0], ends)
    inner = activation(_plus(first, gate_up_bias, stacks[0], ids))
    out = _plus(_Grouped.apply(inner, stacks[1], ends), down_bias, stacks[1], ids)
    out = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return out[back].view(tokens, top_k, -1).sum(dim=1).to(hidden_states.dtype)
