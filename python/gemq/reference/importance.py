"""Eq. 6 by plain autograd through a model that is whole in memory.

``c[i, b] = sum over tokens, d of (g_d * dz_d)^2`` with ``g`` the gradient of the windows' mean losses at the output of
an MoE layer's experts, and ``dz = w_i * (E_i(x) - E_i^b(x))`` (GEMQ, arXiv 2605.23078).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class ExpertCall:
    """Arguments of a call of a layer's experts, ``x [T, H]``, ``ids [T, k]``, ``weights [T, k]``, and the gradient at
    their output ``[T, H]``."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    gradient: Tensor | None = None


def expert_calls(model: PreTrainedModel, experts: list[nn.Module], ids: Tensor) -> list[ExpertCall]:
    """Run a causal language model forward and backward on windows ``ids [B, T]``; by module of ``experts`` its call.

    The loss is the sum of the windows' mean losses.
    """
    calls: list[ExpertCall] = []

    def seen(module: nn.Module, args: tuple, output: Tensor) -> None:
        calls.append(ExpertCall(*(value.detach() for value in args)))
        output.register_hook(lambda g, call=calls[-1]: setattr(call, "gradient", g.detach()))

    handles = [module.register_forward_hook(seen) for module in experts]
    # frozen weights: the embeddings' output carries the graph
    first = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    try:
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            (loss / (ids.shape[1] - 1)).backward()
    finally:
        for handle in [*handles, first]:
            handle.remove()
    return calls


def expert_cost(
    call: ExpertCall, expert: int, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]
) -> float:
    """Eq. 6's sum over the tokens of one call if ``expert`` computes ``after(x)`` instead of ``before(x)``."""
    weight = (call.weights * (call.ids == expert)).sum(-1, keepdim=True)
    change = weight * (before(call.x) - after(call.x))
    assert call.gradient is not None
    return float((call.gradient.double() * change.double()).square().sum())
