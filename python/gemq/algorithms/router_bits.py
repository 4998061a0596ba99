"""Quantize the routers after they were tuned (the paper's Table 20), the rest of the model as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq import distributed
from gemq.algorithms.gptq import GptqConfig, GptqReport, gptq
from gemq.algorithms.layerwise import Hessian, capture_layer_calls, run_layer
from gemq.format import check_bits, default_group_size
from gemq.models import MoeModel
from gemq.reference.grid import dequantize_codes


@torch.no_grad()
def quantize_routers(
    moe: MoeModel, windows: Tensor, bits: int, config: GptqConfig | None = None, *, batch_size: int = 8
) -> dict[str, GptqReport]:
    """Round every router ``[E, H]`` to ``bits`` by GPTQ, in place, layer by layer on the model as it is.

    The inputs of a router are those that the layers before it give with their routers quantized already. A router
    stays a plain weight: it holds ``q * s + m`` of its groups in the model's dtype, so its module, and how it picks
    experts, is transformers' own. ``windows`` is int64 ``[N, T]``. Returns a report by the router's module path.
    Raises ``ValueError`` for ``bits`` outside 1..8.
    """
    check_bits(bits)
    config, reports = config or GptqConfig(), {}
    by_index = {layer.index: layer for layer in moe.moe}
    was_training = moe.model.training
    moe.model.eval()
    calls = capture_layer_calls(moe, distributed.batches(windows, batch_size))
    hidden = calls.hidden
    for index, module in enumerate(moe.layers):
        if index in by_index:
            layer = by_index[index]
            weight, hessian = layer.router.weight, Hessian(moe.hidden, layer.router.weight.device)
            seen: dict[str, Tensor] = {}
            handle = layer.router.register_forward_pre_hook(lambda m, args, s=seen: s.update(x=args[0]))
            for turn in range(distributed.rounds(windows, batch_size)):
                mine = turn < len(hidden)
                if mine:
                    run_layer(module, hidden[turn], calls.kwargs[turn][index])
                for tensors in distributed.exchange(seen if mine else None, weight.device):
                    hessian.add(tensors["x"])
            handle.remove()
            size = default_group_size(moe.hidden, config.group_size)
            codes, meta, (report,) = gptq(
                weight.detach()[None], hessian.value[None], [bits], [hessian.tokens], config, size
            )
            weight.copy_(dequantize_codes(codes[0], meta[0], weight.dtype))
            reports[layer.router_path] = report
        hidden = [run_layer(module, h, kw[index]) for h, kw in zip(hidden, calls.kwargs, strict=True)]
    moe.model.train(was_training)
    return reports
