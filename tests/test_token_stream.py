"""Tokenizing a long text in pieces: the ids of the whole, whatever the tokenizer and the text."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny_text import word_tokenizer, words
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from gemq.algorithms import token_stream
from gemq.algorithms.token_stream import tokens, window_at

TEXT = (Path(__file__).parent.parent / "python/gemq/demo/text/calibration.txt").read_text()[:60_000]
_SPECIAL = {"special_tokens": ["<unk>"], "show_progress": False}


def trained(model, trainer, pre=None, norm=None, dec=None):
    core = Tokenizer(model)
    if pre:
        core.pre_tokenizer = pre
    if norm:
        core.normalizer = norm
    if dec:
        core.decoder = dec
    core.train_from_iterator([TEXT[i : i + 500] for i in range(0, len(TEXT), 500)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@cache
def made(name):
    if name == "words":
        return word_tokenizer()
    if name == "bytes":
        return trained(
            models.BPE(), trainers.BpeTrainer(
                vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **_SPECIAL),
            pre_tokenizers.ByteLevel(add_prefix_space=False), dec=decoders.ByteLevel(),
        )  # fmt: skip
    if name == "one word":
        # as Llama's and Mixtral's: no word is split off before pairs are merged
        return trained(
            models.BPE(byte_fallback=True, unk_token="<unk>"),
            trainers.BpeTrainer(vocab_size=600, max_token_length=12, **_SPECIAL),
            norm=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        )
    if name == "unigram":
        return trained(
            models.Unigram(), trainers.UnigramTrainer(vocab_size=600, unk_token="<unk>", **_SPECIAL),
            pre_tokenizers.Metaspace(), normalizers.NFKC(),
        )
    return trained(
        models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=600, **_SPECIAL),
        pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer(),
    )


NAMES = ["words", "bytes", "one word", "unigram", "word pieces"]


def whole(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def awkward(seed):
    """Text, then runs of one character, scripts without blanks, emoji, line ends, and letters at random."""
    rng = random.Random(seed)
    runs = [c * rng.randint(1, 9000) for c in ("a", " ", "\n", "漢字仮名", "é👩‍👧", "\t \n", "█")]
    letters = "".join(rng.choice("abcdefghij é漢") for _ in range(9000))
    plain = [TEXT[rng.randint(0, 9000) :][: rng.randint(1, 30_000)] for _ in range(4)]
    parts = [*plain, *runs, letters, words(900, seed)]
    rng.shuffle(parts)
    return "".join(parts)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("piece", [1 << 14, pytest.param(20_011, marks=pytest.mark.slow)])
def test_pieces_are_the_whole(monkeypatch, name, piece):
    monkeypatch.setattr(token_stream, "PIECE", piece)
    monkeypatch.setattr(token_stream, "_SHARED", piece // 64)
    tokenizer = made(name)
    for seed in range(3):
        text = awkward(seed)
        expected = whole(tokenizer, text)
        assert len(text) > 3 * piece
        assert tokens(tokenizer, [text]).tolist() == expected
        # however it comes
        cuts = sorted(random.Random(seed).sample(range(len(text)), 40))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert tokens(tokenizer, parts, 5000).tolist() == expected[:5000]


def test_no_piece_is_the_whole(monkeypatch):
    """The text that a call of the tokenizer gets is bounded, and so is the total."""
    monkeypatch.setattr(token_stream, "PIECE", 1 << 14)
    tokenizer, seen = made("bytes"), []
    plain = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer), "__call__", lambda self, text, **o: (seen.append(len(text)), plain(self, text, **o))[1]
    )
    tokens(tokenizer, [TEXT] * 5)
    assert max(seen) <= 3 << 14 and len(seen) > 5 and sum(seen) < 2.5 * 5 * len(TEXT)
    seen.clear()
    tokens(tokenizer, iter([TEXT] * 500), 100)
    assert sum(seen) <= 3 << 14


@pytest.mark.parametrize("name", NAMES)
def test_windows_at_a_place(name):
    """They begin at a token of the whole text at or after the place, and near the end there are the last ones."""
    tokenizer, text = made(name), TEXT[:20_000].replace("the", "thé")
    data = text.encode()
    stream = whole(tokenizer, text)

    def read(offset, count):
        return data[offset : offset + count]

    for place in (0, 1, 777, 5000, 5001, 9999, len(data) - 300, len(data) - 1):
        window = window_at(tokenizer, read, len(data), place, 64)
        assert window.dtype == torch.int32
        row = window.tolist()
        at = [i for i in range(len(stream)) if stream[i : i + 64] == row]
        assert at, place
        before = len(whole(tokenizer, data[:place].decode(errors="ignore")))
        assert min(abs(i - min(before, len(stream) - 64)) for i in at) <= 3
    assert window_at(tokenizer, read, len(data), 900, 10 * len(stream)) is None
    assert window_at(tokenizer, read, len(data), 900, len(stream)).tolist() == stream
