"""Calibration windows that use all experts evenly, out of a larger pool of text.

MoEQuant (arXiv 2505.03804) and EAQuant (arXiv 2506.13329) calibrate on text that gives every expert enough tokens;
MoEQuant lets the model write such text itself (expert-balanced self-sampling). Here windows of real text are chosen to
the same end: greedily, the window that brings the layers' loads closest to even. With ``n[l, i]`` the tokens that
expert ``i`` of layer ``l`` has seen so far, it minimises ``sum_l sum_i (n[l, i] - mean_i n[l, i])^2``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gemq.algorithms.router_alignment import chosen_experts
from gemq.models import MoeModel


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
