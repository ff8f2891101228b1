"""Hooks of mkdocs: formulas become MathML when the site is built, so that pages need no script for them."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</(?P=tag)>', re.DOTALL
)


def _mathml(match: re.Match[str]) -> str:
    block = match["block"] is not None
    return convert(html.unescape(match["block"] if block else match["inline"]), display="block" if block else "inline")


def on_page_content(html: str, **kwargs: Any) -> str:
    """Replace the formulas of a page."""
    return _FORMULA.sub(_mathml, html)
