"""Bodies of requests in OpenAI's form, checked, as jobs."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gemq.generation.chat import Conversation, token_ids
from gemq.generation.options import GenerationOptions
from gemq.server.jobs import Event, Job

MAX_CHOICES = 16
MAX_STOPS = 4
_NEW_TOKENS = 256
# fields that change the answer and are not supported, with the values that change nothing
_UNSUPPORTED = {
    "presence_penalty": (None, 0), "frequency_penalty": (None, 0), "logit_bias": (None, {}), "tools": (None, []),
    "functions": (None, []), "response_format": (None, {"type": "text"}), "suffix": (None, ""), "echo": (None, False),
    "best_of": (None, 1), "audio": (None,), "modalities": (None, ["text"]),
}
Stops = list[Annotated[str, Field(min_length=1)]]


class StreamOptions(BaseModel):
    """``stream_options`` of a request."""

    include_usage: bool = False


class Body(BaseModel):
    """Fields that both kinds of request have. Unknown ones are ignored, unsupported ones refused."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stop: Stops = Field([], max_length=MAX_STOPS)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    seed: int | None = None
    ignore_eos: bool = False
    max_tokens: int | None = Field(None, ge=1)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else [] if value is None else value

    @field_validator("n", "temperature", "top_p", mode="before")
    @classmethod
    def _default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @model_validator(mode="after")
    def _supported(self) -> Body:
        for name, given in (self.model_extra or {}).items():
            if name in _UNSUPPORTED and given not in _UNSUPPORTED[name]:
                raise ValueError(f"{name} is not supported, leave it out")
        return self

    @property
    def new_tokens(self) -> int | None:
        """The most new tokens that were asked for."""
        return self.max_tokens

    @property
    def told(self) -> int | None:
        """Best tokens to give beside each new one's log probability; None for neither."""
        return None

    def jobs(self, prompt: list[int], room: int, listen: Callable[[int], Callable[[Event], None]]) -> list[Job]:
        """A job for each of ``n`` choices, of up to ``room`` new tokens where none were asked for."""
        seed = random.getrandbits(63) if self.seed is None else self.seed % 2**63
        new = self.new_tokens or max(min(room, _NEW_TOKENS if self.bounded else room), 1)
        return [
            Job(prompt, GenerationOptions(
                new, temperature=self.temperature or None, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p,
                repetition_penalty=self.repetition_penalty, ignore_eos=self.ignore_eos, seed=(seed + index) % 2**63,
            ), listen(index), self.told)
            for index in range(self.n)
        ]

    @property
    def bounded(self) -> bool:
        """True where a request that names no number of tokens gets a bounded one."""
        return False


class CompletionBody(Body):
    """A request of ``/v1/completions``: one prompt, as text or token ids."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def told(self) -> int | None:
        return self.logprobs

    @property
    def bounded(self) -> bool:
        return True

    def tokens(self, tokenizer: Any) -> list[int]:
        """The prompt's token ids. Raises ``ValueError`` for several prompts."""
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
            if len(prompt) > 1:
                raise ValueError(
                    f"prompt must be one text or one list of token ids, got {len(prompt)}; send a request each"
                )
            prompt = prompt[0]
        return token_ids(tokenizer, prompt) if isinstance(prompt, str) else list(prompt)


class Part(BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(Body):
    """A request of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @model_validator(mode="after")
    def _asked(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def told(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def conversation(self, tokenizer: Any) -> Conversation:
        """The messages as the tokenizer's template, or plain words, take them."""
        found = Conversation(tokenizer)
        for message in self.messages:
            found.add("system" if message.role == "developer" else message.role, message.text)
        return found
