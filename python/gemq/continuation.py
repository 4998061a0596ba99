"""``gemq.generate`` and ``gemq.stream``: continue prompts with a packed or full-precision model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from gemq.ambient import plain_torch
from gemq.generation import Generation, GenerationOptions, generate_rows, render, stream_row
from gemq.generation.chat import token_ids
from gemq.generation.decoding import check_room
from gemq.generation.text import check_rows, encode
from gemq.loading import load_any, load_tokenizer
from gemq.model_config import model_config
from gemq.models.families import check_supported

Prompt = str | Sequence[str] | Tensor


@plain_torch()
def generate(
    model: str | os.PathLike | nn.Module, prompt: Prompt, *, tokenizer: Any = None,
    attention_mask: Tensor | None = None, chat: bool = False, streamer: Callable | object | None = None,
    compile: str = "auto", dtype: str = "auto", device: str | None = None, **options: Any,
) -> Generation | list[Generation]:
    """Continue ``prompt`` by a static cache and whole decoding steps (one CUDA graph each on a GPU).

    Args:
        model: a packed checkpoint, a full-precision model folder or name, or a loaded model.
        prompt: a text, several texts (decoded as one batch of up to 64), or token ids ``[T]`` or ``[B, T]``.
        tokenizer: needed for texts with a loaded model; without one, results have tokens and no text.
        attention_mask: ``[B, T]`` for token ids that are padded on the left.
        chat: each text is a user's message, put through the tokenizer's chat template.
        streamer: an object with ``put`` and ``end`` like ``transformers.TextStreamer``, or a function of the
            tokenizer that returns one; for one prompt.
        compile: "graph", "compile", "none" or "auto", see :class:`gemq.generation.Decoding`.
        dtype, device: for a model that is loaded here.
        options: fields of :class:`gemq.generation.GenerationOptions`: ``max_new_tokens``, ``temperature``, ...

    Returns one :class:`Generation` for a text or ids ``[T]``, else a list. Raises ``ValueError``, ``TypeError`` or
    :class:`gemq.GemqError` for what is wrong with the arguments, before the model is loaded where that can be told.
    """
    chosen = GenerationOptions(**options)
    single = isinstance(prompt, str) or (isinstance(prompt, Tensor) and prompt.dim() == 1)
    tokenizer = _tokenizer(model, prompt, tokenizer, chat)
    rows = _rows(prompt, attention_mask, tokenizer, chat)
    results = generate_rows(
        _model(model, rows, chosen, dtype, device), tokenizer, rows, chosen, compile=compile, streamer=streamer
    )
    return results[0] if single else results


@plain_torch()
def stream(
    model: str | os.PathLike | nn.Module, prompt: str | Tensor, *, tokenizer: Any = None, chat: bool = False,
    compile: str = "auto", dtype: str = "auto", device: str | None = None, **options: Any,
) -> Iterator[str]:
    """Like :func:`generate` for one prompt, as an iterator over pieces of text; closing it stops the generation."""
    chosen = GenerationOptions(**options)
    tokenizer = _tokenizer(model, "", tokenizer, chat)
    rows = _rows(prompt, None, tokenizer, chat)
    if len(rows) != 1:
        raise ValueError(f"streaming takes one prompt, got {len(rows)}")
    return stream_row(_model(model, rows, chosen, dtype, device), tokenizer, rows[0], chosen, compile=compile)


def _model(
    model: str | os.PathLike | nn.Module, rows: list[list[int]], options: GenerationOptions, dtype: str,
    device: str | None,
) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    config = model_config(str(model))
    check_supported(config)
    # before weights are read, which takes minutes
    lows, highs = [min(row) for row in rows], [max(row) for row in rows]
    check_room(config, max(map(len, rows)), options.max_new_tokens, min(lows), max(highs))
    return load_any(model, dtype, device)


def _tokenizer(model: str | os.PathLike | nn.Module, prompt: Prompt, tokenizer: Any, chat: bool) -> Any:
    if tokenizer is None and not isinstance(model, nn.Module):
        return load_tokenizer(str(model))
    if tokenizer is None and (chat or not isinstance(prompt, Tensor)):
        raise ValueError("tokenizer must be given with a loaded model")
    return tokenizer


def _rows(prompt: Prompt, mask: Tensor | None, tokenizer: Any, chat: bool) -> list[list[int]]:
    if not isinstance(prompt, Tensor):
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if mask is not None:
            raise ValueError("attention_mask goes with token ids; texts are padded here")
        if not chat:
            return encode(tokenizer, texts)
        texts = [render(tokenizer, [{"role": "user", "content": text}]) for text in texts]
        rows = [token_ids(tokenizer, text, add_special_tokens=False) for text in texts]
        check_rows(rows)
        return rows
    if chat:
        raise ValueError("chat takes texts, not token ids")
    ids = prompt[None] if prompt.dim() == 1 else prompt
    if ids.dim() != 2 or ids.is_floating_point():
        raise TypeError(f"prompt must be a text, texts, or token ids [T] or [B, T], got {ids.dtype} {list(ids.shape)}")
    rows = ids.tolist()
    if mask is not None:
        if mask.shape != ids.shape or bool((mask.bool().long().diff(dim=1) < 0).any()):
            raise ValueError(f"attention_mask must have the shape {list(ids.shape)} and be padding on the left")
        rows = [row[len(row) - int(seen) :] for row, seen in zip(rows, mask.bool().sum(1), strict=True)]
    check_rows(rows)
    return rows
