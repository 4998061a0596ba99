"""Tune the routers of a model whose weights stay packed.

The packed model and one layer's activations are in memory: layers are recomputed in the backward pass, which unpacks
one expert at a time. Master routers and AdamW's moments are float32 and are written down as the tuning goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gemq import durable
from gemq.algorithms.router_tuning import RouterTuningConfig, TuningState, tune_routers
from gemq.engine.journal import Stage
from gemq.engine.source import OUTSIDE, Source, return_memory
from gemq.engine.stages import Quantized
from gemq.models import replace_with_packed
from gemq.nn import LowBitLinear
from gemq.ops import set_cpu_activations

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Tuned:
    """Router weights by decoder layer, on the CPU, and the loss of every step."""

    routers: dict[int, Tensor]
    losses: list[float]


def fill_packed(source: Source, quantized: Quantized) -> None:
    """Load the whole of ``source``, its quantized parts packed and laid out for the device's kernels."""
    source.load(OUTSIDE)
    for index in range(len(source.moe.layers)):
        source.load(index)
        modules = quantized.record(index).modules
        for path, module in modules.items():
            dense = source.model.get_submodule(path)
            if isinstance(module, LowBitLinear) and dense.bias is not None:
                module.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=False)
            module.to(source.device)
            module.prepare()
            # the description of the model still holds the module: without this, its weights too
            for name, parameter in list(dense.named_parameters()):
                owner, _, leaf = name.rpartition(".")
                setattr(dense.get_submodule(owner), leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))
        replace_with_packed(source.model, modules)
        return_memory()


@contextmanager
def _recomputed(layers: list[nn.Module]) -> Iterator[None]:
    """Keep only the layers' inputs for the backward pass."""
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def _exact_activations() -> Iterator[None]:
    before = set_cpu_activations("exact")
    try:
        yield
    finally:
        set_cpu_activations(before)


def tune_packed(
    source: Source, quantized: Quantized, windows: Tensor, config: RouterTuningConfig, stage: Stage,
    progress: Progress, every: int = 16,
) -> Tuned:
    """Tune the routers on ``windows`` int64 ``[N, T]``, starting from the full-precision ones.

    ``source`` is a skeleton of its own, which is filled. The state is written after each ``every`` steps.
    """
    file = stage.file("routers")
    found = durable.unseal_tensors(file)
    if found is None:
        fill_packed(source, quantized)

        def keep(state: TuningState) -> None:
            if len(state.losses) % every == 0:
                _save_state(state, stage)

        with _recomputed(source.moe.layers), _exact_activations():
            losses = tune_routers(
                source.moe, windows, config, progress, start=_read_state(stage), keep=keep
            )
        routers = {str(m.index): m.router.weight.detach().cpu() for m in source.moe.moe}
        durable.seal_tensors(file, routers, losses)
        durable.remove(stage.file("state"))
        found = routers, losses
    return Tuned({int(k): v.clone() for k, v in found[0].items()}, found[1])


def _save_state(state: TuningState, stage: Stage) -> None:
    lists = {"master": state.masters, "first": state.first, "second": state.second}
    tensors = {f"{name}-{at}": value.cpu() for name, values in lists.items() for at, value in enumerate(values)}
    durable.seal_tensors(stage.file("state"), tensors, state.losses)


def _read_state(stage: Stage) -> TuningState | None:
    found = durable.unseal_tensors(stage.file("state"))
    if found is None:
        return None
    tensors, losses = found
    count = len(tensors) // 3
    lists = ([tensors[f"{name}-{at}"] for at in range(count)] for name in ("master", "first", "second"))
    return TuningState(losses, *lists)
