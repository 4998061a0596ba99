"""Conversations as text: messages of a record, through the tokenizer's own chat template."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jinja2

from gemq.time_limit import TimeLimitError, time_limit

# fields in which records keep their messages, in order of preference
FIELDS = ("messages", "conversations")
# ShareGPT's names of who speaks, as templates know them
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}

# time limit in seconds for rendering a conversation, which takes milliseconds
SECONDS = 5.0
LONGEST = 50_000_000


def has_template(tokenizer: Any) -> bool:
    """Tell if the tokenizer brings a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def render(tokenizer: Any, messages: list[dict], prompt: bool) -> str:
    """Messages through the tokenizer's chat template.

    With ``prompt`` the text ends where the assistant is to speak, else after the last message. The template is a
    stranger's program in a sandbox: it may fail with anything, or not end, and that becomes a ``ValueError``, as do
    no text and more than :data:`LONGEST` characters.
    """
    try:
        for template in _templates(tokenizer):
            _refuse_powers(template)
        with time_limit(SECONDS):
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except TimeLimitError:
        raise ValueError(f"the chat template of the tokenizer failed: it took more than {SECONDS:g} seconds") from None
    except Exception as error:
        raise ValueError(f"the chat template of the tokenizer failed: {error}") from error
    if len(text) > LONGEST:
        raise ValueError(f"the chat template of the tokenizer made {len(text):,} characters, at most {LONGEST:,} are "
                         f"taken")
    if not text:
        raise ValueError("the chat template of the tokenizer makes no text of the messages")
    return text


def _templates(tokenizer: Any) -> list[str]:
    found = tokenizer.chat_template
    return [text for text in (found.values() if isinstance(found, dict) else [found]) if isinstance(text, str)]


@lru_cache(maxsize=16)
def _refuse_powers(template: str) -> None:
    """Raise ``ValueError`` for the operator ``**``: a power of powers is one call into C that no limit ends."""
    before = ""
    for _, kind, value in jinja2.Environment().lex(template):
        if kind == "operator" and value == "**" and before not in ("(", ","):
            raise ValueError("it raises to a power (**), which may take for ever")
        before = before if kind == "whitespace" else value


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
