"""Token perplexity over windows of text."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gemq.errors import GemqError
from gemq.models.forward import call


def token_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Next-token cross-entropy ``[B, T - 1]`` in nats, float32, of windows ``[B, T]``."""
    device = next(model.parameters()).device
    ids = windows.to(device)
    logits = call(model, input_ids=ids, use_cache=False).logits[:, :-1].float()
    flat = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return flat.view(ids.shape[0], -1)


@torch.no_grad()
def perplexity(
    model: nn.Module, windows: Tensor, batch_size: int = 8, progress: Callable[[int, int], None] | None = None
) -> float:
    """``exp`` of the token-mean negative log-likelihood over ``windows`` int64 ``[N, T]``.

    ``progress(done, total)`` is called after each batch. Raises :class:`gemq.errors.GemqError` at the first window
    whose loss is NaN or infinite, and for a mean whose ``exp`` is beyond float64; ``ValueError`` for no windows.
    """
    if not windows.numel() or batch_size < 1:
        raise ValueError(f"need at least 1 window and 1 a batch, got {list(windows.shape)} and {batch_size}")
    total, count = 0.0, 0
    for at in range(0, len(windows), batch_size):
        losses = token_losses(model, windows[at : at + batch_size]).double().sum(1).tolist()
        for index, loss in enumerate(losses, at):
            if not math.isfinite(loss):
                raise GemqError(f"the loss of window {index + 1} of {len(windows)} is {loss}: a weight of the model is "
                                "NaN or infinite, or a product is beyond the range of its dtype")
        total += sum(losses)
        count += len(losses) * (windows.shape[1] - 1)
        if progress:
            progress(min(at + batch_size, len(windows)), len(windows))
    try:
        return math.exp(total / count)
    except OverflowError:
        raise GemqError(f"the mean loss is {total / count:.4g} nats a token, whose perplexity is beyond what a number "
                        "holds: the model is broken") from None
