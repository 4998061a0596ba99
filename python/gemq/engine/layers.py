"""Run one decoder layer forwards or backwards, and record the inputs of its experts.

The weights are the full-precision ones of a :class:`gemq.engine.source.Source`, or quantized ones and tuned routers
in their place (:class:`Weights`). Of several processes each runs its own batches; what the experts saw is everyone's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from gemq import distributed
from gemq.algorithms.layerwise import Routed, capture_layer_calls, run_layer, watch_experts
from gemq.algorithms.perplexity import token_losses
from gemq.engine.layer_records import LayerRecord, lay_over
from gemq.engine.scratch import Scratch
from gemq.engine.shared_share import SharedShare
from gemq.engine.source import OUTSIDE, Source, put, return_memory
from gemq.models import MoeLayer, MoeModel, describe, empty_twin
from gemq.models.weighted_inputs import takes_inputs_alone
from gemq.nn.experts import PROJECTIONS
from gemq.packed_model import kept_in_float32

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Weights:
    """Model with one unit at a time in memory: the weights of ``source``, or the units that ``quantized`` finds, with
    ``routers [E, H]`` by layer."""

    source: Source
    quantized: Callable[[int], LayerRecord] | None = None
    routers: dict[int, Tensor] = field(default_factory=dict)

    @contextmanager
    def loaded(self, unit: int) -> Iterator[None]:
        """Load the unit's weights for the duration of the block."""
        record = self.quantized(unit) if self.quantized is not None else None
        self.source.load(unit, record.modules if record else ())
        if record:
            lay_over(record, self.source, unit)
        put_routers(self.source, self.routers, unit)
        try:
            yield
        finally:
            self.source.drop(unit)

    @torch.no_grad()
    def write_to(self, model: PreTrainedModel) -> None:
        """Write all weights into a plain ``model`` of the same architecture, quantized ones dequantized."""
        moe = self.source.moe
        stacks = {path: (m, name) for m in moe.moe for path, name in m.stacks().items()}
        for unit in range(OUTSIDE, len(moe.layers)):
            with self.loaded(unit):
                for name in self.source.names(unit):
                    target = model.get_parameter_or_buffer(name)
                    if name in stacks:
                        layer, projection = stacks[name]
                        stack = self.source.experts[layer.index][PROJECTIONS.index(projection)]
                        for expert in range(len(target)):
                            target[expert].copy_(layer.form.as_stored(projection, stack[expert]))
                    else:
                        target.copy_(self.source.model.get_parameter_or_buffer(name))

    def whole(self) -> MoeModel:
        """A plain model with all of these weights in memory."""
        source = self.source
        model = empty_twin(source.model).to(source.dtype).to_empty(device=source.device)
        for name in kept_in_float32(model):
            tensor = model.get_parameter_or_buffer(name)
            tensor.data = tensor.data.float()
        stored = set(model.state_dict())
        for name, buffer in source.model.named_buffers():
            if name not in stored:
                put(model, name, buffer.clone())
        model.tie_weights()
        self.write_to(model)
        model.generation_config = source.model.generation_config
        return describe(model.eval().requires_grad_(False))


def put_routers(source: Source, routers: dict[int, Tensor], index: int) -> None:
    """Replace the router of a loaded layer by that of ``routers``, if there is one."""
    layer = source.moe.moe_at(index)
    if layer is not None and index in routers:
        router: Any = layer.router
        weight = router.weight
        source.put(f"{layer.router_path}.weight", routers[index].to(weight.device, weight.dtype))


