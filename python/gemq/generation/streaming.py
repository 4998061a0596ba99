"""Decode tokens to text as they come, a few at a time: the time a token takes does not grow with the text."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import TextStreamer

# tokens that new ones are decoded with, for the sake of spaces and of characters of several tokens
CONTEXT = 16
# tokens after which the earlier ones are let go, where what remains decodes to the same end
_LONGEST = 48
# and as many more until characters that may still change are taken as they are
_PATIENCE = 256
_UNKNOWN = "\ufffd"


class ContinuationStreamer(TextStreamer):
    """Text streamer as transformers', without the prompt. The prompt's last tokens are decoded along, to place spaces
    correctly.

    It hands on what transformers' streamer does, in pieces that end with a word, a line or a CJK character. Only the
    last tokens are decoded again with each new one.
    """

    next_tokens_are_prompt: bool
    token_cache: list[int]
    print_len: int

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        # decoded text that was not returned yet, in parts
        self.held: list[str] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt ``[1, T]`` first, then tokens ``[1]``."""
        tokens = value.flatten().tolist()
        if self.next_tokens_are_prompt:
            self.next_tokens_are_prompt = False
            self.token_cache = tokens[-CONTEXT:]
            self.print_len = len(self._text(self.token_cache))
            return
        self.token_cache.extend(tokens)
        text = self._text(self.token_cache)
        end = len(text)
        if len(self.token_cache) < _LONGEST + _PATIENCE:
            # a character whose last bytes are to come; those of a run of bytes are known together
            end = len(text.rstrip(_UNKNOWN))
        new = text[self.print_len : end]
        self.print_len = max(self.print_len, end)
        self._hold(new)
        if len(self.token_cache) >= _LONGEST:
            self._let_go(text)

    def end(self) -> None:
        """Emit the rest of the text, and a newline if this streamer prints."""
        rest = self._text(self.token_cache)[self.print_len :] if self.token_cache else ""
        text = "".join([*self.held, rest])
        self.token_cache, self.print_len, self.held = [], 0, []
        self.next_tokens_are_prompt = True
        self.on_finalized_text(text, stream_end=True)

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, **self.decode_kwargs)

    def _hold(self, new: str) -> None:
        """Hand on what ends a word, a line or is a CJK character; keep the rest."""
        if not new:
            return
        whole = new.endswith("\n") or self._is_chinese_char(ord(new[-1]))
        upto = len(new) if whole else new.rfind(" ") + 1
        if upto:
            self.on_finalized_text("".join([*self.held, new[:upto]]))
            self.held = []
        if upto < len(new):
            self.held.append(new[upto:])

    def _let_go(self, text: str) -> None:
        """Drop the earlier tokens, at a place where the later ones alone decode to the end of ``text``."""
        ahead = len(text) - self.print_len
        for keep in range(CONTEXT, CONTEXT + 8):
            tail = self._text(self.token_cache[-keep:])
            if text.endswith(tail) and len(tail) >= ahead:
                self.token_cache, self.print_len = self.token_cache[-keep:], len(tail) - ahead
                return


class Pieces(ContinuationStreamer):
    """Collects the text that is final."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.pieces.append(text)

    def take(self) -> str:
        """Return the text that has become final since the last call."""
        text = "".join(self.pieces)
        self.pieces.clear()
        return text
