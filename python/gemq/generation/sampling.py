"""Choosing the next tokens on the device: static shapes and no host synchronisation, so a CUDA graph can hold it."""

from __future__ import annotations

import torch
from torch import Tensor

from gemq.generation.options import GenerationOptions


class Sampler:
    """Logits ``[B, V]`` to tokens ``[B]``, by transformers' rules and in its order: repetition penalty, temperature,
    ``top_k``, ``top_p``, ``min_p``, then one draw.

    ``seen`` marks the prompt's and the generated tokens for the penalty; padding is not among them.
    """

    def __init__(self, options: GenerationOptions, prompt: Tensor, mask: Tensor, vocabulary: int):
        self.options = options
        device = prompt.device
        self.seen: Tensor | None = None
        if options.repetition_penalty != 1.0:
            seen = torch.zeros(prompt.shape[0], vocabulary + 1, dtype=torch.bool, device=device)
            # padding is counted in one column past the vocabulary
            seen.scatter_(1, torch.where(mask.bool(), prompt, vocabulary), True)
            self.seen = seen[:, :vocabulary].contiguous()
        self.generator = torch.Generator(device=device)
        self.generator.manual_seed(options.seed)

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of every row, int64 ``[B]``."""
        options = self.options
        scores = logits.float()
        if self.seen is not None:
            penalty = options.repetition_penalty
            scores = torch.where(self.seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
        tokens = self._draw(scores) if options.samples else scores.argmax(-1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens

    def _draw(self, scores: Tensor) -> Tensor:
        options = self.options
        scores = scores / (options.temperature or 1.0)
        scores = keep_top_k(scores, options.top_k)
        scores = keep_top_p(scores, options.top_p)
        scores = keep_min_p(scores, options.min_p)
        # the largest of p / Exp(1) is a draw from p, without the host synchronisation of torch.multinomial
        noise = torch.empty_like(scores).exponential_(generator=self.generator)
        return (scores.softmax(-1) / noise).argmax(-1)


def keep_top_k(scores: Tensor, top_k: int) -> Tensor:
    """Minus infinity where a score is below the ``top_k``-th of its row; 0 keeps all."""
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
