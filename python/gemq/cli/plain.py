"""Text that a terminal shows and never obeys."""

from __future__ import annotations

# what text is made of beside printable characters: the joiners of emoji and of several scripts, soft hyphen, word
# joiner and variation selectors (categories that isprintable() refuses, or that vary with the version of Unicode)
_HARMLESS = frozenset("\u200c\u200d\u00ad\u2060\u00a0\u2007\u202f\u3000")


def printable(text: str, keep: str = "\t\n") -> str:
    """``text`` with each character that a terminal could obey written as its escape, like ``\\x1b`` or ``\\u202e``.

    Characters in ``keep`` stay, as do spaces of every width, joiners (emoji, Persian, Devanagari) and combining marks.
    Escaped are control characters of both sets, changes of the writing direction, separators of lines and paragraphs,
    lone surrogates, and codes that Unicode has not assigned.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _stays(c, keep) else c.encode("unicode_escape").decode("ascii") for c in text)


def _stays(character: str, keep: str) -> bool:
    if character in keep or character.isprintable() or character in _HARMLESS:
        return True
    # spaces (Zs) move the cursor as letters do; tags spell the flags of England, Scotland and Wales
    return "\u2000" <= character <= "\u200a" or character in "\u1680\u205f" or 0xE0020 <= ord(character) <= 0xE007F
