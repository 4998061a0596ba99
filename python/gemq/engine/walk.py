"""Walk over the decoder layers with one of them in memory, and continue where the files of a stage end.

What a layer's work gave is a sealed file; activations between layers are scratch arrays. Where a file or an array is
missing or torn, the walk starts at the last sound array before it and runs finished layers again without repeating
their work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gemq import distributed
from gemq.algorithms.layer_report import LayerReport
from gemq.algorithms.matrices import Quantizer
from gemq.engine.journal import Stage
from gemq.engine.layers import Calls, Weights, embed, forward
from gemq.engine.scratch import Scratch
from gemq.engine.source import Source

Progress = Callable[[int, int], None]
Log = Callable[..., None]
OnLayer = Callable[[LayerReport], None]


@dataclass(frozen=True)
class Sweep:
    """Inputs of a walk over the layers: token windows ``[N, T]``, windows per batch, the stage's files, callbacks for
    progress and log, and the bytes that a group of experts may take beside its layer. ``on_layer`` is called after each
    quantized layer, ``quantizer`` quantizes experts in place of GPTQ."""

    windows: Tensor
    batch_size: int
    stage: Stage
    progress: Progress
    log: Log
    budget: int
    on_layer: OnLayer | None = None
    quantizer: Quantizer | None = None

    def scratch(self) -> Scratch:
        """The stage's arrays."""
        return Scratch(self.stage.scratch)


def group_budget(source: Source) -> int:
    """Bytes for a group of experts' Hessians and copies: half the largest layer in 16 bits."""
    return source.layer_bytes() // 2


class Walk:
    """Inputs of decoder layers as arrays ``inputs-0 ...``, made as they are needed; walks of different ``weights`` in
    one stage have different prefixes."""

    def __init__(self, weights: Weights, sweep: Sweep, prefix: str = ""):
        self.weights, self.scratch, self._prefix = weights, sweep.scratch(), prefix
        self.calls: Calls = embed(weights, sweep.windows, sweep.batch_size, self.scratch, self.name(0))

    def name(self, index: int) -> str:
        """The array of the inputs of layer ``index``."""
        return f"{self._prefix}inputs-{index}"

    def sound(self, index: int) -> bool:
        """Return True if the inputs of layer ``index`` are there."""
        return self.everywhere(self.name(index))

    def everywhere(self, array: str) -> bool:
        """Return True if every process has its part of an array."""
        return all(distributed.gather(self.scratch.sound(array)))

    def forward(self, index: int) -> None:
        """Run loaded layer ``index`` for the next one's inputs."""
        forward(self.weights, self.calls, index, self.scratch, self.name(index), self.name(index + 1))

    def need(self, index: int, done: Progress | None = None) -> None:
        """Make ``inputs-<index>``, from the last sound array before it."""
        have = next(i for i in range(index, -1, -1) if self.sound(i))
        for layer in range(have, index):
            with self.weights.loaded(layer):
                self.forward(layer)
            if done:
                done(layer + 1, index)
