"""Lower bound of a step's time: the bytes of weights that it reads, divided by the device's copy bandwidth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemq import format as fmt
from gemq.generation import Decoding
from gemq.nn import LowBitExperts, TiedHead
from gemq.nn.experts import PROJECTIONS

_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 28}


@dataclass(frozen=True)
class Roofline:
    """``bytes_per_step`` of weights read by one decoding step, of it ``expert_bytes`` of routed experts; the measured
    copy ``bandwidth`` in bytes a second (read and written ones counted); the ``share`` of the bound that was reached:
    bytes / bandwidth / median step."""

    bytes_per_step: float
    expert_bytes: float
    bandwidth: float
    share: float


def copy_bandwidth(device: torch.device, repeats: int = 10) -> float:
    """Bytes a second, read and written together, of copying a tensor larger than any cache; the median."""
    source = torch.ones(_COPY_BYTES.get(device.type, 1 << 28), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats + 2):
        _wait(device)
        start = time.perf_counter()
        target.copy_(source)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / statistics.median(seconds[2:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def expert_sizes(experts: Any) -> list[int]:
    """Bytes of each expert of a packed or unquantized ``experts`` module."""
    if not isinstance(experts, LowBitExperts):
        stacks = (experts.gate_up_proj, experts.down_proj)
        return [sum(s[0].numel() * s.element_size() for s in stacks)] * len(stacks[0])
    sizes = [0] * experts.num_experts
    for name in PROJECTIONS:
        n, k = experts.shape(name)
        for e, bits in enumerate(experts.bits[name]):
            sizes[e] += fmt.codes_bytes(n, k, bits, experts.layout)
            sizes[e] += 2 * fmt.meta_elements(n, k, bits, experts.group_sizes[name], experts.layout)
    return sizes


def other_bytes(model: Any, batch: int) -> int:
    """Weights that every step reads: all but the routed experts and, of the embedding, all but the batch's rows."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    own = _tensors(embedding)
    tied = isinstance(head, TiedHead) or any(t is own[0] for t in head.parameters())
    counted, total = set() if tied else {id(t) for t in own}, 0
    for path, module in model.named_modules():
        if path.endswith(".experts"):
            continue
        for tensor in _tensors(module):
            if id(tensor) not in counted:
                counted.add(id(tensor))
                total += tensor.numel() * tensor.element_size()
    return total + batch * sum(t.nbytes for t in own) // embedding.num_embeddings


def _tensors(module: nn.Module) -> list[Tensor]:
    """Tensors of a checkpoint that a module itself holds: parameters, packed weights, correction biases of routers."""
    buffers = module.named_buffers(recurse=False)
    found = [b for name, b in buffers if name not in module._non_persistent_buffers_set]
    return [*found, *module.parameters(recurse=False)]


class _Routing:
    """Bytes of the distinct experts that each call of a model's ``experts`` modules reads."""

    def __init__(self, model: nn.Module):
        self.total, self.calls = 0, 0
        self.hooks = []
        for path, module in model.named_modules():
            if path.endswith(".experts"):
                self.hooks.append(module.register_forward_pre_hook(self._count(expert_sizes(module))))

    def _count(self, sizes: list[int]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            self.total += sum(sizes[e] for e in arguments[1].unique().tolist())
            self.calls += 1

        return hook

    def remove(self) -> float:
        """Remove the hooks; returns the mean bytes of one step over all layers."""
        for hook in self.hooks:
            hook.remove()
        return self.total / max(self.calls, 1) * len(self.hooks)


def expert_bytes_per_step(model: nn.Module, decoding: Decoding) -> float:
    """Bytes of routed experts that a step of ``decoding`` reads, counted over its steps (one by one, uncompiled)."""
    tokens = iter(decoding)
    next(tokens)
    routing = _Routing(model)
    try:
        for _ in tokens:
            pass
    finally:
        found = routing.remove()
    return found
