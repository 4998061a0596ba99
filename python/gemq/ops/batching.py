"""``torch.func.vmap`` of the products: the mapped dimension becomes more tokens of one call."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def _front(value: Any, dim: int | None, size: int) -> Any:
    """``value`` with its mapped dimension first; without one, repeated along a new first dimension."""
    if not isinstance(value, Tensor):
        return value
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


def _refuse_mapped(names: str, dims: tuple[int | None, ...]) -> None:
    if any(dim is not None for dim in dims):
        raise NotImplementedError(f"vmap over {names} of packed weights is not supported: map over activations")


def dense(op):
    """Return the vmap rule of a product of one packed matrix, whose first argument is ``x [..., k]``."""
    def rule(info, in_dims, x, *rest):
        _refuse_mapped("the buffers", in_dims[1:3])
        return op(x.movedim(in_dims[0], 0).contiguous(), *rest), 0

    return rule


def routed(op, ids: int):
    """Return the vmap rule of a product over experts. Argument 0 is ``x``; argument ``ids`` and the one after it are
    the routing. All have tokens first."""
    def rule(info, in_dims, *arguments):
        _refuse_mapped("the buffers", in_dims[1:ids])
        size = info.batch_size
        moved = list(arguments)
        for at in (0, ids, ids + 1):
            if isinstance(moved[at], Tensor):
                value = _front(moved[at], in_dims[at], size)
                moved[at] = value.reshape(-1, *value.shape[2:]).contiguous()
        out = op(*moved)
        return out.view(size, -1, *out.shape[1:]), 0

    return rule
