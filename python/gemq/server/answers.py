"""Text of a continuation as its tokens come: whole words, up to a stop text, with log probabilities beside."""

from __future__ import annotations

from typing import Any

import torch

from gemq.generation.streaming import Pieces
from gemq.server.jobs import Token


class Answer:
    """The text of one job. Text that may be the beginning of a stop text is held back until that is known."""

    def __init__(self, tokenizer: Any, prompt: list[int], stops: tuple[str, ...], chat: bool):
        self.tokenizer, self.stops, self.chat = tokenizer, stops, chat
        self.pieces = Pieces(tokenizer)
        self.pieces.put(torch.tensor([prompt]))
        self.held, self.stopped, self.length = "", False, 0
        self.told: list[Token] = []

    def add(self, token: Token) -> str:
        """Take a token; returns the text that is final."""
        if token.logprob is not None:
            self.told.append(token)
        self.pieces.put(torch.tensor([token.token]))
        return self._final(self.pieces.take())

    def end(self) -> str:
        """The rest of the text."""
        self.pieces.end()
        return self._final(self.pieces.take(), last=True)

    def _final(self, new: str, last: bool = False) -> str:
        if self.stopped:
            return ""
        text = self.held + new
        found = [at for at in (text.find(stop) for stop in self.stops) if at >= 0]
        if found:
            self.stopped, text, self.held = True, text[: min(found)], ""
            return text
        keep = 0 if last else max((_begun(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def logprobs(self) -> dict | None:
        """Log probabilities of the tokens since the last call, in OpenAI's form; None where none were asked for."""
        told, self.told = self.told, []
        if not told:
            return None
        if self.chat:
            return {"content": [
                self._entry(t.token, t.logprob) | {"top_logprobs": [self._entry(*best) for best in t.top]} for t in told
            ], "refusal": None}
        texts, offsets = [self._text(t.token) for t in told], []
        for text in texts:
            offsets.append(self.length)
            self.length += len(text)
        return {
            "tokens": texts, "token_logprobs": [t.logprob for t in told], "text_offset": offsets,
            "top_logprobs": [{self._text(token): value for token, value in t.top} for t in told],
        }

    def _text(self, token: int) -> str:
        return self.tokenizer.decode([token])

    def _entry(self, token: int, logprob: float | None) -> dict:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _begun(text: str, stop: str) -> int:
    """Characters at the end of a text with which a stop text may begin."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
