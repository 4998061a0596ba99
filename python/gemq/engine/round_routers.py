"""Quantize the routers after they were tuned (the paper's Table 20), the rest of the model as it is.

A router stays a plain weight: it holds ``q * s + m`` of its groups in the model's dtype, so its module, and how it
picks experts, is transformers' own.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from gemq import distributed
from gemq.algorithms.gptq import GptqConfig, GptqReport
from gemq.algorithms.matrices import quantize_linear
from gemq.engine.layers import Calls, put_routers
from gemq.engine.quantize import Quantized
from gemq.engine.quantize_layer import input_hessians
from gemq.engine.scratch import Scratch
from gemq.engine.source import Source
from gemq.engine.walk import Sweep, Walk
from gemq.models import MoeLayer
from gemq.reference.grid import dequantize_codes


def round_routers(
    quantized: Quantized, routers: dict[int, Tensor], sweep: Sweep, bits: int, config: GptqConfig
) -> tuple[dict[int, Tensor], dict[str, GptqReport]]:
    """Round the routers to ``bits`` by GPTQ, layer by layer on the quantized model with ``routers`` in it."""
    source = quantized.source
    found, reports = {}, {}
    for layer in source.moe.moe:
        kept = sweep.stage.tensors(f"router-{layer.index}")
        if kept is None:
            break
        found[layer.index] = kept[0]["weight"]
        reports[layer.router_path] = GptqReport(*kept[1])
    if len(found) == len(source.moe.moe):
        return found, reports

    weights = quantized.weights(routers | found)
    walk = Walk(weights, sweep)
    last = source.moe.moe[-1].index
    for layer in [m for m in source.moe.moe if m.index not in found]:
        walk.need(layer.index)
        with walk.weights.loaded(layer.index):
            value, report = _rounded(
                source, walk.calls, layer, walk.scratch, walk.name(layer.index), bits, config
            )
            found[layer.index], reports[layer.router_path] = value, report
            weights.routers[layer.index] = value
            put_routers(source, weights.routers, layer.index)
            sweep.stage.keep_tensors(f"router-{layer.index}", {"weight": value}, list(asdict(report).values()))
            if layer.index < last:
                walk.forward(layer.index)
        walk.scratch.drop(walk.name(layer.index))
        sweep.progress(len(found), len(source.moe.moe))
    return found, reports


@torch.no_grad()
def _rounded(
    source: Source, calls: Calls, layer: MoeLayer, scratch: Scratch, inputs: str, bits: int, config: GptqConfig
) -> tuple[Tensor, GptqReport]:
    """Round the router of a loaded layer to ``bits`` by GPTQ on the inputs it sees."""
    router: Any = layer.router
    weight = router.weight
    hessians = input_hessians(source, calls, layer.index, scratch, inputs, {layer.router_path: router})

    def rounded() -> tuple[Tensor, GptqReport]:
        codes, meta, report = quantize_linear(router, hessians[layer.router_path], bits, config)
        return dequantize_codes(codes, meta, weight.dtype).cpu(), report

    return distributed.on_first(rounded)
