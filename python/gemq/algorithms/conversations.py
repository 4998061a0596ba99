"""Conversations as text: messages of a record, through the tokenizer's own chat template."""

from __future__ import annotations

from typing import Any

# where records keep their messages, in the order of preference
FIELDS = ("messages", "conversations")
# ShareGPT's names of who speaks, as templates know them
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}


def has_template(tokenizer) -> bool:
    """Tell if the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer, messages: list[dict], prompt: bool) -> str:
    """Messages through the tokenizer's chat template.

    With ``prompt`` the text ends where the assistant is to speak, else after the last message. The template is a
    stranger's program in a sandbox: it may fail with anything, and that becomes a ``ValueError``, as does no text.
    """
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:
        raise ValueError(f"the chat template of the tokenizer failed: {error}") from error
    if not text:
        raise ValueError("the chat template of the tokenizer makes no text of the messages")
    return text


def messages_of(value: list) -> list[dict] | None:
    """The messages of a list of ``{"role", "content"}`` or of ShareGPT's ``{"from", "value"}``; None if it is empty or
    one says null. Raises ``TypeError`` for another list."""
    found = []
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise TypeError(f"message {index} is no object with role and content")
        role, content = (_either(message, index, *names) for names in (("role", "from"), ("content", "value")))
        if content is None and not message.get("tool_calls"):
            return None
        if not isinstance(role, str) or not isinstance(content, str | list | None):
            raise TypeError(f"message {index} has a role or content that is no text")
        kept = {k: v for k, v in message.items() if k not in ("from", "value") and v is not None}
        found.append(kept | {"role": _ROLES.get(role, role), "content": content})
    return found or None


def _either(message: dict[str, Any], index: int, first: str, second: str) -> Any:
    if first in message or second in message:
        return message[first] if first in message else message[second]
    raise TypeError(f"message {index} has neither {first!r} nor {second!r}")
