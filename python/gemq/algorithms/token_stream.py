"""Tokenize long texts a piece at a time; the ids equal those of the whole text.

A tokenizer's own result of a long text takes some hundred times its bytes. Here a text is tokenized in pieces that
overlap, of which only the ids are kept. Two neighbours are joined where they agree on the tokens to both sides. For
byte pair encoding that is the encoding of the whole: it is one exactly if each two neighbouring tokens are.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# characters of a piece, and of what two have in common; texts up to two pieces are tokenized at once
PIECE = 1 << 18
_SHARED = 1 << 12
# tokens on which two pieces agree to each side of where they are joined
_AGREED = 8
_BEFORE = 256


class _Encoded(NamedTuple):
    """Ids int32 ``[N]`` with the characters they come from; no places where the tokenizer does not tell."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def _encode(tokenizer: Any, text: str, offset: int = 0) -> _Encoded:
    told = bool(getattr(tokenizer, "is_fast", False))
    found = tokenizer(
        text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=told, verbose=False
    )
    ids = np.asarray(found["input_ids"], dtype=np.int32)
    places = np.asarray(found["offset_mapping"] if told else (), dtype=np.int64).reshape(-1, 2) + offset
    return _Encoded(ids, places[:, 0], places[:, 1])


def tokens(tokenizer: Any, text: Iterable[str], most: int | None = None) -> Tensor:
    """Token ids int32 ``[N]`` of the parts of a text, joined; with ``most``, the first ones, reading no further than
    needed. No special tokens are added."""
    kept, count = [], 0
    for ids in _parts(tokenizer, iter(text)):
        kept.append(ids)
        count += len(ids)
        if most is not None and count >= most:
            break
    whole = torch.from_numpy(np.concatenate(kept) if kept else np.empty(0, np.int32))
    return whole if most is None else whole[:most]


def _parts(tokenizer: Any, text: Iterator[str]) -> Iterator[np.ndarray]:
    text = _slices(text)
    buffer, ended = _fill("", text, 2 * PIECE)
    if ended or not getattr(tokenizer, "is_fast", False):
        yield _encode(tokenizer, buffer + "".join(text)).ids
        return
    # `left` is what the first `size` characters of the buffer give; its tokens before `first` are handed on
    size, left, first = PIECE, _encode(tokenizer, buffer[:PIECE]), 0
    while True:
        buffer, ended = _fill(buffer, text, 2 * size)
        if ended and size >= len(buffer):
            yield left.ids[first:]
            return
        found = _next(tokenizer, buffer, size, left, first)
        if found is None:
            # they agree nowhere, as within a run of one character: a piece of both
            at, size = left.starts[first] if first < len(left.ids) else 0, 2 * size
            left = _encode(tokenizer, buffer[:size])
            first = int(np.searchsorted(left.starts, at)) if first else 0
            continue
        cut, right, last, following = found
        yield left.ids[first:last]
        size, left, first, buffer = len(buffer[cut : size + PIECE]), right, following, buffer[cut:]


def _slices(text: Iterable[str]) -> Iterator[str]:
    for part in text:
        yield from (part[at : at + PIECE] for at in range(0, len(part), PIECE))


def _fill(buffer: str, text: Iterator[str], least: int) -> tuple[str, bool]:
    """Extend the buffer to ``least`` characters or more. Returns it, and True if the text has ended."""
    parts, count = [buffer], len(buffer)
    while count < least:
        part = next(text, None)
        if part is None:
            return "".join(parts), True
        parts.append(part)
        count += len(part)
    return "".join(parts), False


def _next(
    tokenizer: Any, buffer: str, size: int, left: _Encoded, first: int
) -> tuple[int, _Encoded, int, int] | None:
    """Encode the piece that follows the first ``size`` characters. It overlaps ``left`` and continues where both agree.

    Returns the character at which the piece begins, its encoding (with places counted from there), and the index in
    each encoding of the first token of the rest. None if they agree nowhere.
    """
    shared = _SHARED
    while shared <= size // 4:
        cut = size - 2 * shared
        right = _encode(tokenizer, buffer[cut : size + PIECE])
        joint = _joint(left, right, first, cut, shared)
        if joint is not None:
            return cut, right, *joint
        shared *= 4
    return None


def _joint(left: _Encoded, right: _Encoded, first: int, cut: int, shared: int) -> tuple[int, int] | None:
    """Find a token in each piece around which both pieces hold the same tokens, away from the pieces' ends. None if
    there is none."""
    low, high = np.searchsorted(right.starts, (shared // 2, 2 * shared - shared // 2))
    for start in right.starts[low:high]:
        i, j = int(np.searchsorted(left.starts, start + cut)), int(np.searchsorted(right.starts, start))
        if i - _AGREED < first or j < _AGREED:
            continue
        mine, other = slice(i - _AGREED, i + _AGREED), slice(j - _AGREED, j + _AGREED)
        if len(left.ids[mine]) < 2 * _AGREED or len(right.ids[other]) < 2 * _AGREED:
            continue
        if (
            np.array_equal(left.ids[mine], right.ids[other])
            and np.array_equal(left.starts[mine], right.starts[other] + cut)
            and left.ends[i - 1] <= start + cut
        ):
            return i, j
    return None


def window_at(tokenizer: Any, read: Callable[[int, int], bytes], size: int, place: int, length: int) -> Tensor | None:
    """Tokenize ``length`` tokens, int32, of a UTF-8 text of ``size`` bytes, from the first token that begins at or
    after byte ``place``. Near the end of the text they are its last tokens. None if the text has fewer.

    ``read(offset, count)`` gives bytes of it. Only what surrounds the place is tokenized.
    """
    reach, last = max(8 * length, 1 << 12), False
    while True:
        begin, end = max(place - _BEFORE, 0), min(place + reach, size)
        before = _characters(read(begin, place - begin), False).removeprefix("\ufeff" if begin == 0 else "")
        after = _characters(read(place, end - place), end == size).removeprefix("\ufeff" if place == 0 else "")
        if getattr(tokenizer, "is_fast", False):
            found = _encode(tokenizer, before + after)
            ids = found.ids[np.searchsorted(found.starts, len(before)) :]
        else:
            ids = _encode(tokenizer, after).ids
        # the last ones depend on what follows
        certain = len(ids) if end == size else len(ids) - 2 * _AGREED
        if certain >= length:
            return torch.from_numpy((ids[-length:] if last else ids[:length]).copy())
        if end < size:
            reach *= 2
        elif place == 0:
            return None
        else:
            place, last = max(place - reach, 0), True
            reach = 2 * (size - place)


def _characters(data: bytes, final: bool) -> str:
    """Decode the whole characters of a part of a UTF-8 text, with line ends as Python reads them."""
    start = next((i for i, byte in enumerate(data[:4]) if byte & 0xC0 != 0x80), 0)
    text = codecs.getincrementaldecoder("utf-8")().decode(data[start:], final)
    return text.replace("\r\n", "\n").replace("\r", "\n")
