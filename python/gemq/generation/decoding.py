"""The decode loop: prefill in one forward (in chunks if long), then a whole step at a time over a static cache."""

from __future__ import annotations

import copy
import math
import time
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn

from gemq.ambient import plain_inference, plain_torch
from gemq.errors import GemqError
from gemq.generation import known
from gemq.generation.graph import GraphedStep
from gemq.generation.memory import cache_error, check_cache_fits, free_bytes
from gemq.generation.native import NativeStep
from gemq.generation.options import MAX_BATCH, GenerationOptions, ending
from gemq.generation.sampling import Sampler
from gemq.generation.states import KeyValues, Recurrent, State, fixed_states
from gemq.generation.step import LeanStep, ModelStep, Progress, capped
from gemq.models.ends import embedding_device
from gemq.models.families import check_supported
from gemq.models.forward import call, decoder_of

STEPS = ("auto", "native", "lean", "transformers")
MODES = ("auto", "none", "compile", "graph")
# steps in flight on a GPU beyond the one that is waited for, so that the device never waits for the host
_LAG = 1
_CACHE_MULTIPLE = 64
PREFILL_TOKENS = 8192


@dataclass
class Timing:
    """Seconds of one generation. ``prefill`` ends with the first token on the host; ``setup`` is compiling and graph
    capture; ``decode`` is the rest, over ``steps`` steps."""

    prefill: float = 0.0
    setup: float = 0.0
    decode: float = 0.0
    steps: int = 0


