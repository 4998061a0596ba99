"""Argument checks shared by the ops: one clear error that names what was given and what is allowed."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def tensor(
    name: str,
    value: Tensor,
    *,
    dtype: torch.dtype | tuple[torch.dtype, ...] | None = None,
    dim: int | tuple[int, ...] | None = None,
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``value`` is a tensor as described."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    dtypes = (dtype,) if isinstance(dtype, torch.dtype) else dtype
    if dtypes and value.dtype not in dtypes:
        allowed = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be {allowed}, got {str(value.dtype).removeprefix('torch.')}")
    dims = (dim,) if isinstance(dim, int) else dim
    if dims and value.dim() not in dims:
        raise ValueError(f"{name} must have {' or '.join(map(str, dims))} dimensions, got shape {list(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, but the other tensors are on {device}")
    if contiguous and not value.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {value.stride()} for shape {list(value.shape)}")


def device_code(name: str, value: Tensor) -> int:
    """0 for a CPU tensor, 1 for CUDA; other devices raise ``ValueError``."""
    if value.device.type == "cpu":
        return 0
    if value.device.type == "cuda":
        return 1
    raise ValueError(f"{name} must be on a CPU or CUDA device, got {value.device}")


def size_at_least(name: str, value: Tensor, elements: int, why: str) -> None:
    """Raise ``ValueError`` if a buffer holds fewer than ``elements`` elements."""
    if value.numel() < elements:
        raise ValueError(f"{name} holds {value.numel()} elements, but {why} needs {elements}")
