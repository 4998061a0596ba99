"""Activations between the two products of an expert, but for SiLU, which the kernels have in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


class Gating(NamedTuple):
    """``g * sigmoid(g * (slope + cubic * g^2)) * (u + shift)``, with gate and up held to ``limit`` (0 for none)."""

    slope: float
    cubic: float
    limit: float
    shift: float


class Inner(NamedTuple):
    """Activation and biases as ``gemq.ops`` hands them down: ``act`` computes the first in torch; no ``gating`` is SiLU
    where it is ``gated``, and squared ReLU where it is not.

    Biases are float32 ``[E, rows]`` and ``[E, hidden]``, or None.
    """

    act: Callable[[Tensor], Tensor]
    gated: bool = True
    gating: Gating | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def rows(self, intermediate: int) -> int:
        """Rows of the first product."""
        return 2 * intermediate if self.gated else intermediate


def _silu(first: Tensor) -> Tensor:
    gate, up = first.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


SILU = Inner(_silu)


def add_bias(product: Tensor, bias: Tensor | None, topk_ids: Tensor, bits: Tensor) -> Tensor:
    """Add a bias ``[E, n]`` to ``product [.., n]`` of the pairs ``topk_ids``, where the expert exists and has bits."""
    if bias is None:
        return product
    at = topk_ids.long().clamp(0, len(bias) - 1)
    counts = (topk_ids >= 0) & (topk_ids < len(bias)) & (bits[at] > 0)
    return product + torch.where(counts[..., None], bias[at], 0.0).view(product.shape)


@triton.jit
def gated_by(gate, up, GATING: tl.constexpr):
    """Inner activations of a :class:`Gating`, without an exponential that overflows; a NaN stays one."""
    if GATING.limit > 0:
        gate = tl.where(gate > GATING.limit, GATING.limit, gate)
        up = tl.where(up > GATING.limit, GATING.limit, up)
        up = tl.where(up < -GATING.limit, -GATING.limit, up)
    slope = gate * (GATING.slope + GATING.cubic * gate * gate)
    small = tl.exp(-tl.abs(slope))
    return gate * (tl.where(slope < 0, small, 1.0) / (1.0 + small)) * (up + GATING.shift)


@triton.jit
def relu_squared(x):
    """``max(x, 0)^2``; a NaN stays one."""
    x = tl.where(x < 0, 0.0, x)
    return x * x