@dataclass
class Calls:
    """Arguments with which the model calls its decoder layers. ``batches`` are this process's windows ``[B, T]``,
    ``rounds`` is the number of batches of the process that has the most. ``kwargs`` holds every layer's keyword
    arguments per batch size; they depend on nothing else, because windows have one length and no padding."""

    batches: list[Tensor]
    rounds: int
    kwargs: dict[int, list[dict[str, Any]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.batches)

    def run(self, source: Source, index: int, hidden: Tensor) -> Tensor:
        """Run decoder layer ``index``, which is loaded, on ``hidden [B, T, H]``."""
        return run_layer(source.moe.layers[index], hidden, self.kwargs[len(hidden)][index])


@torch.no_grad()
def embed(weights: Weights, windows: Tensor, batch_size: int, scratch: Scratch, name: str) -> Calls:
    """Write the first layer's inputs as array ``name`` unless it is there, and note how layers are called."""
    calls = Calls(distributed.batches(windows, batch_size), distributed.rounds(windows, batch_size))
    with weights.loaded(OUTSIDE):
        for ids in {len(ids): ids for ids in calls.batches}.values():
            calls.kwargs[len(ids)] = capture_layer_calls(weights.source.moe, [ids]).kwargs[0]
        if not scratch.sound(name):
            with scratch.writing(name, True) as out:
                for ids in calls.batches:
                    out.append(capture_layer_calls(weights.source.moe, [ids]).hidden[0])
    return calls


@torch.no_grad()
def forward(weights: Weights, calls: Calls, index: int, scratch: Scratch, source: str, target: str) -> None:
    """Run a loaded layer over array ``source`` and write ``target``."""
    with scratch.writing(target, True) as out:
        for batch in range(len(calls)):
            hidden = scratch.batch(source, batch).to(weights.source.device)
            out.append(calls.run(weights.source, index, hidden))


_ROUTED = ("x", "ids", "weights")
SHARED, SHARED_GRADIENT = "shared", "shared_gradient"


class StoredRows:
    """Rows ``[T, H]`` of one batch of a scratch array; an index or a slice gives what it selects, on ``device``. An
    expert sees few of a layer's tokens, and experts are taken a few at a time: only their rows are read."""

    def __init__(self, scratch: Scratch, name: str, batch: int, length: int, device: torch.device):
        self._scratch, self._name, self._batch, self._length = scratch, name, batch, length
        self._device = device

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, which: Tensor | slice) -> Tensor:
        which = which if isinstance(which, slice) else which.cpu()
        return self._scratch.rows(self._name, self._batch, which).to(self._device)


class Trace:
    """Recorded arguments of the experts of a layer, batch by batch of all processes, in scratch arrays. With
    ``gradients`` it also holds ``gradient``, ``d loss / d output [T, H]`` of the experts; that of the shared expert is
    ``shared_share`` times as large. ``of_shared`` names what is recorded at the shared expert itself: ``shared``, its
    inputs, and ``shared_gradient``. Inputs and gradients are :class:`StoredRows`."""

    def __init__(
        self, scratch: Scratch, device: torch.device, calls: Calls, gradients: bool, of_shared: tuple[str, ...] = ()
    ):
        self.scratch, self.device, self.batches = scratch, device, len(calls)
        self.shared_share = 1.0
        self._names = [*_ROUTED, *(["gradient"] if gradients else []), *of_shared]
        self._prefix = "trace"

    def arrays(self) -> dict[str, str]:
        """The scratch array of each thing that is recorded."""
        return {name: f"{self._prefix}-{name}" for name in self._names}

    def __iter__(self) -> Iterator[tuple[Routed, StoredRows | None]]:
        arrays = self.arrays()
        for batch in range(self.batches):
            ids, weights = (
                self.scratch.rows(arrays[name], batch, slice(None)).to(self.device) for name in ("ids", "weights")
            )
            # they are indexed as tensors would be
            rows: dict[str, Any] = {
                name: StoredRows(self.scratch, array, batch, len(ids), self.device) for name, array in arrays.items()
            }
            own = (rows.get(name) for name in (SHARED, SHARED_GRADIENT))
            yield Routed(rows["x"], ids, weights, *own), rows.get("gradient")

    def _batch(self, batch: int) -> dict[str, Tensor]:
        return {name: self.scratch.batch(array, batch).to(self.device) for name, array in self.arrays().items()}

    def complete(self, rounds: int) -> None:
        """Collect the batches of all processes, in their order; with one process it does nothing."""
        if distributed.world().size == 1:
            return
        everyones = {name: f"everyones-{name}" for name in self._names}
        count = 0
        with ExitStack() as stack:
            out = {name: stack.enter_context(self.scratch.writing(array)) for name, array in everyones.items()}
            for turn in range(rounds):
                mine = self._batch(turn) if turn < self.batches else None
                for tensors in distributed.exchange(mine, self.device):
                    count += 1
                    for name, value in tensors.items():
                        out[name].append(value)
        self.drop()
        self._prefix, self.batches = "everyones", count

    def drop(self) -> None:
        """Delete the trace's arrays."""
        for array in self.arrays().values():
            self.scratch.drop(array)


