"""Widths that another program decided: the authors' allocations, ``gemq allocate --json``, another checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gemq.algorithms.allocation import BUDGET_SLACK, Allocation
from gemq.format import MAX_BITS, UNQUANTIZED
from gemq.models import MoeModel


@dataclass(frozen=True)
class GivenAllocation:
    """A width for every routed expert, as it came from ``source``.

    ``rows`` holds one row of widths a MoE layer, in layer order; ``layers`` their decoder layer indices, or None where
    the source names none. A row may end with one more width, that of the layer's merged shared expert (so do the
    authors' files); ``shared`` holds those widths where the source keeps them apart. ``down`` are the widths of the
    down projections, as ``rows``, which then are those of gate and up. ``budget`` is what the source says it was
    solved for.
    """

    source: str
    rows: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...] | None = None
    shared: tuple[int, ...] | None = None
    budget: float | None = None
    down: tuple[tuple[int, ...], ...] | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> GivenAllocation:
        """Build an allocation from its fields as JSON returns them: lists for tuples."""
        rows = tuple(tuple(row) for row in data["rows"])
        down = None if data["down"] is None else tuple(tuple(row) for row in data["down"])
        layers, shared = (None if data[n] is None else tuple(data[n]) for n in ("layers", "shared"))
        return cls(data["source"], rows, layers, shared, data["budget"], down)

    def fit(self, moe: MoeModel, budget: float | None = None, shared_bits: int | None = None) -> Allocation:
        """Return this allocation for ``moe`` after checking its shape and mean; ``shared_bits`` overrides the file's.

        ``budget`` is the largest mean in bits per expert that is accepted. Raises ``ValueError`` naming the source,
        what it holds and what the model needs.
        """
        indices = tuple(layer.index for layer in moe.moe)
        if self.layers is not None and self.layers != indices:
            raise ValueError(
                f"{self.source} allocates layers {_span(self.layers)}, but the model's MoE layers are {_span(indices)}"
            )
        if len(self.rows) != len(indices):
            raise ValueError(f"{self.source} allocates {len(self.rows)} layers, but the model has {len(indices)} MoE "
                             "layers")
        routed, shared = self._split(moe)
        _check_widths(self.source, routed, 0)
        down = None if self.down is None else self._of_down(self.down, routed)
        if shared_bits is not None:
            shared = None
        elif shared is not None:
            _check_widths(self.source, shared, 1)
        found = Allocation(
            bits=routed, shared_bits=shared, budget=math.nan, objective=math.nan, gap=math.nan, seconds=0.0,
            solver="file", shared_multiple=0.0 if shared is None else moe.shared_multiple, down_bits=down,
        )
        mean = found.bits_per_expert
        if budget is not None and mean > budget + BUDGET_SLACK:
            raise ValueError(f"{self.source} takes {mean:.6g} bits per expert, more than the budget of {budget:g}")
        return replace(found, budget=mean if self.budget is None else float(self.budget))

    def _of_down(self, rows: tuple[tuple[int, ...], ...], routed: np.ndarray) -> np.ndarray:
        """Widths of the down projections ``[L, E]``."""
        counts = [len(row) for row in rows]
        if counts != [routed.shape[1]] * len(routed):
            raise ValueError(f"{self.source} has other layers or experts in down_bits than in expert_bits")
        down = np.asarray(rows, dtype=np.int64)
        _check_widths(self.source, down, 0)
        return down

    def _split(self, moe: MoeModel) -> tuple[np.ndarray, np.ndarray | None]:
        """Routed widths ``[L, E]`` and those of the shared experts ``[L]``, if any."""
        experts, has_shared = moe.num_experts, moe.moe[0].shared is not None
        lengths = {len(row) for row in self.rows}
        extra = experts + 1 if has_shared and self.shared is None else experts
        if not lengths <= {experts, extra} or len(lengths) != 1:
            allowed = f"{experts}" if extra == experts else f"{experts} routed experts, or {extra} with the shared one,"
            raise ValueError(f"{self.source} has {_span(tuple(sorted(lengths)))} widths a layer, the model {allowed}")
        table = np.asarray(self.rows, dtype=np.int64)
        if self.shared is not None:
            if not has_shared:
                raise ValueError(f"{self.source} has widths for shared experts, but the model has none")
            if len(self.shared) != len(self.rows):
                raise ValueError(f"{self.source} has {len(self.shared)} shared widths for {len(self.rows)} layers")
            return table, np.asarray(self.shared, dtype=np.int64)
        return (table[:, :experts], table[:, experts]) if table.shape[1] > experts else (table, None)


def _check_widths(source: str, widths: np.ndarray, low: int) -> None:
    allowed = (widths >= low) & (widths <= MAX_BITS)
    if low:
        allowed |= widths == UNQUANTIZED
    if not allowed.all():
        kind = "a shared expert" if low else "an expert"
        raise ValueError(f"{source} gives {kind} {int(widths[~allowed].flat[0])} bits; allowed are {low}..{MAX_BITS}"
                         + (f" and {UNQUANTIZED}" if low else ""))


def _span(values: tuple[int, ...]) -> str:
    """Write consecutive values as ``0..31``, others as a list."""
    if len(values) > 2 and values == tuple(range(values[0], values[-1] + 1)):
        return f"{values[0]}..{values[-1]}"
    return ", ".join(map(str, values[:12])) + (" and more" if len(values) > 12 else "")
