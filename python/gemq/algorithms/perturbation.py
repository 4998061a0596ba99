"""Quantize experts for their costs: at every candidate width at once, as they will be, or by rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gemq.activation import SILU, Inner
from gemq.algorithms.gptq import GptqConfig, gptq_at_widths
from gemq.algorithms.layerwise import Hessian, expert_hidden
from gemq.format import default_group_size
from gemq.reference.grid import dequantize_codes, round_to_nearest

PERTURBATIONS = ("gptq", "rtn")
# batch by batch the inputs [t, H] of each expert of a group, and what they are multiplied with in its Hessians
ScaledRows = Iterable[list[tuple[Tensor, Tensor | float]]]


def hessians_of(
    weights: Tensor, rows: ScaledRows, intermediate: int, second: bool = True, inner: Sequence[Inner] | None = None
) -> list[tuple[Hessian, Hessian]]:
    """Compute the Hessians of both projections of some experts ``weights [G, 2I, H]``, or of the first alone.

    ``inner`` are the experts' activations, SiLU by default.

    Batches are summed in order, so the sums equal those of a hook that sees batch by batch.
    """
    device, hidden = weights.device, weights.shape[-1]
    found = [(Hessian(hidden, device), Hessian(intermediate if second else 0, device)) for _ in weights]
    acts = inner or [SILU] * len(weights)
    for batch in rows:
        for (inputs, hidden_inputs), gate_up, act, (x, scale) in zip(found, weights, acts, batch, strict=True):
            if len(x):
                inputs.add(x * scale)
                if second:
                    hidden_inputs.add(expert_hidden(gate_up, x, act) * scale)
    return found


@dataclass(frozen=True)
class Perturbation:
    """Method by which an expert is quantized when its cost is measured.

    ``gptq`` is GPTQ with ``config`` on the expert's own inputs, without the steps that follow the column loop.
    Refinement, compensation and rescaling are skipped: they are too slow for their effect on costs. ``rtn`` rounds to
    nearest with no clipping, as the paper's scripts do.
    """

    kind: str = "gptq"
    config: GptqConfig = field(default_factory=GptqConfig)

    def __post_init__(self) -> None:
        if self.kind not in PERTURBATIONS:
            raise ValueError(f"perturbation must be one of {', '.join(PERTURBATIONS)}, got {self.kind!r}")

    def experts(
        self, gate_up: Tensor, down: Tensor, widths: list[int], rows: Callable[[], Iterable[list[Tensor]]],
        inner: Sequence[Inner] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Quantize experts ``gate_up [G, 2I, H]`` and ``down [G, H, I]`` to every width above 0 and back.

        ``rows()`` gives their inputs ``[t, H]``, batch by batch, ``inner`` are their activations (SiLU). Returns both
        projections by width, dequantized.
        """
        hessians: list[tuple[Hessian, Hessian]] = []
        if self.kind == "gptq" and widths:
            batches: ScaledRows = ([(x, 1.0) for x in batch] for batch in rows())
            hessians = hessians_of(gate_up, batches, down.shape[-1], inner=inner)
        first, second = ([pair[which] for pair in hessians] for which in range(2))
        return self._at_widths(gate_up, first, widths), self._at_widths(down, second, widths)

    def _at_widths(self, weight: Tensor, hessians: list[Hessian], widths: list[int]) -> list[Tensor]:
        """``weight [G, n, k]`` quantized to every width above 0 and back."""
        size = default_group_size(weight.shape[-1], self.config.group_size)
        if self.kind == "rtn":
            return [dequantize_codes(*round_to_nearest(weight, b, size), dtype=weight.dtype) for b in widths]
        if not widths:
            return []
        hessian, tokens = torch.stack([h.value for h in hessians]), [h.tokens for h in hessians]
        found = gptq_at_widths(weight, hessian, widths, tokens, self.config, size)
        return [w.to(weight.dtype) for w in found]

    def expert(
        self, gate_up: Tensor, down: Tensor, candidates: tuple[int, ...], inputs: list[Tensor], inner: Inner = SILU
    ) -> list[tuple[Tensor, Tensor]]:
        """Quantize one expert, ``[2I, H]`` and ``[H, I]``, at every candidate; at 0 bits it is zero. ``inputs [t, H]``
        calibrate it, batch by batch."""
        kept = [b for b in candidates if b]
        pairs = self.experts(gate_up[None], down[None], kept, lambda: ([x] for x in inputs), [inner])
        found = {b: (one[0], two[0]) for b, one, two in zip(kept, *pairs, strict=True)}
        nothing = (torch.zeros_like(gate_up), torch.zeros_like(down))
        return [found.get(b, nothing) for b in candidates]
