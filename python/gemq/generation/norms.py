"""RMS norms of transformers' models: one call, or as a vector and a number."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# their weight is what is added to 1
_FROM_ONE = ("Qwen3NextRMSNorm", "Qwen3_5MoeRMSNorm")


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    """Apply an RMSNorm of transformers, in one call where its weight is the factor, in the dtype of ``x``."""
    weight = getattr(norm, "weight", None)
    if weight is None or weight.dtype != x.dtype or not hasattr(norm, "variance_epsilon"):
        return norm(x)
    return F.rms_norm(x, weight.shape, weight, norm.variance_epsilon)


def factors(norm: Any, width: int) -> Tensor:
    """The factors float32 ``[width]`` of a norm, ones for one without a weight."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        return torch.ones(width)
    return weight.detach().float() + (1.0 if type(norm).__name__ in _FROM_ONE else 0.0)


def epsilon(norm: Any) -> float:
    """The number that a norm adds to the mean square."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
