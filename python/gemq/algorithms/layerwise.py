"""Run a model decoder layer by decoder layer, and record the inputs of its linears and experts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gemq.activation import SILU, Inner
from gemq.errors import CheckpointError, GemqError, first_line
from gemq.models import MoeLayer, MoeModel
from gemq.models.forward import call
from gemq.models.weighted_inputs import routed_rows


@dataclass
class LayerCalls:
    """The input of the first decoder layer and every layer's keyword arguments, per batch."""

    hidden: list[Tensor] = field(default_factory=list)
    kwargs: list[list[dict[str, Any]]] = field(default_factory=list)


@contextmanager
def _recording(moe: MoeModel, calls: LayerCalls) -> Iterator[None]:
    # what a layer takes besides its input, some of which a family's model gives by position
    names = list(inspect.signature(type(moe.layers[0]).forward).parameters)[2:]

    def record(index: int) -> Callable:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            kwargs |= dict(zip(names, args, strict=False))
            if index == 0:
                calls.hidden.append(hidden_states.detach())
                calls.kwargs.append([])
            calls.kwargs[-1].append(kwargs)
            return hidden_states

        return forward

    for index, layer in enumerate(moe.layers):
        layer.forward = record(index)
    try:
        yield
    finally:
        for layer in moe.layers:
            del layer.forward


@torch.no_grad()
def capture_layer_calls(moe: MoeModel, batches: list[Tensor]) -> LayerCalls:
    """Run only the embeddings and note how the model would call each decoder layer (no layer is executed), for each
    of ``batches``, int64 ``[B, T]``. Raises :class:`CheckpointError` where the family's own code fails, as it does for
    a config whose fields do not fit together."""
    calls = LayerCalls()
    device = next(moe.model.parameters()).device
    with _recording(moe, calls):
        for batch in batches:
            try:
                call(moe.decoder, input_ids=batch.to(device), use_cache=False)
            except (GemqError, MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise CheckpointError(
                    f"the forward pass of {type(moe.model).__name__} fails: {type(error).__name__}: {first_line(error)}"
                ) from error
    return calls


def run_layer(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """One decoder layer on ``hidden [B, T, H]``."""
    out = layer(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


class Hessian:
    """Sum of ``x x'`` over calibration tokens."""

    def __init__(self, size: int, device: torch.device):
        self.value = torch.zeros(size, size, device=device)
        self.tokens = 0

    def add(self, x: Tensor) -> None:
        x = x.reshape(-1, x.shape[-1]).float()
        self.value.addmm_(x.T, x)
        self.tokens += len(x)


@dataclass
class Routed:
    """Arguments of a call of a layer's experts: ``x [T, H]``, ``ids [T, k]``, ``weights [T, k]``; ``shared`` are the
    inputs of the shared expert, where those are others, and ``shared_gradient`` is what flows back to its output, where
    that is of another width than the experts'."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    shared: Tensor | None = None
    shared_gradient: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, for the exchange between processes."""
        return {"x": self.x, "ids": self.ids, "weights": self.weights}

    def rows(self, expert: int) -> tuple[Tensor, Tensor]:
        """Inputs ``[t, H]`` of the tokens routed to ``expert`` and their indices ``[t]``."""
        token = torch.where((self.ids == expert).any(-1))[0]
        return self.x[token], token

    def weight_of(self, expert: int, token: Tensor) -> Tensor:
        """Routing weights ``[t, 1]`` of ``expert`` for the given tokens."""
        return (self.weights[token] * (self.ids[token] == expert)).sum(-1, keepdim=True)


@contextmanager
def watch_experts(layer: MoeLayer, seen: Callable[[Routed, Tensor], None]) -> Iterator[None]:
    """Call ``seen(arguments, output)`` after every call of the layer's experts, by ids or with all their inputs."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        names = ("hidden_states", "top_k_index", "top_k_weights")
        if len(args) + len(kwargs) == 1:
            (inputs,) = (*args, *kwargs.values())
            seen(Routed(*routed_rows(inputs.detach(), layer.form.experts)), output)
            return
        values = [*args, *(kwargs[n] for n in names[len(args) :])]
        seen(Routed(*(v.detach() for v in values)), output)

    handle = layer.experts.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def expert_hidden(gate_up: Tensor, x: Tensor, inner: Inner = SILU) -> Tensor:
    """Inner activations of one expert, ``SiLU(gate(x)) * up(x)`` or others: ``gate_up [R, H]``, ``x [t, H] -> [t, I]``.
    """
    return inner(x @ gate_up.T)
