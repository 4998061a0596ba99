"""Calibration windows that use all experts evenly: out of a pool of text, or written by the model itself.

MoEQuant (arXiv 2505.03804) and EAQuant (arXiv 2506.13329) calibrate on text that gives every expert enough tokens.
:func:`balanced_windows` chooses windows of real text to that end, greedily, the one that brings the layers' loads
closest to even: with ``n[l, i]`` the tokens that expert ``i`` of layer ``l`` has seen so far, it minimises
``sum_l sum_i (n[l, i] - mean_i n[l, i])^2``. :func:`self_sampled_windows` lets the model write them, as MoEQuant does.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import torch
from routing import chosen_experts
from torch import Tensor

from gemq.algorithms.layerwise import Routed, watch_experts
from gemq.models import MoeModel
from gemq.models.forward import call


def expert_loads(moe: MoeModel, windows: Tensor, batch_size: int = 4) -> np.ndarray:
    """Tokens that each window of int64 ``[N, T]`` sends to each expert: float64 ``[N, L, E]``."""
    masks = chosen_experts(moe, windows, batch_size)
    loads = [mask.view(len(windows), windows.shape[1], -1).sum(1) for mask in masks]
    return torch.stack(loads, 1).double().cpu().numpy()


def imbalance(loads: np.ndarray) -> float:
    """Standard deviation of the experts' shares of a layer's tokens over that of an even load, mean over layers.

    ``loads`` ``[L, E]``; 0 if every expert of a layer has as many tokens.
    """
    return float((loads.std(axis=1) / loads.mean(axis=1)).mean())


def pick_balanced(loads: np.ndarray, count: int) -> list[int]:
    """Indices of ``count`` of the N windows with ``loads`` ``[N, L, E]``, ascending; ties go to the earlier window.

    Raises ``ValueError`` unless ``count`` is in 1..N.
    """
    if not 1 <= count <= len(loads):
        raise ValueError(f"count must be in 1..{len(loads)} windows of the pool, got {count}")
    deviation = loads - loads.mean(axis=2, keepdims=True)
    own = np.square(deviation).sum(axis=(1, 2))
    sums, free, chosen = np.zeros(loads.shape[1:]), np.ones(len(loads), dtype=bool), []
    for _ in range(count):
        # |s + d|^2 - |s|^2, for every window at once
        rise = own + 2 * np.einsum("nle,le->n", deviation, sums)
        best = int(np.where(free, rise, np.inf).argmin())
        chosen.append(best)
        free[best] = False
        sums += deviation[best]
    return sorted(chosen)


def balanced_windows(moe: MoeModel, pool: Tensor, count: int, batch_size: int = 4) -> Tensor:
    """``count`` windows of ``pool`` int64 ``[N, T]``, in its order, that load the experts of ``moe`` most evenly."""
    return pool[pick_balanced(expert_loads(moe, pool, batch_size), count)]

@torch.no_grad()
def self_sampled_windows(
    moe: MoeModel, count: int, length: int, *, beams: int = 4, temperature: float = 1.2, seed: int = 0
) -> Tensor:
    """``count`` windows of ``length`` tokens that the model itself writes, int64, steered to use all experts.

    After MoEQuant's expert-balanced self-sampling: every window begins with a random token and grows by ``beams``
    candidates for each of ``beams`` beginnings, drawn from the model's distribution. Kept are the ``beams`` with the
    least ``nll + imbalance / temperature``: the mean negative log-likelihood of its tokens, and :func:`imbalance` of
    the loads of all windows so far and this one. A high temperature is sampling alone.

    Needs a model whose attention keeps keys and values. Raises ``ValueError`` for counts below 1, fewer than 2 tokens
    or a temperature that is not above 0.
    """
    if count < 1 or length < 2 or beams < 1 or not temperature > 0:
        raise ValueError("count and beams must be at least 1, length at least 2 and temperature above 0, got "
                         f"{count}, {beams}, {length} and {temperature}")
    generator = torch.Generator().manual_seed(seed)
    was_training = moe.model.training
    moe.model.eval()
    done, loads = [], torch.zeros(len(moe.moe), moe.num_experts, dtype=torch.float64)
    for _ in range(count):
        writer = _Writer(moe, beams, temperature, loads, generator)
        while writer.ids.shape[1] < length:
            writer.grow()
        ids, loads = writer.best()
        done.append(ids)
    moe.model.train(was_training)
    return torch.stack(done)


class _Writer:
    """The beginnings ``ids [beams, t]`` of one window, their loads ``[beams, L, E]`` and negative log-likelihoods."""

    def __init__(self, moe: MoeModel, beams: int, temperature: float, loads: Tensor, generator: torch.Generator):
        self.moe, self.temperature, self.before, self.generator = moe, temperature, loads, generator
        self.device = next(moe.model.parameters()).device
        vocabulary = moe.model.config.vocab_size
        first = torch.randint(vocabulary, (1, 1), generator=generator)
        self.ids = first.expand(beams, 1)
        self.loads = torch.zeros(beams, *loads.shape, dtype=torch.float64)
        self.nll, self.cache = torch.zeros(beams, dtype=torch.float64), None

    def _step(self) -> Tensor:
        """Feed the last tokens; log-probabilities ``[beams, vocabulary]`` of the next ones."""
        with ExitStack() as stack:
            for row, layer in enumerate(self.moe.moe):
                def seen(routed: Routed, output: Tensor, row: int = row) -> None:
                    ids = routed.ids.cpu().long()
                    self.loads[:, row].scatter_add_(1, ids, torch.ones(ids.shape, dtype=torch.float64))

                stack.enter_context(watch_experts(layer, seen))
            out = call(
                self.moe.model, input_ids=self.ids[:, -1:].to(self.device), past_key_values=self.cache, use_cache=True
            )
        self.cache = out.past_key_values
        return out.logits[:, -1].double().log_softmax(-1).cpu()

    def _scores(self, nll: Tensor, beam: Tensor) -> Tensor:
        spread = torch.tensor([imbalance((self.before + one).numpy()) for one in self.loads], dtype=torch.float64)
        return nll / self.ids.shape[1] + spread[beam] / self.temperature

    def grow(self) -> None:
        """Extend the window by one token: draw candidates and keep the best."""
        logs = self._step()
        beams = len(self.ids)
        drawn = torch.multinomial(logs.exp(), beams, generator=self.generator)
        # at first all beginnings are the same: only one of them grows
        beam = torch.arange(1 if self.ids.shape[1] == 1 else beams).repeat_interleave(beams)
        token = drawn[: beam.max() + 1].flatten()
        nll = self.nll[beam] - logs[beam, token]
        kept = self._scores(nll, beam).argsort(stable=True)[:beams]
        beam, self.nll = beam[kept], nll[kept]
        self.ids = torch.cat([self.ids[beam], token[kept, None]], 1)
        self.loads = self.loads[beam]
        self.cache.reorder_cache(beam.to(self.device))

    def best(self) -> tuple[Tensor, Tensor]:
        """Return the best window, and the loads that include it."""
        chosen = int(self._scores(self.nll, torch.arange(len(self.ids))).argmin())
        return self.ids[chosen].clone(), self.before + self.loads[chosen]
