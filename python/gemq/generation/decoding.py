"""The decode loop: prefill in one forward (in chunks if long), then a whole step at a time over a static cache."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gemq.generation.graph import GraphedStep
from gemq.generation.memory import cache_error, check_cache_fits, free_bytes
from gemq.generation.native import NativeStep
from gemq.generation.options import MAX_BATCH, GenerationOptions, ending
from gemq.generation.sampling import Sampler
from gemq.generation.step import LeanStep, ModelStep, Progress
from gemq.models.families import check_supported

STEPS = ("auto", "native", "lean", "transformers")
MODES = ("auto", "none", "compile", "graph")
# steps in flight on a GPU beyond the one that is waited for, so that the device never waits for the host
_LAG = 1
_CACHE_MULTIPLE = 64
_PREFILL_TOKENS = 8192


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
            that serves the model's structure, its device, the batch and ``compile``. :attr:`step_kind` says which.

    An ended row gives the padding token; iteration stops when all rows have ended. Raises ``ValueError``,
    ``TypeError`` or :class:`gemq.errors.GemqError` before any work, :class:`gemq.errors.OutOfMemoryError` also later.
    """

    def __init__(
        self, model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None,
        options: GenerationOptions | None = None, *, compile: str = "auto", step: str = "auto",
    ):
        self.model, self.options = model, options or GenerationOptions()
        self.device = model.get_input_embeddings().weight.device
        self.mode = _mode(compile, self.device)
        self.prompt, self.mask = check_prompt(model, input_ids, attention_mask, self.options)
        self.prompt, self.mask = self.prompt.to(self.device), self.mask.to(self.device)
        if step not in STEPS:
            raise ValueError(f"step must be one of {', '.join(STEPS)}, got {step!r}")
        self.wanted, self.automatic, self.step_kind = step, compile == "auto", None
        self.eos, self.pad = ending(self.options, model)
        self.timing = Timing()

    def __iter__(self) -> Iterator[Tensor]:
        self.timing, self._advance = Timing(), None
        started = time.perf_counter()
        self._prefill()
        pending: deque[_Posted] = deque([self._post()])
        launched, limit, lag = 1, self.options.max_new_tokens, 0
        while pending:
            tokens, ended = pending.popleft().wait()
            now = time.perf_counter()
            if self.timing.steps == 0 and self._advance is None:
                self.timing.prefill = now - started
            else:
                self.timing.steps += 1
                self.timing.decode += now - started
            yield tokens
            if ended:
                return
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

    @torch.inference_mode()
    def _prefill(self) -> None:
        from transformers import StaticCache

        batch, length = self.prompt.shape
        # two slots more than needed: warming up a graph runs two steps
        self.limit = -(-(length + self.options.max_new_tokens + 2) // _CACHE_MULTIPLE) * _CACHE_MULTIPLE
        check_cache_fits(self.model, batch, self.limit, self.device)
        self.cache = StaticCache(config=self.model.config, max_cache_len=self.limit)
        self.sampler = Sampler(self.options, self.prompt, self.mask, self.model.config.vocab_size)
        padded = not bool(self.mask.all())
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)
        chunk = max(_PREFILL_TOKENS // batch, 1)
        with self._memory_errors():
            for start in range(0, length, chunk):
                end = min(start + chunk, length)
                hidden = self.model.get_decoder()(
                    input_ids=self.prompt[:, start:end], attention_mask=self.mask[:, :end] if padded else None,
                    position_ids=positions[:, start:end], past_key_values=self.cache, use_cache=True,
                ).last_hidden_state
            # as a matrix: on [B, 1, H], sliced out of [B, T, H], torch copies the whole head for a batched product
            logits = self.model.lm_head(hidden[:, -1].contiguous())
        seen = None
        if padded:
            seen = torch.ones(batch, self.limit, dtype=torch.bool, device=self.device)
            seen[:, :length] = self.mask.bool()
        slot = torch.tensor([length], device=self.device)
        self.progress = Progress(slot, positions[:, -1] + 1, seen, length + 1)
        self.ends = torch.tensor(self.eos, dtype=torch.int64, device=self.device)
        self.tokens = self.sampler(logits)
        self.ended = self._are_ends(self.tokens)

    @torch.inference_mode()
    def _set_up(self) -> None:
        self.step_kind = self._kind()
        if self.step_kind == "transformers" and self.mode != "none":
            if not self.automatic:
                raise ValueError(f"compile={self.mode!r} needs a model of known structure; use compile='none'")
            self.mode = "none"
        if self.step_kind == "native":
            self.eager_step = NativeStep(self.model, self.cache, self.limit, self.prompt.shape[0])
        elif self.step_kind == "lean":
            self.eager_step = LeanStep(self.model, self.cache, self.limit, dynamic=self.mode == "none")
        else:
            self.eager_step = ModelStep(self.model, self.cache, self.limit)
        self.step = self.eager_step
        if self.mode == "compile":
            self.step = torch.compile(self.step, fullgraph=True, dynamic=False)
        self._advance = self._one_step
        with self._memory_errors():
            if self.device.type == "cuda" and self.mode != "none":
                self._advance = GraphedStep(self._one_step, self._state(), self.sampler.generator)
            elif self.mode == "compile":
                # compiles; the first step writes the same keys and values again
                self.step(self.tokens, self.progress)

    def _kind(self) -> str:
        """Which step runs; ``ValueError`` if the one that was asked for does not serve this."""
        native = self.mode == "none" and NativeStep.fits(self.model, self.cache, self.prompt.shape[0])
        lean = LeanStep.fits(self.model, self.cache)
        if self.wanted == "native" and not native:
            raise ValueError("step='native' needs a packed model of known structure on the CPU, at most 16 rows and "
                             "compile='none'; leave step out")
        if self.wanted == "lean" and not lean:
            raise ValueError("step='lean' needs a model of known structure; leave step out")
        if self.wanted != "auto":
            return self.wanted
        return "native" if native else "lean" if lean else "transformers"

    def _state(self) -> list[Tensor]:
        tensors = (self.tokens, self.ended, self.progress.slot, self.progress.positions, self.sampler.seen)
        return [t for t in tensors if t is not None]

    def _one_step(self) -> None:
        """Feed the newest tokens, choose the next ones in their place."""
        tokens = self.sampler(self.step(self.tokens, self.progress))
        if self.eos:
            tokens = tokens.masked_fill(self.ended, self.pad)
            self.ended |= self._are_ends(tokens)
        self.tokens.copy_(tokens)
        self.progress.advance()

    def _are_ends(self, tokens: Tensor) -> Tensor:
        return (tokens[:, None] == self.ends).any(-1)

    @torch.inference_mode()
    def _step(self) -> None:
        with self._memory_errors():
            self._advance()

    @torch.inference_mode()
    def _post(self) -> _Posted:
        return _Posted(self.tokens, self.ended if self.eos else None)

    def _memory_errors(self):
        return _MemoryErrors(self)


class _Posted:
    """Tokens on their way to the host."""

    def __init__(self, tokens: Tensor, ended: Tensor | None):
        both = tokens[None] if ended is None else torch.stack((tokens, ended.long()))
        self.event = None
        if both.is_cuda:
            self.values = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            self.values.copy_(both, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.values = both if ended is not None else both.clone()

    def wait(self) -> tuple[Tensor, bool]:
        """``(tokens, all rows have ended)``."""
        if self.event is not None:
            self.event.synchronize()
        return self.values[0], len(self.values) > 1 and bool(self.values[1].all())


class _MemoryErrors:
    """Turns torch's out-of-memory errors into one that says what would fit."""

    def __init__(self, decoding: Decoding):
        self.decoding = decoding

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
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
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, options: GenerationOptions
) -> tuple[Tensor, Tensor]:
    """``(input_ids, attention_mask)`` as int64 ``[B, T]``, or an error that names what is wrong."""
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
    config = model.config
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"input_ids must be in 0..{config.vocab_size - 1}, got {low if low < 0 else high}")
    room, new = config.max_position_embeddings - length, options.max_new_tokens
    if room < 1:
        raise ValueError(f"the prompt has {length} tokens, the model only {config.max_position_embeddings} positions")
    if new > room:
        raise ValueError(f"max_new_tokens must be at most {room} after a prompt of {length} tokens (the model has "
                         f"{config.max_position_embeddings} positions), got {new}")
    return input_ids.long(), _checked_mask(input_ids, attention_mask)


def _checked_mask(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.ones_like(input_ids, dtype=torch.int64)
    if not isinstance(mask, Tensor) or mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask must have the shape of input_ids {list(input_ids.shape)}, got {_kind(mask)}")
    mask = (mask != 0).long()
    if not bool(mask[:, -1].all()) or bool((mask.diff(dim=1) < 0).any()):
        raise ValueError("attention_mask must be padding on the left: zeros, then ones up to the end of every row")
    return mask


def _kind(value) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
