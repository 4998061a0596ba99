"""Quantize one decoder layer from disk, calibrated on what the quantized layers before it give."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from gemq.algorithms.gptq import GptqConfig, GptqReport, gptq
from gemq.algorithms.sequential import BitPlan, Hessian, QuantizedWeights, layer_linears, quantize_linears
from gemq.algorithms.sequential import quantize_stack as quantize_group
from gemq.engine.costs import experts_at_once, hessians_of
from gemq.engine.layers import Calls, Trace, recording
from gemq.engine.scratch import Scratch
from gemq.engine.source import Source
from gemq.format import default_group_size
from gemq.models import MoeLayer
from gemq.nn.experts import QuantizedStack
from gemq.reference.grid import dequantize_codes


@torch.no_grad()
def quantize_layer(
    source: Source, calls: Calls, index: int, scratch: Scratch, inputs: str, plan: BitPlan, config: GptqConfig,
    budget: int,
) -> QuantizedWeights:
    """Quantize the loaded layer ``index`` by ``plan`` and leave the dequantized weights in it.

    The layer runs once over array ``inputs`` with its original weights. Hessians of its linears come from that run,
    those of its experts afterwards, a group at a time, from a trace of what the experts were called with.
    """
    moe = source.moe
    layer = next((m for m in moe.moe if m.index == index), None)
    linears = layer_linears(moe, index, plan)
    hessians = {path: Hessian(m.in_features, m.weight.device) for path, (m, _) in linears.items()}
    result = QuantizedWeights(plan, config.group_size)
    with ExitStack() as stack:
        for path, (module, _) in linears.items():
            handle = module.register_forward_pre_hook(lambda m, args, h=hessians[path]: h.add(args[0]))
            stack.callback(handle.remove)
        trace = None
        if layer is not None:
            trace = stack.enter_context(recording(layer, scratch, source.device, len(calls)))
        for batch in range(len(calls)):
            calls.run(source, index, scratch.batch(inputs, batch).to(source.device))
    quantize_linears(linears, hessians, config, result)
    hessians.clear()
    if layer is not None:
        _quantize_experts(layer, trace, plan.experts[index], config, budget, result)
        trace.drop()
    return result


def _quantize_experts(
    layer: MoeLayer, trace: Trace, bits: list[int], config: GptqConfig, budget: int, result: QuantizedWeights
) -> None:
    """All experts of a layer, a group at a time; expert after expert the widths may differ."""
    weights = (layer.experts.gate_up_proj, layer.experts.down_proj)
    per_group = experts_at_once(weights, budget)
    stacks = tuple(QuantizedStack([], [], []) for _ in weights)
    reports: list[dict[int, GptqReport]] = [{}, {}]
    for start in range(0, len(bits), per_group):
        group = slice(start, min(start + per_group, len(bits)))
        gate_up = weights[0][group]
        pairs = hessians_of(
            gate_up, ([r.rows(e)[0] for e in range(group.start, group.stop)] for r, _ in trace),
            gate_up.shape[-1], weights[1].shape[-1],
        )
        for which, (stack, weight) in enumerate(zip(stacks, weights, strict=True)):
            # a slice is a view: what is written back reaches the layer
            part, found = quantize_group(weight[group], [pair[which] for pair in pairs], bits[group], config)
            stack.codes.extend(part.codes)
            stack.meta.extend(part.meta)
            stack.bits.extend(part.bits)
            reports[which] |= {start + e: report for e, report in found.items()}
    for name, found in zip(("gate_up_proj", "down_proj"), reports, strict=True):
        for e in sorted(found):
            result.reports[f"{layer.path}.experts.{e}.{name}"] = found[e]
    result.stacks[layer.index] = stacks


@torch.no_grad()
def quantize_router(
    source: Source, calls: Calls, layer: MoeLayer, scratch: Scratch, inputs: str, bits: int, config: GptqConfig
) -> tuple[Tensor, GptqReport]:
    """Round the router of a loaded layer to ``bits`` by GPTQ on the inputs it sees; returns its weight, too."""
    weight, hessian = layer.router.weight, Hessian(source.moe.hidden, source.device)
    handle = layer.router.register_forward_pre_hook(lambda m, args: hessian.add(args[0]))
    try:
        for batch in range(len(calls)):
            calls.run(source, layer.index, scratch.batch(inputs, batch).to(source.device))
    finally:
        handle.remove()
    size = default_group_size(source.moe.hidden, config.group_size)
    codes, meta, (report,) = gptq(weight[None], hessian.value[None], [bits], [hessian.tokens], config, size)
    weight.copy_(dequantize_codes(codes[0], meta[0], weight.dtype))
    return weight.detach().clone(), report
