"""Convert a conversation to token ids, by the tokenizer's chat template or in plain words where it has none."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gemq.algorithms import conversations
from gemq.errors import CheckpointError

_NAMES = {"system": "System", "user": "User", "assistant": "Assistant"}


@dataclass
class Conversation:
    """Messages so far. ``templated`` tells whether the tokenizer has a chat template; without one the text is
    ``User: ...`` and ``Assistant: ...`` lines, and an answer ends where the model writes the next ``User:``."""

    tokenizer: object
    system: str | None = None
    messages: list[dict[str, str]] = field(init=False)

    def __post_init__(self) -> None:
        self.clear()

    @property
    def templated(self) -> bool:
        """True if the tokenizer brings a chat template."""
        return conversations.has_template(self.tokenizer)

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return () if self.templated else ("\nUser:",)

    def clear(self) -> None:
        """Remove all messages but the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def add(self, role: str, content: str) -> None:
        """Append a message of ``user`` or ``assistant``."""
        self.messages.append({"role": role, "content": content})

    def drop_last(self) -> None:
        """Remove the last message."""
        self.messages.pop()

    def tokens(self) -> list[int]:
        """Token ids of the conversation, up to the place where the assistant answers. Raises :class:`CheckpointError`
        if the template refuses it."""
        if not self.templated:
            lines = [f"{_NAMES[m['role']]}: {m['content']}" for m in self.messages]
            return token_ids(self.tokenizer, "\n".join([*lines, "Assistant:"]))
        return token_ids(self.tokenizer, render(self.tokenizer, self.messages), add_special_tokens=False)

    def cut(self, answer: str) -> tuple[str, bool]:
        """``(answer up to the first stop text, True if there is one)``."""
        found = [at for at in (answer.find(s) for s in self.stop) if at >= 0]
        return (answer[: min(found)], True) if found else (answer, False)


def token_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Token ids of a text. Raises ``ValueError`` for halves of surrogate pairs, which belong to no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text must be Unicode, got half a surrogate pair at character {error.start}") from None
    return list(tokenizer(text, return_token_type_ids=False, **options)["input_ids"])


def render(tokenizer: Any, messages: list[dict]) -> str:
    """Messages through the tokenizer's chat template, as text that ends where the assistant is to speak.

    Raises :class:`CheckpointError` if there is no template, it fails on these messages, or makes no text of them.
    """
    if not conversations.has_template(tokenizer):
        raise CheckpointError("the tokenizer has no chat template; leave --chat out, or use gemq chat")
    try:
        return conversations.render(tokenizer, messages, prompt=True)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
