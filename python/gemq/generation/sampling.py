"""Choose the next tokens on the device: static shapes and no host synchronisation, so a CUDA graph can hold it."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq.generation.options import GenerationOptions

# temperatures and penalties beyond 1e-4 .. 1e4 are computed in float64, where scores of either size stay apart
_PLAIN = 1e4
# largest factor by which a float64 score may be divided or multiplied without overflow
_FARTHEST = 1e250
_SMALLEST_NOISE = torch.finfo(torch.float32).tiny


class Sampler:
    """Logits ``[B, V]`` to tokens ``[B]``, by transformers' rules and in its order: repetition penalty, temperature,
    ``top_k``, ``top_p``, ``min_p``, then one draw.

    ``seen`` marks the prompt's and the generated tokens for the penalty; padding is not among them. A temperature too
    small for any other token to have a probability gives the best one.
    """

    def __init__(self, options: GenerationOptions, prompt: Tensor, mask: Tensor, vocabulary: int):
        self.options = options
        device = prompt.device
        self.penalty, self.temperature = _within(options.repetition_penalty), _within(options.temperature or 1.0)
        factors = (self.penalty, self.temperature if options.samples else 1.0)
        self.wide = any(not 1 / _PLAIN <= factor <= _PLAIN for factor in factors)
        self.seen: Tensor | None = None
        if options.repetition_penalty != 1.0:
            seen = torch.zeros(prompt.shape[0], vocabulary + 1, dtype=torch.bool, device=device)
            # padding is counted in one column past the vocabulary
            seen.scatter_(1, torch.where(mask.bool(), prompt, vocabulary), True)
            self.seen = seen[:, :vocabulary].contiguous()
        self.generator = torch.Generator(device=device)
        self.generator.manual_seed(options.seed)

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The next token of every row, int64 ``[B]``, and the best score ``[B]``.

        A score that is NaN or infinite, or none above minus infinity, makes the best one no finite number: then the
        token means nothing.
        """
        scores = logits.double() if self.wide else logits.float()
        if self.seen is not None:
            scaled = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
            scores = torch.where(self.seen, scaled, scores)
        # NaN is the largest of all
        best = scores.amax(-1)
        tokens = self._draw(scores, best) if self.options.samples else scores.argmax(-1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens, best

    def _draw(self, scores: Tensor, best: Tensor) -> Tensor:
        options = self.options
        if self.wide:
            # the best is 0, so that no quotient is infinite but minus infinity
            scores = scores - best[:, None]
        scores = scores / self.temperature
        scores = keep_top_k(scores, options.top_k)
        scores = keep_top_p(scores, options.top_p)
        scores = keep_min_p(scores, options.min_p)
        # the largest of p / Exp(1) is a draw from p, without the host synchronisation of torch.multinomial; a noise of
        # 0 would make a token of no probability the largest
        noise = torch.empty_like(scores).exponential_(generator=self.generator).clamp_min_(_SMALLEST_NOISE)
        return (scores.softmax(-1) / noise).argmax(-1)


def _within(factor: float) -> float:
    return min(max(float(factor), 1 / _FARTHEST), _FARTHEST)


def keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    """Set scores below the ``top_k``-th of their row to minus infinity; 0 keeps all."""
    if not 0 < top_k < scores.shape[-1]:
        return scores
    return scores.masked_fill(scores < scores.topk(top_k).values[..., -1:], -torch.inf)


def keep_top_p(scores: Tensor, top_p: float) -> Tensor:
    """Keep the fewest best tokens whose probabilities reach ``top_p``; always the best one."""
    if top_p >= 1.0:
        return scores
    ascending, order = scores.sort(dim=-1)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    drop[..., -1] = False
    return scores.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -torch.inf)


def keep_min_p(scores: Tensor, min_p: float) -> Tensor:
    """Keep tokens at least ``min_p`` times as probable as the best."""
    if min_p <= 0.0:
        return scores
    probabilities = scores.softmax(-1)
    return scores.masked_fill(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)