class Decoding:
    """One batch, decoded token by token: iterate to get int64 ``[B]`` tokens on the CPU.

    Args:
        model: a transformers model of a supported family, packed or not, in evaluation mode.
        input_ids: int64 ``[B, T]``, 1 to 64 rows, padded on the left.
        attention_mask: ``[B, T]``, 0 where padded; None without padding.
        options: see :class:`GenerationOptions`.
        compile: "none" runs operations one by one, "graph" replays a whole step as a CUDA graph, "compile" lets
            torch.compile fuse the step (on CUDA as a graph too); "auto" is "graph" on CUDA, else "none".
        step: what computes a step: "native" (one compiled program on the CPU, :mod:`gemq.generation.native`), "lean"
            (:class:`gemq.generation.step.LeanStep`), "transformers" (the model's own forward); "auto" takes the first
            that serves the model's structure, its device, the batch and ``compile``. Once the first step ran,
            :attr:`step_kind` says which, and :attr:`step_reason` why it is not the one before in this list.

    An ended row gives the padding token; iteration stops when all rows have ended. An iterator that begins while
    another is alive decodes beside it, with a cache and figures of its own. Raises ``ValueError``, ``TypeError`` or
    :class:`gemq.errors.GemqError` before any work. Raised later: :class:`gemq.errors.OutOfMemoryError`, and
    :class:`gemq.errors.GemqError` where a row's best score is NaN or infinite.
    """

    eager_step: NativeStep | LeanStep | ModelStep | None
    # the step as it runs, compiled or not, and the call that feeds it a token; None where there is none
    step: Any
    _advance: Any

    @plain_torch()
    def __init__(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None,
        options: GenerationOptions | None = None, *, compile: str = "auto", step: str = "auto",
    ):
        self.model = cast(Any, model)
        self.options = options or GenerationOptions()
        self.device: torch.device = embedding_device(self.model)
        self.mode = _mode(compile, self.device)
        self.prompt, self.mask = check_prompt(model, input_ids, attention_mask, self.options)
        self.prompt, self.mask = self.prompt.to(self.device), self.mask.to(self.device)
        if step not in STEPS:
            raise ValueError(f"step must be one of {', '.join(STEPS)}, got {step!r}")
        self.wanted, self.automatic = step, compile == "auto"
        self.step_kind: str | None = None
        self.step_reason: str | None = None
        self.eos, self.pad = ending(self.options, model)
        self.timing, self._alive = Timing(), False

    def __iter__(self) -> Generator[Tensor]:
        run = copy.copy(self) if self._alive else self
        run._alive = True
        try:
            yield from run._decode()
        finally:
            run._alive = False

    def _decode(self) -> Generator[Tensor]:
        self.timing, self._advance = Timing(), None
        started = time.perf_counter()
        self._prefill()
        pending: deque[_Posted] = deque([self._post()])
        launched, limit, lag, read = 1, self.options.max_new_tokens, 0, self.prompt.shape[1]
        while pending:
            tokens, ended = pending.popleft().wait(read)
            now = time.perf_counter()
            if self.timing.steps == 0 and self._advance is None:
                self.timing.prefill = now - started
            else:
                self.timing.steps += 1
                self.timing.decode += now - started
            yield tokens
            if ended:
                return
            read += 1
            started = time.perf_counter()
            if launched < limit and self._advance is None:
                self._set_up()
                lag = _LAG if self.device.type == "cuda" else 0
                self.timing.setup = time.perf_counter() - started
                started = time.perf_counter()
            while launched < limit and len(pending) <= lag:
                self._step()
                pending.append(self._post())
                launched += 1

    @plain_inference
    def _prefill(self) -> None:
        batch, length = self.prompt.shape
        # two slots more than needed: warming up a graph runs two steps
        self.limit = -(-(length + self.options.max_new_tokens + 2) // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
        check_cache_fits(self.model, batch, self.limit, self.device)
        self.cache = _new_cache(self.model.config, self.limit)
        self.sampler = Sampler(self.options, self.prompt, self.mask, self.model.config.get_text_config().vocab_size)
        padded = not bool(self.mask.all())
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)
        logits = self._prompt_logits(positions, padded)
        seen = None
        if padded:
            seen = torch.ones(batch, self.limit, dtype=torch.bool, device=self.device)
            seen[:, :length] = self.mask.bool()
        slot = torch.tensor([length], device=self.device)
        self.progress = Progress(slot, positions[:, -1] + 1, seen, length + 1)
        self.ends = torch.tensor(self.eos, dtype=torch.int64, device=self.device)
        self.tokens, self.best = self.sampler(logits)
        self.ended = self._are_ends(self.tokens)

    def _prompt_logits(self, positions: Tensor, padded: bool) -> Tensor:
        """Logits ``[B, V]`` after the prompt, whose keys and values fill the cache, in chunks."""
        batch, length = self.prompt.shape
        # a head that is known takes the last hidden state alone; others say themselves what they make of it
        whole = known.head_unknown(self.model) is not None
        module = self.model if whole else decoder_of(self.model)
        options = {"logits_to_keep": 1} if whole else {}
        sliding = any(getattr(layer, "is_sliding", False) for layer in self.cache.layers)
        chunk = length if sliding and not known.sees_windows(self.model.config) else max(PREFILL_TOKENS // batch, 1)
        with self._memory_errors():
            for start in range(0, length, chunk):
                end = min(start + chunk, length)
                out = call(
                    module, input_ids=self.prompt[:, start:end], attention_mask=self.mask[:, :end] if padded else None,
                    position_ids=positions[:, start:end], past_key_values=self.cache, use_cache=True, **options,
                )
            if whole:
                return out.logits[:, -1]
            # as a matrix: on [B, 1, H], sliced out of [B, T, H], torch copies the whole head for a batched product
            logits = self.model.get_output_embeddings()(out.last_hidden_state[:, -1].contiguous())
            return capped(logits, known.softcap(self.model))

    @plain_inference
    def _set_up(self) -> None:
        self.step_kind, self.step_reason = self._kind()
        if self.step_kind == "transformers" and self.mode != "none":
            if not self.automatic:
                raise ValueError(f"compile={self.mode!r} needs a model of known structure ({self.step_reason}); use "
                                 "compile='none'")
            self.mode = "none"
        self.states: list[State] = []
        if self.step_kind == "transformers":
            self.eager_step = ModelStep(self.model, self.cache, self.limit)
        else:
            with self._memory_errors():
                self.states = fixed_states(self.cache, self.limit, self.progress.starts())
            if self.step_kind == "native":
                self.eager_step = NativeStep(self.model, self.states, self.limit, self.prompt.shape[0])
            else:
                self.eager_step = LeanStep(self.model, self.states, self.limit, dynamic=self.mode == "none")
        self.step = self.eager_step
        if self.mode == "compile":
            self.step = torch.compile(self.step, fullgraph=True, dynamic=False)
        self._advance = self._one_step
        with self._memory_errors():
            if self.device.type == "cuda" and self.mode != "none":
                self._advance = GraphedStep(self._one_step, self._state(), self.sampler.generator)
            elif self.mode == "compile":
                # compiles; the first step writes the same keys and values again
                moved = self._moved()
                before = [t.clone() for t in moved]
                self.step(self.tokens, self.progress)
                for tensor, value in zip(moved, before, strict=True):
                    tensor.copy_(value)

    def _kind(self) -> tuple[str, str | None]:
        """Choose the step that runs, and give the reason for not taking a better one (None for the best). Raises
        ``ValueError`` if the step that the caller asked for does not support this model or cache."""
        lean = LeanStep.unfit(self.model, self.cache)
        native: str | None
        if self.mode != "none":
            native = f"compile={self.mode!r} replaces it"
        elif self.device.type != "cpu":
            native = f"the model is on {self.device}"
        else:
            native = lean or NativeStep.unfit(self.model, self.cache, self.prompt.shape[0])
        if self.wanted == "native" and native:
            raise ValueError("step='native' needs a packed model of known structure on the CPU, at most 16 rows and "
                             f"compile='none' ({native}); leave step out")
        if self.wanted == "lean" and lean:
            raise ValueError(f"step='lean' needs a model of known structure ({lean}); leave step out")
        if self.wanted != "auto":
            return self.wanted, None if self.wanted == "native" else "it was asked for"
        return ("transformers", lean) if lean else ("lean", native) if native else ("native", None)

    def _state(self) -> list[Tensor]:
        tensors = (self.tokens, self.best, self.ended, self.progress.slot, self.progress.positions, self.sampler.seen)
        return [t for t in tensors if t is not None] + self._moved()

    def _moved(self) -> list[Tensor]:
        """Tensors of the states in which a step leaves another token's place changed."""
        held = [s for s in self.states if isinstance(s, Recurrent) or (isinstance(s, KeyValues) and s.window)]
        return [tensor for state in held for tensor in state[:2]]

    def _one_step(self) -> None:
        """Feed the newest tokens, and write the next ones in their place."""
        tokens, best = self.sampler(self.step(self.tokens, self.progress))
        if self.eos:
            tokens, best = tokens.masked_fill(self.ended, self.pad), best.masked_fill(self.ended, 0.0)
            self.ended |= self._are_ends(tokens)
        self.tokens.copy_(tokens)
        self.best.copy_(best)
        self.progress.advance()

    def _are_ends(self, tokens: Tensor) -> Tensor:
        return (tokens[:, None] == self.ends).any(-1)

    @plain_inference
    def _step(self) -> None:
        with self._memory_errors():
            self._advance()

    @plain_inference
    def _post(self) -> _Posted:
        return _Posted(self.tokens, self.best, self.ended if self.eos else None)

    def _memory_errors(self) -> _MemoryErrors:
        return _MemoryErrors(self)


class _Posted:
    """Tokens that are being copied to the host, with their scores and the rows that have ended."""

    def __init__(self, tokens: Tensor, best: Tensor, ended: Tensor | None):
        self.event: torch.cuda.Event | None = None
        if not tokens.is_cuda:
            # the others are read before the next step changes them
            self.rows = (tokens.clone(), best, ended)
            return
        # as one copy: float64 holds every id
        rows = torch.stack([t.double() for t in (tokens, best, ended) if t is not None])
        held = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        held.copy_(rows, non_blocking=True)
        self.rows = (held[0], held[1], None if ended is None else held[2])
        self.event = torch.cuda.Event()
        self.event.record()

    def wait(self, length: int) -> tuple[Tensor, bool]:
        """Wait for the tokens; returns ``(tokens, all rows have ended)``. Raises :class:`GemqError` if the best score
        of a row after ``length`` tokens is NaN or infinite."""
        if self.event is not None:
            self.event.synchronize()
        tokens, best, ended = self.rows
        row = next((row for row, score in enumerate(best.tolist()) if not math.isfinite(score)), None)
        if row is not None:
            raise GemqError(f"the model's scores after {length} tokens of row {row} are NaN or infinite: a weight is, "
                            "or a product is beyond the range of its dtype")
        return tokens.long(), ended is not None and all(ended.tolist())


def _new_cache(config: Any, limit: int) -> Any:
    """Make a cache of fixed buffers that hold ``limit`` tokens. If a layer attends to fewer, or an indexer chooses the
    tokens that it attends to, return transformers' dynamic cache instead, whose masks support windows and padding."""
    from transformers import DynamicCache, StaticCache
    from transformers.cache_utils import StaticLayer

    cache = StaticCache(config=config, max_cache_len=limit)
    for index, layer in enumerate(cache.layers):
        if hasattr(layer, "update_indexer"):
            # an indexer ranks the empty slots of a fixed buffer, too
            return DynamicCache(config=config)
        if getattr(layer, "is_sliding", False):
            if layer.max_cache_len < limit:
                return DynamicCache(config=config)
            # a window that nothing leaves
            cache.layers[index] = StaticLayer(max_cache_len=limit)
    return cache


class _MemoryErrors:
    """Convert torch's out-of-memory errors to one that states what would fit."""

    def __init__(self, decoding: Decoding):
        self.decoding = decoding

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, torch.OutOfMemoryError):
            d = self.decoding
            d.cache = d.step = d.eager_step = d._advance = None
            raise cache_error(d.model, d.prompt.shape[0], d.limit, free_bytes(d.device)) from error


