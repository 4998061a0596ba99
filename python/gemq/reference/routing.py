"""Routing in plain torch: from router logits to experts and their weights."""

from __future__ import annotations

import torch
from torch import Tensor


def topk_routing(
    logits: Tensor, top_k: int, *, scoring: str = "softmax", normalize: bool = True, scale: float = 1.0,
    bias: Tensor | None = None, compute_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """``(weights [T, top_k], ids int32 [T, top_k])``, largest first, ties by index; see
    :func:`gemq.ops.topk_routing`."""
    wide = logits.to(compute_dtype)
    score = wide.softmax(-1) if scoring == "softmax" else wide.sigmoid()
    choice = score if bias is None else score + bias.to(compute_dtype)
    ids = torch.sort(choice, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = score.gather(1, ids)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * scale, ids.to(torch.int32)
