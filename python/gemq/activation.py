"""Activations between the two products of an expert: what ``moe_lowbit_ffn`` takes, on every backend.

============  =================================================================================  ======================
name          inner activations of ``gate`` and ``up``                                           families
============  =================================================================================  ======================
``silu``      ``SiLU(gate) * up``, both limited to ``limit`` first where there is one            most; DeepSeek-V4
``gelu_tanh`` ``GELU(gate) * up``, with the tanh approximation                                   Gemma 4
``swigluoai`` ``gate * sigmoid(alpha * gate) * (up + 1)``, both limited to ``limit`` first       gpt-oss
``relu2``     ``max(x, 0) ** 2``; the first product has no gate                                  Nemotron-H
============  =================================================================================  ======================

A limit holds ``gate`` from above and ``up`` on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

GELU_SLOPE = 2 * math.sqrt(2 / math.pi)  # GELU(x), by tanh, is x * sigmoid(GELU_SLOPE * (x + 0.044715 * x^3))
ACTIVATIONS = ("silu", "gelu_tanh", "swigluoai", "relu2")


class Gating(NamedTuple):
    """``g * sigmoid(g * (slope + cubic * g^2)) * (u + shift)`` of limited gate and up: how kernels see a gated one."""

    slope: float = 1.0
    cubic: float = 0.0
    limit: float = math.inf
    shift: float = 0.0


@dataclass(frozen=True)
class Activation:
    """An activation of the table in :mod:`gemq.activation`.

    Attributes:
        name: one of :data:`ACTIVATIONS`.
        alpha: slope of ``swigluoai``'s sigmoid.
        limit: bound of gate and up, for ``silu`` and ``swigluoai``; None for none.

    Raises ``ValueError`` for another name, or an ``alpha`` or ``limit`` that is not positive.
    """

    name: str = "silu"
    alpha: float = 1.702
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.name!r}")
        for name, value in (("alpha", self.alpha), ("limit", self.limit)):
            if value is not None and not value > 0:
                raise ValueError(f"activation.{name} must be positive, got {value}")
        if self.name in ("gelu_tanh", "relu2") and self.limit is not None:
            raise ValueError(f"activation {self.name} takes no limit, got {self.limit}")

    @property
    def gated(self) -> bool:
        """False for one that has no gate: the first product then has ``intermediate`` rows, not twice as many."""
        return self.name != "relu2"

    def rows(self, intermediate: int) -> int:
        """Rows of the first product."""
        return 2 * intermediate if self.gated else intermediate

    @cached_property
    def gating(self) -> Gating:
        """The numbers of a gated activation; every call of a kernel takes them."""
        if self.name == "gelu_tanh":
            return Gating(GELU_SLOPE, GELU_SLOPE * 0.044715)
        if self.name == "swigluoai":
            return Gating(self.alpha, 0.0, self.limit or math.inf, 1.0)
        return Gating(limit=self.limit or math.inf)

    def __call__(self, first: Tensor) -> Tensor:
        """Inner activations ``[..., I]`` of the first product ``[..., 2I]``, gate first, or ``[..., I]`` without."""
        if self.name == "relu2":
            return torch.relu(first).square()
        gate, up = first.chunk(2, dim=-1)
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        if self.name == "silu":
            return torch.nn.functional.silu(gate) * up
        if self.name == "gelu_tanh":
            return torch.nn.functional.gelu(gate, approximate="tanh") * up
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)

    def backward(self, first: Tensor, grad: Tensor) -> Tensor:
        """Gradient at the first product, of the one at the inner activations ``[..., I]``."""
        if self.name == "relu2":
            return grad * 2 * torch.relu(first)
        how = self.gating
        gate, up = first.chunk(2, dim=-1)
        g, u = gate.clamp(max=how.limit), up.clamp(-how.limit, how.limit) + how.shift
        sigmoid = torch.sigmoid(g * (how.slope + how.cubic * g * g))
        slope = sigmoid * (1 + g * (1 - sigmoid) * (how.slope + 3 * how.cubic * g * g))
        return torch.cat([
            grad * u * slope * (gate <= how.limit), grad * g * sigmoid * (up.abs() <= how.limit),
        ], -1)


SILU = Activation()
# the inner activations [..., I] of an expert's first product [..., rows]
Inner = Callable[[Tensor], Tensor]


class Between(NamedTuple):
    """All that stands between and behind an expert's two products; biases float32 ``[E, rows]`` and ``[E, H]``."""

    activation: Activation = SILU
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def of(self, experts: range) -> list[Inner]:
        """The inner activations of some experts, all of which have bits, as functions of their first product."""
        if self.gate_up_bias is None:
            return [self.activation for _ in experts]
        return [self._biased(self.gate_up_bias[e]) for e in experts]

    def _biased(self, bias: Tensor) -> Inner:
        return lambda first: self.activation(first + bias)


PLAIN = Between()


def parse_activation(value: Activation | str) -> Activation:
    """An activation, given as one or by its name. ``TypeError`` or ``ValueError`` for anything else."""
    if isinstance(value, Activation):
        return value
    if not isinstance(value, str):
        raise TypeError(f"activation must be an Activation or its name, got {type(value).__name__}")
    return SILU if value == "silu" else Activation(value)
