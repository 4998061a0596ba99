"""Options of a generation, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gemq.errors import CheckpointError

MAX_BATCH = 64
# torch.Generator.manual_seed takes values from 0 up to this
_MAX_SEED = 2**64 - 1


@dataclass(frozen=True)
class GenerationOptions:
    """Options by the names that transformers uses; the defaults are greedy.

    ``do_sample`` None samples exactly when a ``temperature`` above 0 is given. ``top_k`` 0 and ``top_p`` 1 are off
    (transformers' own default for ``top_k`` is 50). ``eos_token_id`` None takes the model's; ``ignore_eos`` ends no
    row before ``max_new_tokens``. ``seed``, below 2**64, fixes the samples: a generation of its own, so that two calls
    agree whatever ran between them.

    Raises ``ValueError`` or ``TypeError`` naming the option, what was given and what is allowed.
    """

    max_new_tokens: int = 64
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    ignore_eos: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, 1)
        _whole("top_k", self.top_k, 0)
        _whole("seed", self.seed, 0, _MAX_SEED)
        if self.temperature is not None:
            _number("temperature", self.temperature, 0.0, math.inf, "at least 0")
        _number("top_p", self.top_p, 0.0, 1.0, "in (0, 1]", open_low=True)
        _number("min_p", self.min_p, 0.0, 1.0, "in [0, 1]")
        _number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, "above 0", open_low=True)
        if self.do_sample and self.temperature == 0:
            raise ValueError("temperature must be above 0 with do_sample, got 0 (leave do_sample out for greedy)")
        for token in self.eos_tokens or ():
            _whole("eos_token_id", token, 0)
        if self.pad_token_id is not None:
            _whole("pad_token_id", self.pad_token_id, 0)

    @property
    def samples(self) -> bool:
        """True if tokens are drawn at random."""
        return bool(self.temperature) if self.do_sample is None else self.do_sample

    @property
    def eos_tokens(self) -> tuple[int, ...] | None:
        """``eos_token_id`` as a tuple; None where the model's are to be taken."""
        if self.ignore_eos:
            return ()
        given: Any = self.eos_token_id
        if given is None:
            return None
        return tuple(given) if isinstance(given, Sequence) and not isinstance(given, str | bytes) else (given,)


def _whole(name: str, value: int, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r:.60}")
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {allowed}, got {value if abs(value) < 10**30 else 'a number of many digits'}")


def _number(name: str, value: float, low: float, high: float, allowed: str, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number {allowed}, got {value!r}")
    try:
        value = float(value)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value) or not low <= value <= high or (open_low and value == low):
        raise ValueError(f"{name} must be {allowed}, got {value:g}")


def ending(options: GenerationOptions, model: Any) -> tuple[tuple[int, ...], int]:
    """``(end tokens, token that fills ended rows)``, from the options or else the model's generation config.

    Every one is a row of the model's embedding. ``ValueError`` for an option that is not. An end token of the config
    that is not can never come, and is left out; a padding token of it that is not is replaced by an end token, or 0.
    Raises :class:`CheckpointError` where the config holds something other than token ids.
    """
    rows, config = model.get_input_embeddings().num_embeddings, getattr(model, "generation_config", None)
    for name, given in (("eos_token_id", options.eos_tokens or ()), ("pad_token_id", (options.pad_token_id,))):
        for token in given:
            if token is not None:
                _whole(name, token, 0, rows - 1)
    eos = options.eos_tokens
    if eos is None:
        eos = tuple(token for token in _own(config, "eos_token_id") if 0 <= token < rows)
    if options.pad_token_id is not None:
        return eos, options.pad_token_id
    pad = [token for token in _own(config, "pad_token_id") if 0 <= token < rows]
    return eos, (*pad, *eos, 0)[0]


def _own(config: Any, name: str) -> tuple[int, ...]:
    """Token ids of a model's generation config."""
    value = getattr(config, name, None)
    found = (() if value is None else (value,)) if not isinstance(value, list | tuple) else tuple(value)
    for token in found:
        if isinstance(token, bool) or not isinstance(token, int):
            raise CheckpointError(f"{name} in the model's generation_config.json must be a token id or a list of them, "
                                  f"got {value!r:.60}")
    return found
