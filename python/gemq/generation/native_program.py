"""A decode program in the making: buffers, linears and norms of transformers' modules as its operations.

Unquantized weights are read as they are stored. Those of a float32 model whose every element is a bfloat16 or float16
number, as those of a 16-bit checkpoint are, are read from a 16-bit copy: the same products from half the bytes. The
copy is kept for as long as its layer.
"""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor, nn

from gemq.activation import Activation
from gemq.generation.norms import epsilon, factors
from gemq.models.experts import mlp_activation
from gemq.nn import LowBitLinear
from gemq.ops import cpu
from gemq.ops.decode import DecodeProgram, Matrix

# elements that are compared at a time: their float32 form stays in a near cache
_COMPARED = 1 << 17
_narrowed: weakref.WeakKeyDictionary[nn.Module, Tensor] = weakref.WeakKeyDictionary()


def as_stored(linear: Any) -> Tensor:
    """The weight of ``linear``, from a 16-bit copy where that holds every element exactly.

    A copy of an earlier call is compared with the weight before it is used again: weights may have changed.
    """
    weight: Tensor = linear.weight.detach().contiguous()
    if weight.dtype != torch.float32:
        return cpu.on_large_pages(weight)
    held = _narrowed.pop(linear, None)
    if held is None or held.shape != weight.shape or not _holds(held, weight):
        held = _narrow(weight)
    if held is None:
        return weight
    _narrowed[linear] = held
    return held


def _narrow(weight: Tensor) -> Tensor | None:
    for dtype in (torch.bfloat16, torch.float16):
        # a few rows tell in most cases
        if not torch.equal(weight[:4].to(dtype).float(), weight[:4]):
            continue
        narrow = cpu.empty(weight.numel(), dtype).view(weight.shape).copy_(weight)
        if _holds(narrow, weight):
            return narrow
    return None


def _holds(narrow: Tensor, weight: Tensor) -> bool:
    """Return True if all elements are equal. Parts are compared in turn: the float32 form of the whole would be another
    copy."""
    rows = max(_COMPARED // weight.shape[1], 1)
    pairs = zip(narrow.split(rows), weight.split(rows), strict=True)
    return all(torch.equal(part.float(), rows) for part, rows in pairs)


class Writer:
    """A program, its two buffers of the hidden size (``x`` runs through the layers, ``y`` is what a norm made of it),
    the rotary tables of its model, and what programs of one model share (``kept``, by module)."""

    def __init__(
        self, batch: int, hidden: int, rotary: dict[str | None, tuple[Tensor, Tensor]], kept: dict[Any, Any]
    ):
        self.program = DecodeProgram(batch)
        self.batch, self.hidden, self.rotary, self.kept = batch, hidden, rotary, kept
        self.x, self.y = self.program.buffer(hidden), self.program.buffer(hidden)

    def buffers(self, *linears: Any) -> list[int]:
        """A buffer for the result of each linear."""
        return [self.program.buffer(out_features(linear)) for linear in linears]

    def norm(self, x: int, norm: Any, out: int, width: int | None = None, **options: Any) -> None:
        """``out`` = the norm of the buffer ``x``, whose ``width`` is the hidden size unless given."""
        self.program.norm(x, factors(norm, width or self.hidden), epsilon(norm), out, **options)

    def linear(self, x: int, layers: dict[int, Any], onto: bool = False, gate: int = -1) -> None:
        """The layers that share ``x``, by the buffer of their result."""
        matrices = [_matrix(layer, out) for out, layer in layers.items()]
        self.program.linear(x, in_features(next(iter(layers.values()))), matrices, onto, gate)

    def apply(self, x: int, layer: Any) -> int:
        """The buffer of a layer's result for ``x``."""
        (out,) = self.buffers(layer)
        self.linear(x, {out: layer})
        return out

    def first_of(self, mlp: Any) -> dict[int, Any]:
        """Buffers of what an MLP multiplies its input by first: up, and the gate before it where there is one."""
        layers = (mlp.gate_proj, mlp.up_proj) if _activation(mlp).gated else (mlp.up_proj,)
        return dict(zip(self.buffers(*layers), layers, strict=True))

    def inner_of(self, mlp: Any, firsts: dict[int, Any]) -> int:
        """The buffer of an MLP's activation of its first products, which its down projection reads."""
        inner, (gate, *up) = self.program.buffer(in_features(mlp.down_proj)), firsts
        self.program.activate(gate, up[0] if up else gate, inner, _activation(mlp))
        return inner


def _activation(mlp: Any) -> Activation:
    return cast(Activation, mlp_activation(mlp))


def _matrix(layer: Any, out: int) -> Matrix:
    bias = getattr(layer, "bias", None)
    if isinstance(layer, LowBitLinear):
        packed = (layer.weight_codes, layer.weight_meta)
        return Matrix(out, layer.out_features, packed, layer.bits, layer.group_size, bias)
    return Matrix(out, layer.weight.shape[0], as_stored(layer), bias=bias)


def in_features(layer: Any) -> int:
    """Columns of a linear or router."""
    return layer.in_features if isinstance(layer, LowBitLinear) else layer.weight.shape[1]


def out_features(layer: Any) -> int:
    """Rows of a linear or router."""
    return layer.out_features if isinstance(layer, LowBitLinear) else layer.weight.shape[0]
