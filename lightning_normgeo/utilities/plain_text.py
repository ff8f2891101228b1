"""Safe display of text from others: control characters, which move the cursor or hide text, are shown as escapes."""

from __future__ import annotations

import unicodedata

_KEPT = "\n\t\N{ZERO WIDTH NON-JOINER}\N{ZERO WIDTH JOINER}"
"""Line feeds and tabs, which files need, and the joiners that Persian, Indic languages and emoji need."""
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode categories of invisible characters: controls (such as ESC), formats (such as bidirectional overrides),
unpaired surrogates, and the line and paragraph separators, which end a line of JavaScript."""


def plain(text: object) -> str:
    r"""Return a text with escapes in place of invisible characters, which could control a terminal or a page.

    ``"\x1b[31m"`` becomes ``"\\x1b[31m"``; line feeds and tabs stay. The result can be encoded as UTF-8.
    """
    text = str(text)
    return text if text.isprintable() else "".join(map(_visible, text))


def plain_line(text: object) -> str:
    """Return a text as from :func:`plain` in one line, with single spaces in place of white space."""
    return " ".join(plain(text).split())


def _visible(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _UNSEEN:
        return character
    return character.encode("unicode_escape").decode("ascii")
