"""Text that others wrote, as text: nothing in it moves a cursor, turns lines around or hides."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
"""Line feeds and tabs, which files need, and the joiners that Persian, Indic languages and emoji are written with."""
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Categories of Unicode: controls (ESC among them), formats (as bidirectional overrides), halves of surrogate pairs,
and the line and paragraph separators, which end a line of JavaScript."""


def plain(text: object) -> str:
    r"""Return a text with what would act on a terminal or a page, instead of being seen there, as escapes.

    ``"\x1b[31m"`` becomes ``"\\x1b[31m"``; line feeds and tabs stay. The result can be encoded as UTF-8.
    """
    text = str(text)
    return text if text.isprintable() else "".join(map(_visible, text))


def plain_line(text: object) -> str:
    """Return such a text in one line: white space becomes single spaces."""
    return " ".join(plain(text).split())


def _visible(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _UNSEEN:
        return character
    return character.encode("unicode_escape").decode("ascii")
