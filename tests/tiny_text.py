"""Words that the tests' tokenizer knows."""

from __future__ import annotations

import random

_SENTENCE = "the of and to in a is that it was for on are as with his they at be this from have or by one had"
WORDS = _SENTENCE.split(" ") + [f"word{i}" for i in range(68)]


def words(count: int, seed: int = 0) -> str:
    """``count`` random words."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def word_tokenizer():
    """A fast tokenizer of whole words, 0..95."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "</s>": 1} | {word: 2 + i for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")
