"""Isolate work from the modes of torch that a caller may have switched on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch

_AUTOCASTING = ("cpu", "cuda")
F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def plain_torch(inference: bool = False) -> Iterator[None]:
    """Set torch's default modes inside the block: gradients on, no inference mode, no autocast, float32 and CPU tensors
    by default. ``inference`` selects inference mode instead of gradients."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(inference))
        if not inference:
            stack.enter_context(torch.enable_grad())
        for kind in _AUTOCASTING:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


def _is_plain() -> bool:
    autocast = any(torch.is_autocast_enabled(kind) for kind in _AUTOCASTING)
    return not autocast and torch.get_default_dtype() == torch.float32 and torch.get_default_device().type == "cpu"


def plain_inference(function: F) -> F:
    """Run ``function`` in inference mode with torch's default modes otherwise. If no other mode is switched on, it
    costs no more than inference mode alone, so it suits functions that run once a token."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode() if _is_plain() else plain_torch(inference=True):
            return function(*args, **kwargs)

    return cast(F, call)
