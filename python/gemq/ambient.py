"""Modes of torch that a caller may have switched on around a call, and work that must not depend on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_AUTOCASTING = ("cpu", "cuda")


@contextmanager
def plain_torch(inference: bool = False) -> Iterator[None]:
    """Torch as it starts, inside the block: gradients on, no inference mode, no autocast, float32 by default, CPU
    tensors by default. ``inference`` asks for inference mode instead of gradients.

    Weights are computed to the same bytes whatever is around the call. A function mode of the caller's stays.
    """
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
