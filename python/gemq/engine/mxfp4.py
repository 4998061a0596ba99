"""Read experts that are published in MXFP4 (gpt-oss): 4-bit floats in blocks of 32 that share a power of two.

OCP Microscaling Formats (MX) v1.0: an element is E2M1, a scale E8M0. A checkpoint has, for a parameter of experts
``[E, k, n]``, ``{name}_blocks`` uint8 ``[E, n, k / 32, 16]``, two elements a byte, the first in the low half, and
``{name}_scales`` uint8 ``[E, n, k / 32]``, exponents with a bias of 127.
"""

from __future__ import annotations

import torch
from torch import Tensor

PARTS = ("_blocks", "_scales")
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_MAGNITUDES, *(-value for value in _MAGNITUDES))
BLOCK = 32


def parameter_of(tensor: str) -> str | None:
    """The parameter that a tensor of a checkpoint is a part of by its name; None for any other."""
    return next((tensor.removesuffix(part) for part in PARTS if tensor.endswith(part)), None)


def shapes(parameter: list[int]) -> dict[str, list[int]]:
    """The shapes of both parts of a parameter ``[E, k, n]``."""
    experts, k, n = parameter
    return {"_blocks": [experts, n, k // BLOCK, BLOCK // 2], "_scales": [experts, n, k // BLOCK]}


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """The parameter ``[E, k, n]`` in bfloat16, which holds every value of MXFP4 exactly."""
    values = torch.tensor(_VALUES, dtype=torch.bfloat16, device=blocks.device)
    out = torch.empty(blocks.shape[0], blocks.shape[2] * BLOCK, blocks.shape[1], dtype=torch.bfloat16)
    for expert, (codes, exponents) in enumerate(zip(blocks, scales, strict=True)):
        pairs = torch.stack([values[(codes & 15).int()], values[(codes >> 4).int()]], -1).flatten(-2)
        weight = torch.ldexp(pairs.float(), exponents.int()[..., None] - 127)
        out[expert] = weight.flatten(1).T
    return out