def _mode(name: str, device: torch.device) -> str:
    if name not in MODES:
        raise ValueError(f"compile must be one of {', '.join(MODES)}, got {name!r}")
    if name == "auto":
        return "graph" if device.type == "cuda" else "none"
    if name == "graph" and device.type != "cuda":
        raise ValueError(f"compile='graph' needs a CUDA device, the model is on {device}")
    return name


def check_prompt(
    model: Any, input_ids: Tensor, attention_mask: Tensor | None, options: GenerationOptions
) -> tuple[Tensor, Tensor]:
    """Return ``(input_ids, attention_mask)`` as int64 ``[B, T]``. Raises an error naming the fault."""
    check_supported(model.config)
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"input_ids must be an int64 tensor [batch, tokens], got {_kind(input_ids)}")
    batch, length = input_ids.shape
    if not 1 <= batch <= MAX_BATCH:
        raise ValueError(f"the batch must have 1 to {MAX_BATCH} rows, got {batch}")
    if length == 0:
        raise ValueError("prompt must not be empty")
    low, high = int(input_ids.min()), int(input_ids.max())
    check_room(model.config, length, options.max_new_tokens, low, high)
    return input_ids.long(), _checked_mask(input_ids, attention_mask)


def check_room(config: Any, length: int, new: int, low: int, high: int) -> None:
    """Raise ``ValueError`` if a prompt of ``length`` tokens with ids ``low`` to ``high`` does not fit a model of this
    transformers config, or leaves no room for ``new`` more tokens."""
    config = config.get_text_config()
    rows, positions = config.vocab_size, config.max_position_embeddings
    if low < 0 or high >= rows:
        raise ValueError(f"input_ids must be in 0..{rows - 1}, got {low if low < 0 else high}")
    if length >= positions:
        raise ValueError(f"the prompt has {length} tokens, the model only {positions} positions")
    if new > positions - length:
        raise ValueError(f"max_new_tokens must be at most {positions - length} after a prompt of {length} tokens (the "
                         f"model has {positions} positions), got {new}")


def _checked_mask(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones_like(input_ids, dtype=torch.int64)
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must have the shape of input_ids {list(input_ids.shape)}, got {_kind(mask)}")
    mask = (mask != 0).long()
    if not bool(mask[:, -1].all()) or bool((mask.diff(dim=1) < 0).any()):
        raise ValueError("attention_mask must be padding on the left: zeros, then ones up to the end of every row")
    return mask


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
