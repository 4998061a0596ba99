"""Quantize one decoder layer from disk, calibrated on the outputs of the quantized layers before it."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from gemq import distributed
from gemq.algorithms.compensation import fit_down
from gemq.algorithms.gptq import GptqConfig, GptqReport, gptq
from gemq.algorithms.layerwise import Hessian
from gemq.algorithms.sequential import BitPlan, QuantizedWeights, layer_linears, quantize_linears
from gemq.algorithms.sequential import quantize_stack as quantize_group
from gemq.algorithms.sharing import gathered_stack, share_linears
from gemq.engine.costs import experts_at_once, hessians_of
from gemq.engine.layers import Calls, Trace, recording
from gemq.engine.scratch import Scratch
from gemq.engine.source import Source, return_memory
from gemq.format import default_group_size
from gemq.models import MoeLayer
from gemq.nn.experts import PROJECTIONS, QuantizedStack
from gemq.reference.grid import dequantize_codes


@torch.no_grad()
def quantize_layer(
    source: Source, calls: Calls, index: int, scratch: Scratch, inputs: str, plan: BitPlan, config: GptqConfig,
    budget: int,
) -> QuantizedWeights:
    """Quantize the loaded layer ``index`` by ``plan``.

    The layer runs once over array ``inputs`` with its original weights. Hessians of its linears come from that run,
    those of its experts afterwards, a group at a time, from a trace of what the experts were called with. Of several
    processes each quantizes its own matrices.
    """
    moe = source.moe
    layer = next((m for m in moe.moe if m.index == index), None)
    linears = layer_linears(moe, index, plan)
    own, result = QuantizedWeights(plan, config.group_size), QuantizedWeights(plan, config.group_size)
    with ExitStack() as stack:
        if layer is not None:
            trace = stack.enter_context(recording(layer, scratch, source.device, calls))
        modules = {path: module for path, (module, _) in linears.items()}
        hessians = input_hessians(source, calls, index, scratch, inputs, modules)
    quantize_linears({path: linears[path] for path in hessians}, hessians, config, own)
    result.linears, result.reports = share_linears(linears, own.linears, own.reports)
    hessians.clear()
    if layer is not None:
        _quantize_experts(source, layer, trace, plan.widths(index), config, budget, result)
        trace.drop()
    return result


def input_hessians(
    source: Source, calls: Calls, index: int, scratch: Scratch, inputs: str, modules: dict[str, nn.Module]
) -> dict[str, Hessian]:
    """Run the loaded layer ``index`` over array ``inputs`` and sum the Hessians of this process's ``modules``, over
    the batches of all processes in their order."""
    here, seen = distributed.world(), {}
    mine = list(modules)[here.rank :: here.size]
    hessians = {path: Hessian(modules[path].weight.shape[-1], source.device) for path in mine}
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


def _quantize_experts(
    source: Source, layer: MoeLayer, trace: Trace, widths: tuple[list[int], list[int]], config: GptqConfig,
    budget: int, result: QuantizedWeights,
) -> None:
    """Quantize all experts of a layer, a group at a time; ``widths`` are of gate and up, and of down, expert after
    expert."""
    weights = source.experts[layer.index]
    part = distributed.share(len(weights[0]))
    per_group = experts_at_once(weights, budget)
    stacks = tuple(QuantizedStack([], [], []) for _ in weights)
    reports: tuple[dict[int, GptqReport], ...] = ({}, {})
    for start in range(part.start, part.stop, per_group):
        group = slice(start, min(start + per_group, part.stop))
        gate_up = weights[0][group]
        pairs = hessians_of(
            gate_up, ([r.rows(e)[0] for e in range(group.start, group.stop)] for r, _ in trace),
            gate_up.shape[-1], weights[1].shape[-1], second=not config.compensate,
        )
        original = gate_up.clone()
        for which, (stack, bits) in enumerate(zip(stacks, widths, strict=True)):
            weight = weights[which][group] if which else gate_up
            hessians = [pair[which] for pair in pairs]
            if which and config.compensate:
                # gate_up holds the quantized weights now
                rows = ([(r.rows(e)[0], 1.0) for e in range(group.start, group.stop)] for r, _ in trace)
                hessians = fit_down(weight, bits[group], original, gate_up, rows, config.damping)
            found, report = quantize_group(weight, hessians, bits[group], config)
            stack.codes.extend(found.codes)
            stack.meta.extend(found.meta)
            stack.bits.extend(found.bits)
            reports[which].update({start - part.start + e: one for e, one in report.items()})
        return_memory()
    whole = []
    for name, bits, stack, report in zip(PROJECTIONS, widths, stacks, reports, strict=True):
        stack, found = gathered_stack(bits, part, stack, report, source.device)
        whole.append(stack)
        for e in sorted(found):
            result.reports[f"{layer.path}.experts.{e}.{name}"] = found[e]
    result.stacks[layer.index] = tuple(whole)


@torch.no_grad()
def quantize_router(
    source: Source, calls: Calls, layer: MoeLayer, scratch: Scratch, inputs: str, bits: int, config: GptqConfig
) -> tuple[Tensor, GptqReport]:
    """Round the router of a loaded layer to ``bits`` by GPTQ on the inputs it sees; returns its weight, too."""
    weight, size = layer.router.weight, default_group_size(source.moe.hidden, config.group_size)
    hessians = input_hessians(source, calls, layer.index, scratch, inputs, {layer.router_path: layer.router})

    def rounded() -> tuple[Tensor, GptqReport]:
        hessian = hessians[layer.router_path]
        codes, meta, (report,) = gptq(weight[None], hessian.value[None], [bits], [hessian.tokens], config, size)
        return dequantize_codes(codes[0], meta[0], weight.dtype).cpu(), report

    value, report = distributed.on_first(rounded)
    weight.copy_(value)
    return value, report