def _of_shared(layer: MoeLayer) -> tuple[str, ...]:
    """Name what is recorded at the shared expert itself, as the calls of the routed ones do not tell it."""
    if layer.shared is None:
        return ()
    if layer.latent:
        return SHARED, SHARED_GRADIENT
    # a block that weights its experts' inputs gives the shared one others
    return (SHARED,) if takes_inputs_alone(layer.experts) else ()


@contextmanager
def recording(
    layer: MoeLayer, scratch: Scratch, device: torch.device, calls: Calls, gradients: bool = False
) -> Iterator[Trace]:
    """Record every call of the layer's experts inside the block; with ``gradients`` also what flows back. The trace
    can be read after it."""
    trace = Trace(scratch, device, calls, gradients, _of_shared(layer) if gradients else ())
    with ExitStack() as stack:
        out = {name: stack.enter_context(scratch.writing(array)) for name, array in trace.arrays().items()}

        shares = SharedShare(layer, trace)
        if gradients and shares.needed:
            stack.callback(cast(nn.Module, layer.shared).register_forward_hook(shares.called).remove)

        def shared_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            out[SHARED].append(args[0].detach().flatten(0, -2))

        def shared_output(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(lambda g: out[SHARED_GRADIENT].append(g.flatten(0, -2)))

        if SHARED in out:
            stack.callback(cast(nn.Module, layer.shared).register_forward_pre_hook(shared_input).remove)
        if SHARED_GRADIENT in out:
            stack.callback(cast(nn.Module, layer.shared).register_forward_hook(shared_output).remove)

        def gradient(g: Tensor) -> None:
            out["gradient"].append(g)
            if shares.needed:
                shares.add("routed", g)

        def seen(routed: Routed, output: Tensor) -> None:
            for name, value in routed.tensors().items():
                out[name].append(value)
            if gradients:
                output.register_hook(gradient)

        stack.enter_context(watch_experts(layer, seen))
        yield trace
    # return the memory that the passes freed
    return_memory()
    trace.complete(calls.rounds)


def head_gradients(weights: Weights, calls: Calls, scratch: Scratch, source: str, target: str) -> None:
    """The gradient of the sum of the windows' mean losses at the last layer's output, array ``target``; one window at a
    time, as logits are large."""
    with weights.loaded(OUTSIDE), scratch.writing(target, True) as out:
        for batch in range(len(calls)):
            rows = [
                head_gradient(weights.source.moe, ids[None], hidden[None].to(weights.source.device))[1]
                for hidden, ids in zip(scratch.batch(source, batch), calls.batches[batch], strict=True)
            ]
            out.append(torch.cat(rows))


def head_gradient(moe: MoeModel, window: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The mean loss of a window ``[1, T]``, and its gradient at the last layer's output ``hidden [1, T, H]``.

    The whole model runs with its decoder layers handing that output through, so whatever a family does between the
    last layer and its logits is in.
    """
    last = hidden.requires_grad_(True)
    with torch.enable_grad(), _handing_through(moe.layers, last):
        loss = token_losses(moe.model, window).mean()
        (gradient,) = torch.autograd.grad(loss, last)
    return loss.detach(), gradient


@contextmanager
def _handing_through(layers: list[nn.Module], hidden: Tensor) -> Iterator[None]:
    for layer in layers:
        layer.forward = lambda hidden_states, *args, **kwargs: hidden
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
