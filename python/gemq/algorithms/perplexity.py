"""Token perplexity over windows of text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from gemq.errors import GemqError
from gemq.models.forward import call


def losses_of(logits: Tensor, windows: Tensor) -> Tensor:
    """Next-token cross-entropy ``[B, T - 1]`` in nats, float32, of logits ``[B, T - 1, V]`` of windows ``[B, T]``."""
    flat = nn.functional.cross_entropy(
        logits.float().flatten(0, 1), windows[:, 1:].to(logits.device).flatten(), reduction="none"
    )
    return flat.view(len(windows), -1)


def token_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Next-token cross-entropy ``[B, T - 1]`` in nats, float32, of windows ``[B, T]``."""
    device = next(model.parameters()).device
    return losses_of(call(model, input_ids=windows.to(device), use_cache=False).logits[:, :-1], windows)


class Losses:
    """Sum of the losses of ``windows`` windows, batch by batch, and the ``seconds`` that computing them took."""

    def __init__(self, windows: int):
        self.seconds = 0.0
        self._windows, self._done, self._total, self._count = windows, 0, 0.0, 0

    def add(self, compute: Callable[[], Tensor]) -> None:
        """Add losses ``[B, T - 1]`` of the next windows. Raises :class:`gemq.errors.GemqError` at the first window
        whose loss is NaN or infinite."""
        start = time.perf_counter()
        found = compute()
        losses = found.double().sum(1).tolist()
        self.seconds += time.perf_counter() - start
        for index, loss in enumerate(losses, self._done):
            if not math.isfinite(loss):
                raise GemqError(f"the loss of window {index + 1} of {self._windows} is {loss}: a weight of the model "
                                "is NaN or infinite, or a product is beyond the range of its dtype")
        self._total += sum(losses)
        self._count += found.numel()
        self._done += len(losses)

    def perplexity(self) -> float:
        """``exp`` of their mean. Raises :class:`gemq.errors.GemqError` where that is beyond float64."""
        mean = self._total / self._count
        try:
            return math.exp(mean)
        except OverflowError:
            raise GemqError(f"the mean loss is {mean:.4g} nats a token, whose perplexity is beyond what a number "
                            "holds: the model is broken") from None


@torch.no_grad()
def perplexity(
    model: nn.Module, windows: Tensor, batch_size: int = 8, progress: Callable[[int, int], None] | None = None
) -> float:
    """``exp`` of the token-mean negative log-likelihood over ``windows`` int64 ``[N, T]``.

    ``progress(done, total)`` is called after each batch. Raises :class:`gemq.errors.GemqError` as :class:`Losses`
    does; ``ValueError`` for no windows.
    """
    return measured_losses(model, windows, batch_size, progress).perplexity()


@torch.no_grad()
def measured_losses(
    model: nn.Module, windows: Tensor, batch_size: int = 8, progress: Callable[[int, int], None] | None = None
) -> Losses:
    """The losses of a model, as :func:`perplexity` takes and refuses them."""
    if not windows.numel() or batch_size < 1:
        raise ValueError(f"need at least 1 window and 1 a batch, got {list(windows.shape)} and {batch_size}")
    found = Losses(len(windows))
    for at in range(0, len(windows), batch_size):
        found.add(partial(token_losses, model, windows[at : at + batch_size]))
        if progress:
            progress(min(at + batch_size, len(windows)), len(windows))
    return found
