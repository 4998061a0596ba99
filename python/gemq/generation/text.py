"""Generate text from text: encoding, padding, streaming and the figures of a generation."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemq.generation.chat import token_ids
from gemq.generation.decoding import Decoding, Timing
from gemq.generation.memory import peak_resident_bytes
from gemq.generation.options import GenerationOptions
from gemq.generation.streaming import CONTEXT, Pieces


@dataclass(frozen=True)
class Generation:
    """One row's continuation and the speed of its batch.

    ``tokens`` are the new ones, the end token included. ``seconds`` is everything but loading; ``timing`` has its
    parts. ``peak_bytes`` is the most memory held: allocated on the GPU for a model on CUDA, else the process's
    resident memory (None where the system does not tell). ``step`` and ``step_reason`` are those of
    :class:`gemq.generation.Decoding`, None where a single token took no step.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    peak_bytes: int | None
    tokens: tuple[int, ...]
    timing: Timing
    step: str | None = None
    step_reason: str | None = None

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens a second, of this row, up to the first new token."""
        return self.prompt_tokens / self.timing.prefill

    @property
    def rate(self) -> float:
        """New tokens a second after the first, of this row; of all its time where there is only one."""
        return self.timing.steps / self.timing.decode if self.timing.steps else self.new_tokens / self.timing.prefill


def encode(tokenizer: Any, prompts: list[str]) -> list[list[int]]:
    """Encode each prompt to token ids. Raises ``ValueError`` for an empty prompt and ``TypeError`` for one that is not
    text."""
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"prompt must be a text or texts, got {type(prompt).__name__}")
    rows = [token_ids(tokenizer, prompt) for prompt in prompts]
    check_rows(rows)
    return rows


def check_rows(rows: list[list[int]]) -> None:
    """Raise ``ValueError`` if there is no row or one is empty."""
    if not rows:
        raise ValueError("prompt must not be empty: no prompts were given")
    for index, row in enumerate(rows):
        if not row:
            raise ValueError("prompt must not be empty" + (f" (prompt {index} is)" if len(rows) > 1 else ""))


def pad_left(rows: list[list[int]], pad: int = 0) -> tuple[Tensor, Tensor | None]:
    """``(input_ids [B, T], attention_mask)`` of rows of different lengths; no mask where none is padded."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    if all(len(row) == longest for row in rows):
        return ids, None
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


def generate_rows(
    model: nn.Module, tokenizer: Any, rows: list[list[int]], options: GenerationOptions, *, compile: str = "auto",
    streamer: Any = None,
) -> list[Generation]:
    """Continue rows of token ids as one batch.

    ``streamer`` has ``put`` and ``end`` as transformers' have, or is a function of the tokenizer that returns one;
    transformers' text streamers take one row. On Ctrl-C it is ended, so that nothing is held back, and the interrupt
    goes on.
    """
    ids, mask = pad_left(rows)
    decoding = Decoding(model, ids, mask, options, compile=compile)
    if streamer is not None and len(rows) > 1:
        raise ValueError(f"streaming takes one prompt, got {len(rows)}")
    cuda = decoding.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(decoding.device)
    if streamer is not None and not hasattr(streamer, "put"):
        streamer = streamer(tokenizer)
    if streamer is not None:
        streamer.put(ids)
    found = []
    try:
        for tokens in decoding:
            found.append(tokens)
            if streamer is not None:
                streamer.put(tokens)
    except KeyboardInterrupt:
        if streamer is not None:
            streamer.end()
        raise
    if streamer is not None:
        streamer.end()
    peak = torch.cuda.max_memory_allocated(decoding.device) if cuda else peak_resident_bytes()
    timing = decoding.timing
    results = []
    for row, new in zip(rows, torch.stack(found, 1).tolist(), strict=True):
        new = _until_end(new, decoding.eos)
        text = "" if tokenizer is None else continuation(tokenizer, row, new)
        seconds = timing.prefill + timing.setup + timing.decode
        results.append(Generation(
            text, len(row), len(new), seconds, peak, tuple(new), timing, decoding.step_kind, decoding.step_reason
        ))
    return results


def _until_end(tokens: list[int], eos: tuple[int, ...]) -> list[int]:
    for index, token in enumerate(tokens):
        if token in eos:
            return tokens[: index + 1]
    return tokens


def continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """Decode ``new`` as it follows the prompt: tokenizers of words drop a leading space when they decode ``new`` alone.
    """
    before = tokenizer.decode(prompt[-CONTEXT:], skip_special_tokens=True)
    whole = tokenizer.decode([*prompt[-CONTEXT:], *new], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new, skip_special_tokens=True)


def stream_row(
    model: nn.Module, tokenizer: Any, row: list[int], options: GenerationOptions, *, compile: str = "auto",
    at_end: Callable[[Decoding], None] = lambda decoding: None,
) -> Generator[str]:
    """Continue one row of token ids; yields the text in pieces of whole words as they are made.

    Closing the iterator stops the generation; Ctrl-C comes after the text so far. Errors of the arguments come at the
    call, not at the first piece. ``at_end`` gets the decoding once all tokens were made, or Ctrl-C was pressed.
    """
    decoding = Decoding(model, torch.tensor([row]), None, options, compile=compile)

    def pieces() -> Generator[str]:
        streamer, interrupt = Pieces(tokenizer), None
        streamer.put(decoding.prompt)
        try:
            for tokens in decoding:
                streamer.put(tokens)
                if text := streamer.take():
                    yield text
        except KeyboardInterrupt as error:
            interrupt = error
        streamer.end()
        at_end(decoding)
        if text := streamer.take():
            yield text
        if interrupt is not None:
            raise interrupt

    return pieces()
