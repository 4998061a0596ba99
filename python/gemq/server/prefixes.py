"""Caches of prompts' beginnings, so that a prompt that begins as an earlier one is not read again.

A prompt is read in chunks of a fixed length, from its first token on. What a chunk gives depends on the tokens before
it alone, so a continuation from a kept chunk is, to the bit, that of the whole prompt.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

from torch import Tensor


class Prefixes:
    """The caches behind the last whole chunk of the prompts used last, up to ``limit`` bytes of tensors."""

    def __init__(self, limit: int, chunk: int):
        self.limit, self.chunk, self.held = limit, chunk, 0
        self._kept: OrderedDict[tuple[int, ...], tuple[Any, int]] = OrderedDict()

    def longest(self, prompt: list[int]) -> tuple[int, Any]:
        """``(tokens, cache)`` of the longest beginning that is kept, at least one token short of the prompt; the cache
        is a copy. ``(0, None)`` without one."""
        for length in range((len(prompt) - 1) // self.chunk * self.chunk, 0, -self.chunk):
            key = tuple(prompt[:length])
            if key in self._kept:
                self._kept.move_to_end(key)
                return length, copy.deepcopy(self._kept[key][0])
        return 0, None

    def worth(self, prompt: list[int], length: int) -> bool:
        """True for the last place of a prompt that is worth keeping, and is not kept yet."""
        last = (len(prompt) - 1) // self.chunk * self.chunk
        return bool(self.limit) and length == last > 0 and tuple(prompt[:length]) not in self._kept

    def keep(self, tokens: list[int], cache: Any) -> None:
        """Keep a copy of a cache, and let go of what was used longest ago."""
        size = cache_bytes(cache)
        if size > self.limit:
            return
        while self.held + size > self.limit:
            _, (_, freed) = self._kept.popitem(last=False)
            self.held -= freed
        self._kept[tuple(tokens)] = copy.deepcopy(cache), size
        self.held += size


def cache_bytes(cache: Any) -> int:
    """Bytes of a cache's tensors."""
    total = 0
    for layer in cache.layers:
        for value in vars(layer).values():
            parts = value.values() if isinstance(value, dict) else (value,)
            total += sum(part.nbytes for part in parts if isinstance(part, Tensor))
    return total
