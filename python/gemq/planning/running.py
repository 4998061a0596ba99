"""Predict running the result: its memory on a device, the longest context that fits, and the bits at which it would
run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gemq.generation.decoding import PREFILL_TOKENS
from gemq.generation.memory import cache_bytes_per_token, state_bytes_per_row
from gemq.models.ends import ends_of
from gemq.nn import LowBitEmbedding, TiedHead
from gemq.packed_model import tower_prefixes
from gemq.planning.machine import Machine
from gemq.planning.memory import CONTEXT, PROCESS
from gemq.planning.model_parts import ModelParts
from gemq.planning.output import experts_bytes, matrix_bytes, resident_bytes

# budgets that are tried lie this far apart
_STEP = 0.25


@dataclass(frozen=True)
class Inference:
    """Bytes of a packed model that runs: its ``weights`` in the layout of the device's kernels, the ``cache``, and
    the logits and hidden states of a prompt; ``process`` is what the device or the host holds besides. ``read`` is
    what one decoded token of one row reads of them.

    ``free`` are the device's free bytes (on a CPU the host's), None where they are not known. ``longest`` is the
    longest context of as many rows that would fit, at most the model's positions; 0 where no token would.
    """

    weights: int
    cache: int
    working: int
    read: int
    process: int = 0
    free: int | None = None
    longest: int | None = None

    @property
    def total(self) -> int:
        """Sum of all bytes."""
        return self.weights + self.cache + self.working + self.process

    @property
    def fits(self) -> bool:
        """Tell if it runs in the free memory, or if that is unknown."""
        return self.free is None or self.total <= self.free


def inference_of(
    model: nn.Module, parts: ModelParts, machine: Machine, rows: int, context: int, stored: torch.dtype
) -> Inference:
    """Memory that ``rows`` sequences of ``context`` tokens take with a packed ``model`` without storage."""
    layout = "cpu_tile" if machine.on_cpu else "gpu_tile"
    weights = resident_bytes(model, layout, stored)
    state = rows * state_bytes_per_row(model)
    # of a prompt, a chunk at a time: hidden states and the widest inner activation of every token; and the last
    # token's logits
    inner = max(parts.top_k * (parts.expert_rows + parts.intermediate), max(3 * layer.mlp for layer in parts.layers))
    token, per_token = rows * cache_bytes_per_token(model), (4 * parts.hidden + inner) * stored.itemsize
    logits = rows * parts.vocabulary * 8

    def working(length: int) -> int:
        return min(rows * length, PREFILL_TOKENS) * per_token + logits

    unread = _embedding_bytes(model, stored) * (parts.vocabulary - rows) // parts.vocabulary
    read = weights - _not_read(model, parts, layout) - _tower_bytes(model, stored) - unread
    free = machine.host_free if machine.on_cpu else machine.device_free
    process = PROCESS if machine.on_cpu else CONTEXT
    longest = None
    if free is not None:
        left = free - weights - state - process
        own: Any = model.config
        positions = own.get_text_config().max_position_embeddings
        longest = _most(lambda length: length * token + working(length) <= left, positions)
    return Inference(weights, state + context * token, working(context), read, process, free, longest)


def _not_read(model: nn.Module, parts: ModelParts, layout: str) -> int:
    """Bytes of the experts that a token is not routed to."""
    return experts_bytes(model, layout) * (parts.experts - parts.top_k) // parts.experts


def _tower_bytes(model: Any, stored: torch.dtype) -> int:
    """Bytes of vision and audio towers, which a decoded token does not read."""
    towers = tower_prefixes(model)
    return sum(p.numel() for name, p in model.named_parameters() if name.startswith(towers)) * stored.itemsize


def _embedding_bytes(model: Any, stored: torch.dtype) -> int:
    """Bytes of the embedding, of which a step reads a row a sequence; 0 where it is the head as well."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, LowBitEmbedding):
        tied = f"{ends_of(model).head_path}.weight" in model.all_tied_weights_keys
        return 0 if tied else embedding.weight.numel() * stored.itemsize
    bits, n, k, group_size = embedding.matrix
    if isinstance(head, TiedHead):
        return 0
    return matrix_bytes(n, k, bits, group_size, "canonical")


def _most(fits: Callable[[int], bool], limit: int) -> int:
    """Largest number up to ``limit`` that fits, given that all smaller ones do; 0 if 1 does not."""
    low, high = 0, limit + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def bits_that_run(lowest: float, highest: float, runs: Callable[[float], bool]) -> float | None:
    """The highest multiple of a quarter bit in ``lowest .. highest`` at which the result ``runs``; None if at
    none."""
    first, last = math.ceil(lowest / _STEP - 1e-9), math.floor(highest / _STEP + 1e-9)
    budgets = [_STEP * count for count in range(first, last + 1)]
    found = _most(lambda count: runs(budgets[count - 1]), len(budgets))
    return budgets[found - 1] if found else None
