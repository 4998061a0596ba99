"""Widths of a whole model: the bits of every expert, shared expert and linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from gemq.format import UNQUANTIZED, by_weight, mean_width


@dataclass(frozen=True)
class Widths:
    """Bits by decoder layer index for experts, and one width each for the rest; 16 leaves a linear as it is.

    ``experts`` holds the widths of a layer's routed experts. ``down`` holds those of their down projections, by layer
    as ``experts``, where they are others. ``shared`` is the width of a layer's merged shared expert. ``linears`` are
    exceptions by module path. Routers keep their module and dtype: ``router`` below 16 says on which grid their values
    lie. ``head`` and ``embedding`` are the ends, of one width where they are one matrix.
    """

    experts: dict[int, list[int]]
    shared: dict[int, int] = field(default_factory=dict)
    attention: int = UNQUANTIZED
    dense: int = UNQUANTIZED
    router: int = UNQUANTIZED
    linears: dict[str, int] = field(default_factory=dict)
    down: dict[int, list[int]] = field(default_factory=dict)
    head: int = UNQUANTIZED
    embedding: int = UNQUANTIZED

    def of_experts(self, layer: int) -> tuple[list[int], list[int]]:
        """Widths of the experts of a decoder layer: of gate and up, and of down."""
        return self.experts[layer], self.down.get(layer, self.experts[layer])

    def mean(self, layer: int) -> float | None:
        """Mean width of the routed experts of a decoder layer; None if it has none."""
        return mean_width(*self.of_experts(layer)) if layer in self.experts else None

    @property
    def weight_bits(self) -> list[int]:
        """Widths of the routed experts, each as often as :func:`gemq.format.by_weight` counts it."""
        return [b for layer in self.experts for b in by_weight(*self.of_experts(layer))]

    @property
    def bits_per_expert(self) -> float:
        """Mean width of the routed experts' weights."""
        found = self.weight_bits
        return sum(found) / len(found)

    def overridden(self, experts: Mapping[tuple[int, int], int], linears: Mapping[str, int]) -> Widths:
        """Return these widths with others for some experts, by ``(decoder layer, expert)``, and linears, by path."""
        rows, down = (
            {i: [experts.get((i, e), bits) for e, bits in enumerate(row)] for i, row in given.items()}
            for given in (self.experts, self.down)
        )
        return replace(self, experts=rows, down={} if down == rows else down, linears=self.linears | dict(linears))
