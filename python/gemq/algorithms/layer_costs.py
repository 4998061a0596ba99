"""The sums of Eq. 6 over one layer's experts, in memory or streamed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemq import distributed
from gemq.errors import NumberError

# parts that are perturbed: the expert, its gate and up projections alone, its down projection alone
WHOLE, GATE_UP, DOWN = range(3)


@dataclass
class LayerCosts:
    """One layer's sums: ``routed`` and ``error`` ``[E, B]``, ``shared`` ``[B]``, ``count`` and ``weight`` ``[E]``;
    ``matrices`` ``[E, 2, B]`` are as ``routed``, of gate and up alone and of down alone, or None if not measured."""

    routed: np.ndarray
    error: np.ndarray
    shared: np.ndarray
    count: np.ndarray
    weight: np.ndarray
    matrices: np.ndarray | None = None
    tokens: int = 0

    @classmethod
    def zeros(cls, experts: int, widths: int, matrices: bool = False) -> LayerCosts:
        """Return sums of zero, before any token."""
        return cls(
            np.zeros((experts, widths)), np.zeros((experts, widths)), np.zeros(widths), np.zeros(experts),
            np.zeros(experts), np.zeros((experts, 2, widths)) if matrices else None,
        )

    def check(self, layer: int) -> None:
        """Raise :class:`NumberError` naming the decoder ``layer`` if a sum is not finite: the program would choose
        widths by it."""
        for name in ("routed", "error", "shared", "matrices"):
            values = getattr(self, name)
            if values is not None and not np.isfinite(values).all():
                raise NumberError(
                    f"the coefficients of decoder layer {layer} are not finite ({name}): activations or gradients of "
                    f"the model overflow; compute in a wider type (--dtype float32 or bfloat16) or on other text"
                )

    @property
    def parts(self) -> tuple[int, ...]:
        """Parts of an expert to perturb for these sums: the whole, and with ``matrices`` gate and up, and down."""
        return (WHOLE,) if self.matrices is None else (WHOLE, GATE_UP, DOWN)

    def seen(self, expert: int, scale: Tensor) -> None:
        """Count an expert's tokens by their routing weights ``scale [t, 1]``."""
        self.count[expert] += len(scale)
        self.weight[expert] += float(scale.double().sum())

    def add(
        self, expert: int, column: int, part: int, change: Tensor, gradient: Tensor, scale: Tensor, window: Tensor
    ) -> None:
        """Add one expert's change ``[t, H]`` at one width. The change is given before the routing weights ``scale [t,
        1]`` are applied; ``gradient [t, H]`` includes them, once for all widths. ``window [t]`` are the tokens'
        windows."""
        cost = cost_of(change, gradient)
        if part == WHOLE:
            self.routed[expert, column] += cost
            self.error[expert, column] += error_of(change, scale, window)
        else:
            assert self.matrices is not None
            self.matrices[expert, part - GATE_UP, column] += cost

    def add_shared(self, changes: Iterable[Tensor], gradient: Tensor) -> None:
        """Sum up the changes ``[t, H]`` of the shared expert at every width, each at ``gradient [t, H]``."""
        for column, change in enumerate(changes):
            self.shared[column] += cost_of(change, gradient)

    def complete(self) -> None:
        """Add the sums of all processes. Each has measured its own experts and holds zeros for the others, so the
        result is exact."""
        for name in [f.name for f in fields(self) if isinstance(getattr(self, f.name), np.ndarray)]:
            setattr(self, name, sum(distributed.gather(getattr(self, name))))

    def to_json(self) -> dict:
        """Convert to JSON values for the journal; doubles are restored exactly."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, data: dict) -> LayerCosts:
        """The inverse of :meth:`to_json`."""
        values: dict[str, Any] = {k: np.array(v) if isinstance(v, list) else v for k, v in data.items()}
        return cls(**values)


def cost_of(change: Tensor, gradient: Tensor) -> float:
    """Eq. 6's sum over tokens and dimensions, ``[t, H]`` both."""
    return float((gradient * change).double().square().sum())


def error_of(change: Tensor, scale: Tensor, window: Tensor) -> float:
    """The Frobenius norm of ``dz = scale * change`` summed over windows; ``window [t]`` ascends."""
    per_token = change.double().square().sum(-1) * scale.double().square()[:, 0]
    by_window = torch.zeros(int(window[-1]) + 1, dtype=torch.float64, device=per_token.device)
    by_window.index_add_(0, window, per_token)
    return float(by_window.sqrt().sum())
