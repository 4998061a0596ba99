"""The experts that a model chooses, how many choices quantization changes, and what perfect routing would give.

Replay puts the full-precision routers' decisions into the quantized model: no method, since it runs both models.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gemq.algorithms.layerwise import watch_experts
from gemq.models import MoeModel
from gemq.models.forward import call


@contextmanager
def replayed_routing(moe: MoeModel, reference: MoeModel) -> Iterator[None]:
    """Route every token in ``moe.model`` as ``reference.model`` does, with its weights, for the duration of the block.

    Each call of ``moe.model`` first runs ``reference.model``, of the same architecture and in evaluation mode, on the
    same arguments. Use it without a cache of keys and values.
    """
    found: dict[int, object] = {}
    with ExitStack() as stack:
        for row, (own, other) in enumerate(zip(moe.moe, reference.moe, strict=True)):
            handles = [
                other.router.register_forward_hook(lambda m, args, output, row=row: found.__setitem__(row, output)),
                own.router.register_forward_hook(lambda m, args, output, row=row: found.pop(row)),
            ]
            for handle in handles:
                stack.callback(handle.remove)

        def first(module: nn.Module, args: tuple, kwargs: dict) -> None:
            with torch.no_grad():
                reference.model(*args, **kwargs)

        stack.callback(moe.model.register_forward_pre_hook(first, with_kwargs=True).remove)
        yield


@torch.no_grad()
def chosen_experts(moe: MoeModel, windows: Tensor, batch_size: int = 4) -> list[Tensor]:
    """The experts of every token, bool ``[N * T, E]`` per MoE layer, for ``windows`` int64 ``[N, T]``."""
    was_training, device = moe.model.training, next(moe.model.parameters()).device
    moe.model.eval()
    found: list[list[Tensor]] = [[] for _ in moe.moe]
    with ExitStack() as stack:
        for layer, masks in zip(moe.moe, found, strict=True):
            stack.enter_context(watch_experts(layer, lambda routed, output, masks=masks: masks.append(
                torch.zeros(len(routed.x), moe.num_experts, dtype=torch.bool, device=routed.x.device)
                .scatter_(1, routed.ids.long(), True)
            )))
        for at in range(0, len(windows), batch_size):
            call(moe.decoder, input_ids=windows[at : at + batch_size].to(device), use_cache=False)
    moe.model.train(was_training)
    return [torch.cat(masks) for masks in found]


def changed_routes(before: list[Tensor], after: list[Tensor]) -> list[float]:
    """Per MoE layer the share of tokens whose set of experts differs between two of :func:`chosen_experts`."""
    return [float((a != b).any(-1).float().mean()) for a, b in zip(before, after, strict=True)]
