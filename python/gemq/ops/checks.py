"""Argument checks shared by the ops: one clear error that names what was given and what is allowed."""

from __future__ import annotations

import weakref
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from gemq import format as fmt

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_debug = False


def set_debug(on: bool) -> None:
    """Make the products raise ``ValueError`` on an expert id outside ``0..E - 1`` instead of taking it as padding.

    For finding a router that is wrong; off by default. It holds for the whole process, modules included. Each call
    reads its ids, which on CUDA waits for the device, so it cannot run while a CUDA graph is captured.
    """
    global _debug
    _debug = bool(on)


def expert_ids(topk_ids: Tensor, experts: int) -> None:
    """Raise ``ValueError`` naming the first id that is not an expert's. Only in debug mode (:func:`set_debug`)."""
    if not _debug:
        return
    outside = (topk_ids < 0) | (topk_ids >= experts)
    if bool(outside.any()):
        token, slot = divmod(int(outside.flatten().int().argmax()), topk_ids.shape[1])
        raise ValueError(
            f"topk_ids[{token}, {slot}] is {int(topk_ids[token, slot])}, but the experts are 0..{experts - 1}: "
            f"{int(outside.sum())} of {outside.numel()} ids are outside (set_debug(False) takes them as padding)"
        )


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
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {value.layout}")
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


def size(name: str, value: int) -> int:
    """Return a number of rows or columns, else raise ``TypeError`` or ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return value


def device_code(name: str, value: Tensor) -> int:
    """Return 0 for a CPU tensor and 1 for CUDA. Raises ``ValueError`` for other devices."""
    if value.device.type == "cpu":
        return 0
    if value.device.type == "cuda":
        return 1
    raise ValueError(f"{name} must be on a CPU or CUDA device, got {value.device}")


def stream(value: Tensor) -> int:
    """The current CUDA stream of a tensor's device; 0 for a CPU tensor."""
    return torch.cuda.current_stream(value.device).cuda_stream if value.is_cuda else 0


def size_at_least(name: str, value: Tensor, elements: int, why: str) -> None:
    """Raise ``ValueError`` if a buffer holds fewer than ``elements`` elements."""
    if value.numel() < elements:
        raise ValueError(f"{name} holds {value.numel()} elements, but {why} needs {elements}")


