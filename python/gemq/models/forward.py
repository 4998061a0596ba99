"""Calls of a model's forward that no switch of its config changes.

``config.json`` may say ``output_router_logits``, ``return_dict: false``, ``output_hidden_states`` and the like. A call
that leaves them out gets other outputs, tuples or an error. gemq gives every one of them with each call: by
:func:`call`, or by :func:`switches` to a module that calls no other with a config of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def decoder_of(model: Any) -> Any:
    """The module of a causal language model or wrapper that holds the decoder layers, as ``layers``, if any does."""
    decoder = model.get_decoder()
    # Llama 4 gives its text model with the head, around the decoder
    return decoder if hasattr(decoder, "layers") else getattr(decoder, "model", decoder)


SWITCHES = {
    "output_attentions": False, "output_hidden_states": False, "output_router_logits": False, "return_dict": True,
}


def switches(module: nn.Module, **more: Any) -> dict[str, Any]:
    """The keyword arguments of :data:`SWITCHES` and ``more`` that the forward of ``module`` takes.

    ``module`` is a causal language model or its decoder. ``use_cache`` is for the caller to say, as one of ``more``.
    """
    parameters = inspect.signature(module.forward).parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {name: value for name, value in (SWITCHES | more).items() if takes_all or name in parameters}


def call(module: nn.Module, **arguments: Any) -> Any:
    """The outputs of ``module``, a causal language model or its decoder, for ``arguments`` and the switches."""
    with _named_outputs(module):
        return module(**switches(module, **arguments))


@contextmanager
def _named_outputs(module: nn.Module) -> Iterator[None]:
    """Have transformers' modules give one another outputs with names: a causal language model takes ``return_dict`` for
    itself, and its decoder then goes by the config."""
    config: Any = getattr(module, "config", None)
    before = getattr(config, "return_dict", True)
    if before:
        yield
        return
    config.return_dict = True
    try:
        yield
    finally:
        config.return_dict = before
