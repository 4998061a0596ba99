"""What a sweep does to one decoder layer: run it, run it backwards, watch its experts; and how the layers are called.

The weights are the full-precision ones of a :class:`gemq.engine.source.Source`, or those with quantized layers and
tuned routers laid over them (:class:`Weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gemq.algorithms.layerwise import Routed, capture_layer_calls, run_layer, watch_experts
from gemq.engine.scratch import Scratch
from gemq.engine.source import OUTSIDE, Source
from gemq.models import MoeLayer

# puts the weights of quantized layer `index` into the loaded full-precision one
Overlay = Callable[[int], None]


@dataclass
class Weights:
    """A model of which one unit at a time is in memory: ``source``, with ``overlay`` put over each loaded layer."""

    source: Source
    overlay: Overlay | None = None

    @contextmanager
    def loaded(self, unit: int, original: bool = False) -> Iterator[None]:
        """The unit's weights are there inside the block; ``original``: without the overlay."""
        self.source.load(unit)
        if self.overlay is not None and unit != OUTSIDE and not original:
            self.overlay(unit)
        try:
            yield
        finally:
            self.source.drop(unit)


@dataclass
class Calls:
    """How the model calls its decoder layers: windows ``[N, T]`` in batches, and per batch size every layer's keyword
    arguments, which depend on nothing else (windows are of one length, without padding)."""

    windows: Tensor
    batch_size: int
    kwargs: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return -(-len(self.windows) // self.batch_size)

    def ids(self, batch: int) -> Tensor:
        """Token ids of a batch."""
        return self.windows[batch * self.batch_size : (batch + 1) * self.batch_size]

    def run(self, source: Source, index: int, hidden: Tensor) -> Tensor:
        """Decoder layer ``index``, which is loaded, on ``hidden [B, T, H]``."""
        return run_layer(source.moe.layers[index], hidden, self.kwargs[len(hidden)][index])


@torch.no_grad()
def embed(weights: Weights, windows: Tensor, batch_size: int, scratch: Scratch, name: str) -> Calls:
    """Write the first layer's inputs as array ``name`` unless it is there, and note how layers are called."""
    calls = Calls(windows, batch_size)
    with weights.loaded(OUTSIDE):
        for batch in sorted({len(calls.ids(b)): b for b in range(len(calls))}.values()):
            ids = calls.ids(batch)
            calls.kwargs[len(ids)] = capture_layer_calls(weights.source.moe, ids, len(ids)).kwargs[0]
        if not scratch.sound(name):
            with scratch.writing(name, True) as out:
                for batch in range(len(calls)):
                    ids = calls.ids(batch)
                    out.append(capture_layer_calls(weights.source.moe, ids, len(ids)).hidden[0])
    return calls


@torch.no_grad()
def forward(weights: Weights, calls: Calls, index: int, scratch: Scratch, source: str, target: str) -> None:
    """Run a loaded layer over array ``source`` and write ``target``."""
    with scratch.writing(target, True) as out:
        for batch in range(len(calls)):
            hidden = scratch.batch(source, batch).to(weights.source.device)
            out.append(calls.run(weights.source, index, hidden))


class Trace:
    """What the experts of a layer were called with, batch by batch, in scratch arrays; ``gradient`` if it was asked
    for, ``d loss / d output [T, H]`` of the experts."""

    def __init__(self, scratch: Scratch, device: torch.device, batches: int, gradients: bool):
        self.scratch, self.device, self.batches, self.gradients = scratch, device, batches, gradients

    def __iter__(self) -> Iterator[tuple[Routed, Tensor | None]]:
        for batch in range(self.batches):
            routed = Routed(*(self._read(name, batch) for name in ("trace-x", "trace-ids", "trace-weights")))
            yield routed, self._read("trace-gradient", batch) if self.gradients else None

    def _read(self, name: str, batch: int) -> Tensor:
        return self.scratch.batch(name, batch).to(self.device)

    def drop(self) -> None:
        """Forget it."""
        for name in ("trace-x", "trace-ids", "trace-weights", "trace-gradient"):
            self.scratch.drop(name)


@contextmanager
def recording(
    layer: MoeLayer, scratch: Scratch, device: torch.device, batches: int, gradients: bool = False
) -> Iterator[Trace]:
    """Record every call of the layer's experts inside the block; with ``gradients`` also what flows back."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        names = ["trace-x", "trace-ids", "trace-weights", *(["trace-gradient"] if gradients else [])]
        out = {name: stack.enter_context(scratch.writing(name)) for name in names}

        def seen(routed: Routed, output: Tensor) -> None:
            for name, value in zip(names[:3], (routed.x, routed.ids, routed.weights), strict=True):
                out[name].append(value)
            if gradients:
                output.register_hook(lambda g: out["trace-gradient"].append(g))

        stack.enter_context(watch_experts(layer, seen))
        yield Trace(scratch, device, batches, gradients)


def head_gradients(weights: Weights, calls: Calls, scratch: Scratch, source: str, target: str) -> None:
    """The gradient of the sum of the windows' mean losses at the last layer's output, array ``target``.

    The whole model runs with its decoder layers handing that output through, so whatever a family does between the
    last layer and its logits is in. One window at a time: logits are large.
    """
    model, moe = weights.source.model, weights.source.moe
    handed: list[Tensor] = []
    with weights.loaded(OUTSIDE), _handing_through(moe.layers, handed), scratch.writing(target, True) as out:
        for batch in range(len(calls)):
            rows = []
            for hidden, ids in zip(scratch.batch(source, batch), calls.ids(batch), strict=True):
                last, ids = hidden[None].to(weights.source.device).requires_grad_(True), ids[None].to(
                    weights.source.device
                )
                handed[:] = [last]
                with torch.enable_grad():
                    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                    loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
                    rows.append(torch.autograd.grad(loss, last)[0])
            out.append(torch.cat(rows))


@contextmanager
def _handing_through(layers: list[nn.Module], handed: list[Tensor]) -> Iterator[None]:
    for layer in layers:
        layer.forward = lambda hidden_states, **kwargs: handed[0]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def backward(
    weights: Weights, calls: Calls, index: int, scratch: Scratch, source: str, gradient: str, target: str
) -> None:
    """Recompute a loaded layer from its inputs ``source`` and carry array ``gradient``, at its output, to its input.

    Watch the experts with :func:`recording` around it.
    """
    device = weights.source.device
    with scratch.writing(target, True) as out:
        for batch in range(len(calls)):
            hidden = scratch.batch(source, batch).to(device).requires_grad_(True)
            with torch.enable_grad():
                output = calls.run(weights.source, index, hidden)
            out.append(torch.autograd.grad(output, hidden, scratch.batch(gradient, batch).to(device))[0])