def metadata(name: str, value: Tensor, n: int, k: int, group_size: int) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless ``value`` is the ``(s, m)`` of an ``n`` x ``k`` matrix."""
    tensor(name, value, dtype=torch.float16, dim=3, contiguous=False)
    wanted = [n, k // group_size, 2]
    if list(value.shape) != wanted:
        raise ValueError(f"{name} must have shape {wanted} for groups of {group_size}, got {list(value.shape)}")


@lru_cache(maxsize=256)
def _limits(n: int, k: int, group_size: int, layout: str, code_bytes: int, meta_elements: int) -> np.ndarray:
    """First offsets ``[2, 9]`` into the codes and metadata, by width, from which one expert is no longer inside the
    buffers."""
    sizes = [
        (fmt.codes_bytes(n, k, bits, layout), fmt.meta_elements(n, k, bits, group_size, layout))
        for bits in range(fmt.MAX_BITS + 1)
    ]
    limits = np.maximum(np.array([code_bytes, meta_elements]) - np.array(sizes) + 1, 0).astype(np.uint64)
    limits[0] = np.iinfo(np.uint64).max
    return np.ascontiguousarray(limits.T)


def expert_bounds(name: str, stack: tuple[Tensor, ...], n: int, k: int, group_size: int, layout: str) -> None:
    """Raise ``ValueError`` naming the first expert whose width or offsets lead out of the stack's buffers.

    For tables on the CPU. Offsets of experts of 0 bits are not looked at.
    """
    qweight, meta, *tables = stack
    # viewed as unsigned numbers, negative widths and offsets are large ones
    widths, *offsets = (t.numpy().view(u) for t, u in zip(tables, (np.uint32, np.uint64, np.uint64), strict=True))
    if widths.size and widths.max() > fmt.MAX_BITS:
        e = int((widths > fmt.MAX_BITS).argmax())
        fmt.check_bits(int(tables[0][e]), allow_zero=True, name=f"{name} expert_bits[{e}]")
    limits = _limits(n, k, group_size, layout, qweight.numel(), meta.numel())
    labels = (("expert_offsets", "qweight"), ("meta_offsets", "meta"))
    for (label, buffer), held, at, limit in zip(labels, (qweight, meta), offsets, limits, strict=True):
        outside = at >= limit[widths]
        if outside.any():
            e = int(outside.argmax())
            raise ValueError(
                f"{name} {label}[{e}] is {at.view(np.int64)[e]}, where the {n} x {k} of expert {e} at {widths[e]} bits "
                f"in {layout} are not inside the {held.numel()} elements of {buffer}"
            )


class SeenStacks:
    """Stacks that passed their checks, recognised by identity: the same tensor objects over the same memory.

    The contents of the tables are not remembered: they are checked wherever they are read.
    """

    def __init__(self) -> None:
        self._entries: dict[int, tuple[list[weakref.ref], tuple, list[tuple[int, int]]]] = {}

    @staticmethod
    def _memory(stack: tuple[Tensor, ...]) -> list[tuple[int, int]]:
        return [(t.data_ptr(), t.numel()) for t in stack]

    def knows(self, stack: tuple[Tensor, ...], shape: tuple) -> bool:
        """Return True if :meth:`add` was called with these tensors and this shape, and their memory is unchanged."""
        entry = self._entries.get(id(stack[0])) if len(stack) == 5 else None
        if entry is None or entry[1] != shape:
            return False
        for ref, value in zip(entry[0], stack, strict=True):
            if ref() is not value:
                return False
        return entry[2] == self._memory(stack)

    def add(self, stack: tuple[Tensor, ...], shape: tuple) -> None:
        """Remember a stack for as long as its first tensor lives."""
        if any(type(value) is not Tensor for value in stack):
            return  # tensors that stand for others, as in tracing, may have no memory
        key = id(stack[0])
        first = weakref.ref(stack[0], lambda _: self._entries.pop(key, None))
        self._entries[key] = ([first, *map(weakref.ref, stack[1:])], shape, self._memory(stack))


SEEN = SeenStacks()


def no_tangent(*values: Tensor | None) -> None:
    """Raise ``NotImplementedError`` for a dual tensor of ``torch.autograd.forward_ad``: torch's custom ops would drop
    its derivative without a word."""
    if torch.autograd.forward_ad._current_level < 0:
        return
    for value in values:
        if value is not None and torch.autograd.forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError("the low-bit products have no forward-mode derivative (forward_ad, jvp); "
                                      "backward-mode gradients work")


def unwatched(x: Tensor, *others: Tensor | None) -> bool:
    """Return True if torch's dispatcher may be bypassed for an op on these tensors: no gradient, tracing, mode or
    transform is active.

    An op or a module may then call its kernel directly, which saves 10 to 50 microseconds, more than a small kernel
    takes. All such calls are decided by this function.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state():
        return False
    if torch.autograd._profiler_enabled() or torch.autograd.forward_ad._current_level >= 0:
        return False  # the one shows ops, the other needs their derivatives
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    grad = torch.is_grad_enabled()
    for t in (x, *others):
        if t is not None and (type(t) not in (Tensor, Parameter) or (grad and t.requires_grad)):
            return False
    return True


def routing(x: Tensor, topk_ids: Tensor, topk_weights: Tensor | None) -> None:
    """Check the routing of tokens ``x``: ids and, if there are any, weights ``[T, top_k]``."""
    tensor("topk_ids", topk_ids, dtype=(torch.int32, torch.int64), dim=2, device=x.device, contiguous=False)
    if x.shape[0] != topk_ids.shape[0]:
        raise ValueError(f"x has {x.shape[0]} tokens, topk_ids {topk_ids.shape[0]}")
    if topk_ids.shape[1] == 0:
        raise ValueError(f"topk_ids must have at least one slot a token, got shape {list(topk_ids.shape)}")
    if topk_weights is not None:
        tensor("topk_weights", topk_weights, dtype=FLOATS, dim=2, device=x.device, contiguous=False)
        if topk_weights.shape != topk_ids.shape:
            raise ValueError(f"topk_weights {list(topk_weights.shape)} must match topk_ids {list(topk_ids.shape)}")


def bias(name: str, value: Tensor | None, experts: int, rows: int, device: torch.device) -> None:
    """Check a bias float32 ``[experts, rows]``, or None."""
    if value is None:
        return
    tensor(name, value, dtype=torch.float32, dim=2, device=device)
    if tuple(value.shape) != (experts, rows):
        raise ValueError(f"{name} must be {[experts, rows]}, got {list(value.shape)}")
