"""Align routers with their full-precision originals instead of tuning them on the task loss.

Alignment is layer by layer, as in EAQuant (arXiv 2506.13329): the router of a layer is trained on what it is given in
the quantized model until its distribution over experts is again the one that the full-precision model had for the
same token. With ``p`` the softmax of the full-precision router's logits and ``q`` that of the quantized model's, it
minimises the token-mean ``KL(p || q) = sum_e p_e * (log p_e - log q_e)``. Routers that turn logits into scores by a
sigmoid are aligned in the same measure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gemq.algorithms.router_tuning import RouterTuningConfig
from gemq.models import MoeLayer


@contextmanager
def router_inputs(layer: MoeLayer, seen: list[Tensor]) -> Iterator[None]:
    """Append the inputs ``[T, H]`` of every call of the layer's router to ``seen``."""
    router: Any = layer.router
    hidden = router.weight.shape[1]
    handle = router.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].detach().reshape(-1, hidden)),
        with_kwargs=True,
    )
    try:
        yield
    finally:
        handle.remove()


def router_logits(router: Any, x: Tensor) -> Tensor:
    """Logits ``[T, E]`` of a router for ``x [T, H]``, float32, with its bias where it has one (gpt-oss)."""
    return nn.functional.linear(x.float(), router.weight.float(), router_bias(router))


def router_bias(router: Any) -> Tensor | None:
    """The bias ``[E]`` of a router's logits, float32; None without. One that only corrects the choice is none."""
    bias = getattr(router, "bias", None)
    return None if bias is None else bias.detach().float()


def routing_divergence(target: Tensor, logits: Tensor) -> Tensor:
    """Token-mean ``KL(softmax(target) || softmax(logits))`` in nats of logits ``[T, E]``."""
    return nn.functional.kl_div(
        logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True
    )


def aligned(
    weight: Tensor, x: Tensor, target: Tensor, config: RouterTuningConfig, rows: int, bias: Tensor | None = None
) -> Tensor:
    """Train a router ``weight [E, H]`` on ``x [T, H]`` towards ``target [T, E]`` in steps of ``rows`` tokens.

    A ``bias [E]``, float32, is part of its logits and stays as it is. Master weights are float32. Returns the trained
    weight in the dtype of ``weight``. Raises ``ValueError`` unless ``target`` are logits of these tokens and experts.
    """
    if tuple(target.shape) != (len(x), len(weight)):
        raise ValueError(f"target must be [{len(x)}, {len(weight)}], got {list(target.shape)}")
    master = weight.detach().float().clone().requires_grad_(True)
    optimizer = torch.optim.AdamW([master], lr=config.learning_rate, weight_decay=config.weight_decay)
    with torch.enable_grad():
        for _ in range(config.epochs):
            for at in range(0, len(x), rows):
                logits = nn.functional.linear(x[at : at + rows].float(), master, bias)
                (master.grad,) = torch.autograd.grad(routing_divergence(target[at : at + rows], logits), master)
                optimizer.step()
    return master.detach().to(weight.dtype)
