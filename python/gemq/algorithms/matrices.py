"""Quantize the matrices of one decoder layer with GPTQ: a group of experts at once, or its linears."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from gemq.algorithms.gptq import GptqConfig, GptqReport, gptq
from gemq.algorithms.layerwise import Hessian
from gemq.format import default_group_size
from gemq.nn.experts import QuantizedStack
from gemq.reference.grid import dequantize_codes
from gemq.widths import Widths

# quantizer(weights [E, n, k], Hessians, bits, config) quantizes a group of experts in place of GPTQ
Quantizer = Callable[[Tensor, list[Hessian], list[int], GptqConfig], tuple[QuantizedStack, dict[int, GptqReport]]]


@dataclass
class QuantizedWeights:
    """Quantized weights of a model, or of one decoder layer: per layer index the two expert stacks, per module path
    ``(codes, meta, bits)``; ``reports`` by module path (experts: ``path.expert.projection``)."""

    widths: Widths
    group_size: int
    stacks: dict[int, tuple[QuantizedStack, QuantizedStack]] = field(default_factory=dict)
    linears: dict[str, tuple[Tensor, Tensor, int]] = field(default_factory=dict)
    reports: dict[str, GptqReport] = field(default_factory=dict)


# bytes of a batch of matrices on a CPU: memory that is reused is neither mapped nor fetched again
_BATCH_BYTES = 64 << 20


def _batches(matrices: list[int], weights: Tensor) -> list[list[int]]:
    """Matrices ``[n, k]`` to be quantized together: some on a CPU, all on a device that needs many to be busy."""
    n, k = weights.shape[1:]
    # the Hessian and its factor; the weights, what is carried and products
    size = _BATCH_BYTES // (4 * (2 * k * k + 3 * n * k)) if weights.device.type == "cpu" else len(matrices)
    return [matrices[at : at + max(1, size)] for at in range(0, len(matrices), max(1, size))]


def quantize_experts(
    weights: Tensor, hessians: list[Hessian], bits: list[int], config: GptqConfig
) -> tuple[QuantizedStack, dict[int, GptqReport]]:
    """Quantize ``weights [E, n, k]`` in batches of experts above 0 bits; reports are by expert."""
    size = default_group_size(weights.shape[-1], config.group_size)
    codes: list[Tensor | None] = [None] * len(bits)
    meta: list[Tensor | None] = [None] * len(bits)
    reports = {e: GptqReport(hessians[e].tokens, 0.0, "", 1.0) for e, width in enumerate(bits) if not width}
    for batch in _batches([e for e, width in enumerate(bits) if width], weights):
        hessian = torch.stack([hessians[e].value for e in batch])
        tokens = [hessians[e].tokens for e in batch]
        found, pairs, report = gptq(weights[batch], hessian, [bits[e] for e in batch], tokens, config, size)
        for at, e in enumerate(batch):
            codes[e], meta[e], reports[e] = found[at], pairs[at], report[at]
    return QuantizedStack(codes, meta, list(bits)), reports


def dequantized(stack: QuantizedStack, like: Tensor) -> Tensor:
    """Return the experts of a stack dequantized, ``[E, n, k]`` as ``like`` in shape and dtype; 0 bits give zero."""
    found = torch.zeros_like(like)
    for e, (codes, meta) in enumerate(zip(stack.codes, stack.meta, strict=True)):
        if codes is not None and meta is not None:
            found[e] = dequantize_codes(codes, meta, like.dtype)
    return found


def quantize_linear(
    linear: nn.Linear, hessian: Hessian, bits: int, config: GptqConfig
) -> tuple[Tensor, Tensor, GptqReport]:
    """Quantize the weight ``[n, k]`` of a linear, or of a router; returns codes, scales with offsets, and the report.
    """
    size = default_group_size(linear.weight.shape[-1], config.group_size)
    weight = linear.weight.detach()[None]
    codes, meta, (report,) = gptq(weight, hessian.value[None], [bits], [hessian.tokens], config, size)
    return codes[0], meta[0], report
