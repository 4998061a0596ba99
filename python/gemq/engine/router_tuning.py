"""Tune the routers of a packed model of which one decoder layer at a time is in memory.

A step runs the layers forward, keeping their inputs, and again backward, recomputing each. A layer is read packed, laid
out for the device's kernels, and forgotten; the backward pass unpacks one expert at a time. Resident are embeddings and
head, the routers with float32 masters and AdamW's moments, which are written down as the tuning goes, and a step's
layer inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemq.algorithms.layerwise import capture_layer_calls, run_layer
from gemq.algorithms.router_tuning import RouterTuningConfig, TuningState, tune_routers
from gemq.engine.journal import Stage
from gemq.engine.layer_records import lay_over
from gemq.engine.layers import head_gradient
from gemq.engine.quantize import Quantized
from gemq.engine.source import OUTSIDE, Source
from gemq.engine.walk import Log, Progress
from gemq.models import replace_with_packed
from gemq.ops import set_cpu_activations


@dataclass(frozen=True)
class Tuned:
    """Router weights by decoder layer, on the CPU, and the loss of every step."""

    routers: dict[int, Tensor]
    losses: list[float]


class _PackedLayers:
    """The packed model: ``source``, a skeleton of its own, with the layers of ``quantized`` put in as they run."""

    def __init__(self, source: Source, quantized: Quantized):
        self.source, self.quantized, self.moe = source, quantized, source.moe
        self.first = min(layer.index for layer in self.moe.moe)
        ends = quantized.record(OUTSIDE)
        source.load(OUTSIDE, ends.modules)
        lay_over(ends, source, OUTSIDE)
        source.hold([f"{layer.router_path}.weight" for layer in self.moe.moe])

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Load layer ``index`` for the duration of the block."""
        source, modules = self.source, self.quantized.record(index).modules
        source.load(index, modules)
        dense = {path: source.model.get_submodule(path) for path in modules}
        for path, module in modules.items():
            for name, value in dense[path].named_parameters(recurse=False):
                if name.endswith("bias"):
                    setattr(module, name, nn.Parameter(value.detach().clone(), requires_grad=False))
            module.to(source.device)
            module.prepare()
        replace_with_packed(source.model, modules)
        try:
            yield self.moe.layers[index]
        finally:
            replace_with_packed(source.model, dense)
            source.drop(index)

    def gradients(self, windows: list[Tensor]) -> list[dict[str, Tensor]]:
        """Compute the mean loss of each window ``[1, T]`` and its gradients with respect to the routers."""
        if not windows:
            return []
        calls = capture_layer_calls(self.moe, windows)
        inputs = [calls.hidden]
        for index in range(len(self.moe.layers)):
            with self.loaded(index) as layer, torch.no_grad():
                inputs.append([
                    run_layer(layer, h, kw[index]) for h, kw in zip(inputs[index], calls.kwargs, strict=True)
                ])
        found, flowing = [], []
        for window, hidden in zip(windows, inputs.pop(), strict=True):
            loss, gradient = head_gradient(self.moe, window, hidden)
            found.append({"loss": loss})
            flowing.append(gradient)
        numbers = {layer.index: number for number, layer in enumerate(self.moe.moe)}
        for index in range(len(self.moe.layers) - 1, self.first - 1, -1):
            with self.loaded(index) as layer:
                for at, hidden in enumerate(inputs.pop()):
                    flowing[at], own = self._back(index, layer, hidden, calls.kwargs[at][index], flowing[at])
                    if own is not None:
                        found[at][str(numbers[index])] = own
        return found

    def _back(
        self, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict, gradient: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        moe = self.moe.moe_at(index)
        router: Any = None if moe is None else moe.router.weight
        hidden.requires_grad_(True)
        with torch.enable_grad():
            output = run_layer(layer, hidden, kwargs)
            wanted = [hidden] if router is None else [hidden, router]
            found = torch.autograd.grad(output, wanted, gradient)
        return found[0], found[1] if router is not None else None


@contextmanager
def _exact_activations() -> Iterator[None]:
    before = set_cpu_activations("exact")
    try:
        yield
    finally:
        set_cpu_activations(before)


def tune_packed(
    source: Source, quantized: Quantized, windows: Tensor, config: RouterTuningConfig, stage: Stage,
    progress: Progress, log: Log = lambda **event: None, every: int = 16,
) -> Tuned:
    """Tune the routers on ``windows`` int64 ``[N, T]``, starting from the full-precision ones.

    ``source`` is a skeleton of its own, which is changed. The state is written after each ``every`` steps. Several
    processes share the windows of a step.
    """
    found = stage.tensors("routers")
    if found is None:
        layers = _PackedLayers(source, quantized)

        def keep(state: TuningState) -> None:
            if len(state.losses) % every == 0:
                _keep_state(state, stage)
                log(step=len(state.losses), loss=state.losses[-1])

        with _exact_activations():
            losses = tune_routers(
                source.moe, windows, config, progress, start=_kept_state(stage), keep=keep, gradients=layers.gradients
            )
        tuned = zip(source.moe.moe, source.moe.routers, strict=True)
        routers = {str(layer.index): weight.detach().cpu() for layer, weight in tuned}
        stage.keep_tensors("routers", routers, losses)
        stage.remove("state")
        found = routers, losses
    return Tuned({int(k): v.clone() for k, v in found[0].items()}, found[1])


def _keep_state(state: TuningState, stage: Stage) -> None:
    lists = {"master": state.masters, "first": state.first, "second": state.second}
    tensors = {f"{name}-{at}": value.cpu() for name, values in lists.items() for at, value in enumerate(values)}
    stage.keep_tensors("state", tensors, state.losses)


def _kept_state(stage: Stage) -> TuningState | None:
    found = stage.tensors("state")
    if found is None:
        return None
    tensors, losses = found
    count = len(tensors) // 3
    lists = ([tensors[f"{name}-{at}"] for at in range(count)] for name in ("master", "first", "second"))
    return TuningState(losses, *lists)
