"""Fine-tune only the routers of a quantized model on the task loss (section 3.3 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gemq import distributed
from gemq.algorithms.perplexity import token_losses
from gemq.errors import NumberError
from gemq.models import MoeModel

Progress = Callable[[int, int], None]
# function of windows ``[1, T]``: for each the ``loss`` and its gradients by the routers, numbered in order
Gradients = Callable[[list[Tensor]], Iterable[dict[str, Tensor]]]


_LARGEST_RATE, _MOST_STEPS = 100.0, 10**9


@dataclass(frozen=True)
class RouterTuningConfig:
    """AdamW on the routers, everything else frozen; the defaults are the paper's.

    Raises ``ValueError`` for a rate or decay that is negative or not finite, and for no epochs or windows.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    epochs: int = 1
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay"):
            # nan is neither
            if not 0 <= getattr(self, name) <= _LARGEST_RATE:
                raise ValueError(f"{name} of the routers must be in 0..{_LARGEST_RATE}, got {getattr(self, name)}")
        for name in ("epochs", "batch_size"):
            if not 1 <= getattr(self, name) <= _MOST_STEPS:
                raise ValueError(f"{name} of the routers must be in 1..{_MOST_STEPS}, got {getattr(self, name)}")


@dataclass
class TuningState:
    """State of tuning after ``len(losses)`` steps: master weights and AdamW's moments, per router."""

    losses: list[float]
    masters: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]


def _state(losses: list[float], optimizer: torch.optim.AdamW, masters: list[Tensor]) -> TuningState:
    moments = [optimizer.state[m] for m in masters]
    return TuningState(losses, masters, [m["exp_avg"] for m in moments], [m["exp_avg_sq"] for m in moments])


@torch.no_grad()
def _continue(
    state: TuningState, optimizer: torch.optim.AdamW, masters: list[Tensor], routers: list[nn.Parameter]
) -> None:
    for master, router, *values in zip(
        masters, routers, state.masters, state.first, state.second, strict=True
    ):
        value, first, second = (v.to(master.device) for v in values)
        master.copy_(value)
        router.copy_(value)
        optimizer.state[master] = {
            "step": torch.tensor(float(len(state.losses))), "exp_avg": first.clone(), "exp_avg_sq": second.clone()
        }


def _accumulate(batch: Tensor, masters: list[Tensor], gradients: Gradients) -> float:
    """Set the masters' gradients to the mean over the windows ``[B, T]`` of all processes; returns the mean loss."""
    sums = [torch.zeros_like(master) for master in masters]
    for master, total in zip(masters, sums, strict=True):
        master.grad = total
    mine, mean = iter(gradients(distributed.batches(batch, 1))), 0.0
    for _ in range(distributed.rounds(batch, 1)):
        for tensors in distributed.exchange(next(mine, None), batch.device):
            mean += float(tensors["loss"]) / len(batch)
            for index, total in enumerate(sums):
                total += tensors[str(index)].float() / len(batch)
    return mean


def _whole_model(model: nn.Module, routers: list[nn.Parameter], windows: list[Tensor]) -> Iterator[dict[str, Tensor]]:
    """:data:`Gradients` of a model that is in memory."""
    for window in windows:
        with torch.enable_grad():
            loss = token_losses(model, window).mean()
            gradients = torch.autograd.grad(loss, routers)
        yield {"loss": loss.detach()} | {str(index): gradient for index, gradient in enumerate(gradients)}


def tune_routers(
    moe: MoeModel, windows: Tensor, config: RouterTuningConfig | None = None, progress: Progress | None = None, *,
    start: TuningState | None = None, keep: Callable[[TuningState], None] | None = None,
    gradients: Gradients | None = None,
) -> list[float]:
    """Minimise the token-mean cross-entropy of ``windows`` int64 ``[N, T]`` over the router weights, in place.

    A step's gradient is the mean over its windows, each of which runs alone: several processes share a step's windows,
    and sum them in the same order.

    Master weights are float32 whatever the model's dtype: a bfloat16 weight above 1/32 would not move by a step of
    1e-4. Returns the loss of every step. The model's frozen and training state is put back. ``keep`` is called with the
    state after every step, and tuning continues after that of ``start``, to the same result. ``gradients`` is for a
    model that is not in memory: only its routers and its first parameter need to be.
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
    if start is not None:
        _continue(start, optimizer, masters, routers)
    gradients = gradients or partial(_whole_model, model, routers)
    batches = -(-len(windows) // config.batch_size)
    losses, steps = list(start.losses) if start else [], config.epochs * batches
    for step in range(len(losses), steps):
        at = step % batches * config.batch_size
        loss = _accumulate(windows[at : at + config.batch_size].to(device), masters, gradients)
        optimizer.step()
        with torch.no_grad():
            for p, master in zip(routers, masters, strict=True):
                p.copy_(master)
        if not math.isfinite(loss):
            raise NumberError(
                f"tuning the routers: the loss of step {step + 1} of {steps} is {loss}; lower router_lr "
                f"({config.learning_rate:g}), compute in a wider type, or leave the tuning out (--no-tune-routers)"
            )
        losses.append(loss)
        if keep:
            keep(_state(losses, optimizer, masters))
        if progress:
            progress(len(losses), steps)
    for p, value in required.items():
        p.requires_grad_(value)
    model.train(was_training)
    return losses
