"""Words that the tests' tokenizer knows."""

from __future__ import annotations

import random

_SENTENCE = "the of and to in a is that it was for on are as with his they at be this from have or by one had"
WORDS = _SENTENCE.split(" ") + [f"word{i}" for i in range(68)]


def words(count: int, seed: int = 0) -> str:
    """``count`` random words."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))
