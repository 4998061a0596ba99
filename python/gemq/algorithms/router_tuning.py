"""Fine-tune only the routers of a quantized model on the task loss (section 3.3 of the paper)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gemq.algorithms.perplexity import token_losses
from gemq.models import MoeModel

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class RouterTuningConfig:
    """AdamW on the routers, everything else frozen; the defaults are the paper's."""

    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    epochs: int = 1
    batch_size: int = 1


def tune_routers(
    moe: MoeModel, windows: Tensor, config: RouterTuningConfig | None = None, progress: Progress | None = None
) -> list[float]:
    """Minimise the token-mean cross-entropy of ``windows`` int64 ``[N, T]`` over the router weights, in place.

    Master weights are float32 whatever the model's dtype: a bfloat16 weight above 1/32 would not move by a step of
    1e-4. Returns the loss of every step. The model's frozen and training state is put back.
    """
    config = config or RouterTuningConfig()
    model, device = moe.model, next(moe.model.parameters()).device
    was_training = model.training
    required = {p: p.requires_grad for p in model.parameters()}
    for p in required:
        p.requires_grad_(False)
    routers = moe.routers
    masters = [p.detach().float().clone() for p in routers]
    optimizer = torch.optim.AdamW(masters, lr=config.learning_rate, weight_decay=config.weight_decay)
    for p in routers:
        p.requires_grad_(True)
    # evaluation mode: no dropout or router jitter, gradients flow all the same
    model.eval()
    losses, steps = [], config.epochs * -(-len(windows) // config.batch_size)
    for _ in range(config.epochs):
        for at in range(0, len(windows), config.batch_size):
            with torch.enable_grad():
                loss = token_losses(model, windows[at : at + config.batch_size].to(device)).mean()
                gradients = torch.autograd.grad(loss, routers)
            for master, gradient in zip(masters, gradients, strict=True):
                master.grad = gradient.float()
            optimizer.step()
            with torch.no_grad():
                for p, master in zip(routers, masters, strict=True):
                    p.copy_(master)
            losses.append(float(loss.detach()))
            if progress:
                progress(len(losses), steps)
    for p, value in required.items():
        p.requires_grad_(value)
    model.train(was_training)
    return losses
