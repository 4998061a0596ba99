"""Text that a terminal shows and never obeys."""

from __future__ import annotations

from unicodedata import category

# controls, formats, halves of surrogate pairs, separators of lines and of paragraphs
_OBEYED = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))
# formats that only join, part or mark letters: soft hyphen, zero width space, (non-)joiner, word joiner, Arabic and
# other number signs, and the tags that spell the flags of England, Scotland and Wales
_HARMLESS = frozenset(
    "\u00ad\u200b\u200c\u200d\u2060\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
) | frozenset(map(chr, range(0xE0020, 0xE0080)))


def printable(text: str, keep: str = "\t\n") -> str:
    """``text`` with each character that a terminal could obey written as its escape, like ``\\x1b`` or ``\\u202e``.

    Characters in ``keep`` stay, as do spaces of every width, joiners (emoji, Persian, Devanagari) and combining marks.
    Escaped are control characters of both sets, changes of the writing direction, separators of lines and paragraphs,
    and lone surrogates.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if _stays(c, keep) else c.encode("unicode_escape").decode("ascii") for c in text)


def _stays(character: str, keep: str) -> bool:
    return character in keep or character in _HARMLESS or category(character) not in _OBEYED
