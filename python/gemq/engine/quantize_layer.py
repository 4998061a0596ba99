"""Quantize one loaded decoder layer, calibrated on the outputs of the quantized layers before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from gemq import distributed
from gemq.activation import Inner
from gemq.algorithms.compensation import fit_down
from gemq.algorithms.gptq import GptqConfig, GptqReport
from gemq.algorithms.layerwise import Hessian, Routed
from gemq.algorithms.matrices import QuantizedWeights, dequantized, quantize_experts, quantize_linear
from gemq.algorithms.perturbation import ScaledRows, hessians_of
from gemq.algorithms.sharing import gathered_linears, gathered_stack
from gemq.engine.layer_importance import experts_at_once
from gemq.engine.layers import Calls, Trace, recording
from gemq.engine.scratch import Scratch
from gemq.engine.source import Source, return_memory
from gemq.engine.stored_experts import StoredStack
from gemq.engine.walk import Sweep, Walk
from gemq.models import MoeLayer
from gemq.nn.experts import PROJECTIONS, QuantizedStack
from gemq.widths import Widths


@torch.no_grad()
def quantize_layer(
    source: Source, walk: Walk, index: int, widths: Widths, config: GptqConfig, sweep: Sweep, affinity: float = 0.0
) -> QuantizedWeights:
    """Quantize the loaded layer ``index`` to ``widths``; the loaded weights stay as they are.

    The layer runs once over its inputs with its original weights. Hessians of its linears come from that run, those of
    its experts afterwards, a group at a time, from a trace of what the experts were called with. Of several processes
    each quantizes its own matrices. ``affinity``: see :func:`gemq.engine.quantize.quantize`.
    """
    moe, inputs = source.moe, walk.name(index)
    layer = moe.moe_at(index)
    under = f"{moe.layer_path(index)}."
    linears = {path: pair for path, pair in moe.quantized_linears(widths).items() if path.startswith(under)}
    result = QuantizedWeights(widths, config.group_size)
    with ExitStack() as stack:
        if layer is not None:
            trace = stack.enter_context(recording(layer, walk.scratch, source.device, walk.calls))
        modules = {path: module for path, (module, _) in linears.items()}
        hessians = input_hessians(source, walk.calls, index, walk.scratch, inputs, modules)
    made, reports = {}, {}
    for path, hessian in hessians.items():
        module, bits = linears[path]
        codes, meta, reports[path] = quantize_linear(module, hessian, bits, config)
        made[path] = (codes, meta, bits)
    bits_of = {path: bits for path, (_, bits) in linears.items()}
    result.linears, result.reports = gathered_linears(list(linears), bits_of, made, reports, source.device)
    hessians.clear()
    if layer is not None:
        _quantize_experts(source, layer, trace, config, sweep, affinity, result)
        trace.drop()
    return result


def input_hessians(
    source: Source, calls: Calls, index: int, scratch: Scratch, inputs: str, modules: Mapping[str, nn.Module]
) -> dict[str, Hessian]:
    """Run the loaded layer ``index`` over array ``inputs`` and sum the Hessians of this process's ``modules``, over
    the batches of all processes in their order."""
    here = distributed.world()
    seen: dict[str, Tensor] = {}
    mine = list(modules)[here.rank :: here.size]
    hessians = {path: Hessian(cast(Tensor, modules[path].weight).shape[-1], source.device) for path in mine}
    with ExitStack() as stack:
        for path, module in modules.items():
            handle = module.register_forward_pre_hook(lambda m, args, p=path: seen.update({p: args[0]}))
            stack.callback(handle.remove)
        for turn in range(calls.rounds):
            ran = turn < len(calls)
            if ran:
                calls.run(source, index, scratch.batch(inputs, turn).to(source.device))
            for tensors in distributed.exchange(dict(seen) if ran else None, source.device):
                for path in mine:
                    hessians[path].add(tensors[path])
            seen.clear()
    return hessians


def _scaled(trace: Trace, group: slice, affinity: float) -> ScaledRows:
    """The inputs of the experts of a group, weighted by ``affinity``."""

    def of(routed: Routed, expert: int) -> tuple[Tensor, Tensor | float]:
        x, token = routed.rows(expert)
        # x x' weighted by w ** affinity
        return x, routed.weight_of(expert, token).clamp(min=0) ** (affinity / 2) if affinity else 1.0

    return ([of(routed, e) for e in range(group.start, group.stop)] for routed, _ in trace)


def _quantize_experts(
    source: Source, layer: MoeLayer, trace: Trace, config: GptqConfig, sweep: Sweep, affinity: float,
    result: QuantizedWeights,
) -> None:
    """Quantize all experts of a layer, a group at a time."""
    # no record was laid over the layer, so its experts are as they are stored
    weights = cast(tuple[StoredStack, StoredStack], source.experts[layer.index])
    widths, between = result.widths.of_experts(layer.index), layer.form.between(layer.experts, source.dtype)
    part = distributed.share(len(weights[0]))
    per_group = experts_at_once(weights, sweep.budget)
    stacks = tuple(QuantizedStack([], [], []) for _ in weights)
    reports: tuple[dict, ...] = ({}, {})
    for start in range(part.start, part.stop, per_group):
        group = slice(start, min(start + per_group, part.stop))
        made = _quantize_group(
            weights, widths, group, partial(_scaled, trace, group, affinity), config, sweep,
            between.of(range(group.start, group.stop)),
        )
        for stack, report, (found, told) in zip(stacks, reports, made, strict=True):
            stack.codes.extend(found.codes)
            stack.meta.extend(found.meta)
            stack.bits.extend(found.bits)
            report.update({start - part.start + e: one for e, one in told.items()})
        return_memory()
    whole = []
    for name, bits, stack, report in zip(PROJECTIONS, widths, stacks, reports, strict=True):
        joined, everyones = gathered_stack(bits, part, stack, report, source.device)
        whole.append(joined)
        for e in sorted(everyones):
            result.reports[f"{layer.path}.experts.{e}.{name}"] = everyones[e]
    gate_up, down = whole
    result.stacks[layer.index] = gate_up, down


def _quantize_group(
    weights: tuple[StoredStack, StoredStack], widths: tuple[list[int], list[int]], group: slice,
    rows: Callable[[], ScaledRows], config: GptqConfig, sweep: Sweep, inner: list[Inner],
) -> list[tuple[QuantizedStack, dict[int, GptqReport]]]:
    """Quantize a group of experts: gate and up, then down."""
    gate_up, quantizer = weights[0][group], sweep.quantizer or quantize_experts
    pairs = hessians_of(gate_up, rows(), weights[1].shape[-1], not config.compensate, inner)
    first = quantizer(gate_up, [pair[0] for pair in pairs], widths[0][group], config)
    down, hessians, bits = weights[1][group], [pair[1] for pair in pairs], widths[1][group]
    if config.compensate:
        down, hessians = fit_down(down, bits, gate_up, dequantized(first[0], gate_up), rows(), config.damping, inner)
    return [first, quantizer(down, hessians, bits, config)]
