"""Token perplexity over windows of text."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def token_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Next-token cross-entropy ``[B, T - 1]`` in nats, float32, of windows ``[B, T]``."""
    device = next(model.parameters()).device
    ids = windows.to(device)
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    flat = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return flat.view(ids.shape[0], -1)


@torch.no_grad()
def perplexity(
    model: nn.Module, windows: Tensor, batch_size: int = 8, progress: Callable[[int, int], None] | None = None
) -> float:
    """``exp`` of the token-mean negative log-likelihood over ``windows`` int64 ``[N, T]``.

    ``progress(done, total)`` is called after each batch.
    """
    total, count = 0.0, 0
    for at in range(0, len(windows), batch_size):
        losses = token_losses(model, windows[at : at + batch_size])
        total += float(losses.double().sum())
        count += losses.numel()
        if progress:
            progress(min(at + batch_size, len(windows)), len(windows))
    return math.exp(total / count)
