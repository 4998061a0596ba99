"""KL divergence of a model's next-token distributions from a reference's, as llama.cpp's ``--kl-divergence`` gives it.

With ``p`` the reference's probabilities of the next token and ``q`` the model's, the divergence of a position is
``sum over the vocabulary of p (log p - log q)``, in nats. It is zero for the same model and, unlike a perplexity,
cannot fall by a change that happens to suit the text. llama.cpp counts the second half of each window, whose tokens
have enough before them: ``second_half`` does the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemq.algorithms.perplexity import Losses, losses_of
from gemq.errors import GemqError
from gemq.models.forward import call

_AT_ONCE = 1 << 26  # numbers of a distribution that are compared at a time
Logits = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Divergence:
    """Divergence from a reference over ``tokens`` positions, in nats: its mean, median, 99% and 99.9% quantiles and
    largest value; ``same_top`` is the share of positions whose likeliest tokens are the same, ``probability`` the root
    mean square of the change of the right token's probability; perplexities of both on these positions."""

    mean: float
    median: float
    p99: float
    p999: float
    largest: float
    same_top: float
    probability: float
    perplexity: float
    reference_perplexity: float
    tokens: int

    @property
    def ratio(self) -> float:
        """The model's perplexity over the reference's."""
        return self.perplexity / self.reference_perplexity


def counted(length: int, second_half: bool) -> slice:
    """Positions of a window of ``length`` tokens that predict a token that is counted."""
    return slice(length // 2 if second_half else 0, length - 1)


def window_logits(model: nn.Module, windows: Tensor, where: slice) -> Tensor:
    """Logits ``[B, P, V]`` of the positions ``where`` of windows ``[B, T]``, in the model's dtype."""
    device = next(model.parameters()).device
    return call(model, input_ids=windows.to(device), use_cache=False).logits[:, where]


def _pieces(logits: Tensor, reference: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    rows = max(1, _AT_ONCE // logits.shape[-1])
    flat = logits.flatten(0, 1).split(rows), reference.flatten(0, 1).split(rows), labels.flatten().split(rows)
    return zip(*flat, strict=True)


class Positions:
    """Divergence, probabilities and likeliest tokens of the positions that were counted."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []

    def add(self, logits: Tensor, reference: Tensor, labels: Tensor) -> None:
        """Compare two models' logits ``[B, P, V]`` for the next tokens ``labels [B, P]``."""
        for given, wanted, label in _pieces(logits, reference.to(logits.device), labels.to(logits.device)):
            log_q, log_p = given.float().log_softmax(-1), wanted.float().log_softmax(-1)
            p = log_p.exp()
            # a token that the reference excludes counts as nothing
            each = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1, dtype=torch.float64).clamp_min(0)
            own, base = (x.gather(-1, label[:, None])[:, 0].double() for x in (log_q, log_p))
            same = (given.argmax(-1) == wanted.argmax(-1)).double()
            self._found.append(torch.stack([each, own, base, same], -1).cpu())

    def summary(self) -> Divergence:
        """Statistics over all positions. Raises :class:`gemq.errors.GemqError` for a divergence that is not finite."""
        each, own, base, same = torch.cat(self._found).unbind(-1)
        if not bool(torch.isfinite(each).all()):
            raise GemqError(f"the divergence of position {int((~torch.isfinite(each)).int().argmax()) + 1} is not "
                            "finite: a logit of the model or of the reference is NaN or infinite")
        median, p99, p999 = torch.quantile(each, torch.tensor([0.5, 0.99, 0.999], dtype=torch.float64)).tolist()
        return Divergence(
            float(each.mean()), median, p99, p999, float(each.max()), float(same.mean()),
            float((own.exp() - base.exp()).square().mean().sqrt()), math.exp(-float(own.mean())),
            math.exp(-float(base.mean())), len(each),
        )


@torch.no_grad()
def divergence(
    model: nn.Module, reference: Logits, windows: Tensor, batch_size: int = 4, second_half: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Divergence, Losses]:
    """Divergence of a model over ``windows`` int64 ``[N, T]`` from ``reference(start, end)``, which gives the logits
    ``[B, P, V]`` of windows ``start .. end`` at the positions of :func:`counted`; and the losses at all positions.

    Raises ``ValueError`` for a reference of another vocabulary, and what :class:`gemq.algorithms.perplexity.Losses`
    raises.
    """
    found, losses, where = Positions(), Losses(len(windows)), counted(windows.shape[1], second_half)
    for at in range(0, len(windows), batch_size):
        batch = windows[at : at + batch_size]
        logits = _with_losses(model, batch, losses)[:, where]
        wanted = reference(at, at + len(batch))
        if logits.shape != wanted.shape:
            raise ValueError(f"reference has logits {list(wanted.shape)}, the model {list(logits.shape)}: they are of "
                             "other vocabularies or windows")
        found.add(logits, wanted, batch[:, 1:][:, where])
        if progress:
            progress(at + len(batch), len(windows))
    return found.summary(), losses


def _with_losses(model: nn.Module, batch: Tensor, losses: Losses) -> Tensor:
    """Logits ``[B, T - 1, V]`` of windows ``[B, T]``, whose losses are added to the others."""
    kept: list[Tensor] = []

    def compute() -> Tensor:
        kept.append(window_logits(model, batch, counted(batch.shape[1], False)))
        return losses_of(kept[0], batch)

    losses.add(compute)
    return kept[0]
