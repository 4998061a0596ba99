"""Blocks that weight what goes into an expert instead of what comes out (Llama 4).

Such a block computes ``sum_j expert_j(w_j x)``, by giving all experts all tokens. Here it is made to call its experts
as others do, with ids: each slot's tokens, weighted, and 1 for the weight of the outputs.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def takes_inputs_alone(experts: nn.Module) -> bool:
    """True if an experts module takes the tokens of all its experts, ``[E * T, H]``, and no ids."""
    return list(inspect.signature(inspect.unwrap(type(experts).forward)).parameters) == ["self", "hidden_states"]


def routed_rows(hidden_states: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments of the same call by ids: inputs ``[R, H]``, ids ``[R, 1]`` and weights of 1 ``[R, 1]``.

    ``hidden_states [E * T, H]`` are what the module is given: rows of 0 are tokens that are not for that expert.
    """
    row = hidden_states.count_nonzero(-1).nonzero()
    return hidden_states[row[:, 0]], row // (len(hidden_states) // experts), hidden_states.new_ones(len(row), 1)


def call_by_ids(block: nn.Module) -> None:
    """Have a block with ``router``, ``shared_expert`` and ``top_k`` call ``experts(x, ids, weights)``, in place."""
    block.forward = partial(_forward, block)


def call_as_before(block: nn.Module) -> None:
    """Undo :func:`call_by_ids`, if it was done."""
    block.__dict__.pop("forward", None)


def _forward(block: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores, logits = block.router(x)
    weights, ids = scores.topk(block.top_k, dim=-1)
    out, ones = block.shared_expert(x), torch.ones_like(weights[:, :1])
    for slot in range(block.top_k):
        given = x * weights[:, slot, None]
        out = out + block.experts(given, ids[:, slot : slot + 1], ones)
    return out, logits
