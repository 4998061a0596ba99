"""Compare the routers of a quantized model with the original's: their weights, and the experts they select."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from gemq.algorithms.layerwise import Routed, watch_experts
from gemq.models import MoeModel
from gemq.models.forward import call

# windows that selections are compared on: 8 x 2048 tokens tell shares apart to a tenth of a percent
WINDOWS = 8


@dataclass(frozen=True)
class LayerShift:
    """One layer: relative change of the router's ``weights`` (Frobenius norm) and the share of ``selected`` experts
    that the original model does not select for the same token."""

    weights: float
    selected: float


def shift_of(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> LayerShift:
    """Compute the shift from a router's ``(weight [E, H], selected experts [tokens, k])`` before and after."""
    moved = float((after[0] - before[0]).norm() / before[0].norm().clamp(min=1e-30))
    same = (after[1][:, :, None] == before[1][:, None, :]).any(-1)
    return LayerShift(moved, 1.0 - float(same.float().mean()))


class RouterShift:
    """Routers and selected experts of a model in its current state, to compare with the quantized model's.

    ``windows`` is int64 ``[N, T]``; the first 8 are run once here and once per comparison.
    """

    @torch.no_grad()
    def __init__(self, moe: MoeModel, windows: Tensor):
        self._windows = windows[:WINDOWS]
        self._weights = [p.detach().float().cpu().clone() for p in moe.routers]
        self._selected = _selected(moe, self._windows)

    @torch.no_grad()
    def compare(self, moe: MoeModel) -> dict[int, LayerShift]:
        """The shift of every MoE layer by decoder layer index."""
        found = {}
        now = _selected(moe, self._windows)
        for at, layer in enumerate(moe.moe):
            weight = layer.router.weight.detach().float().cpu()
            found[layer.index] = shift_of((self._weights[at], self._selected[at]), (weight, now[at]))
        return found


def _selected(moe: MoeModel, windows: Tensor) -> list[Tensor]:
    """Expert ids ``[tokens, k]`` by MoE layer, one window at a time."""
    seen: list[list[Tensor]] = [[] for _ in moe.moe]
    device, was_training = next(moe.model.parameters()).device, moe.model.training
    moe.model.eval()
    with ExitStack() as stack:
        for at, layer in enumerate(moe.moe):
            def keep(routed: Routed, output: Tensor, at: int = at) -> None:
                seen[at].append(routed.ids.short().cpu())

            stack.enter_context(watch_experts(layer, keep))
        for window in windows:
            call(moe.decoder, input_ids=window[None].to(device), use_cache=False)
    moe.model.train(was_training)
    return [torch.cat(ids) for ids in seen]
