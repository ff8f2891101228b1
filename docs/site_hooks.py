"""Hooks of mkdocs: formulas become MathML, links of notebooks are resolved, and the search dialog gets a name."""

from __future__ import annotations

import html as entities
import logging
import posixpath
import re
from typing import Any

from latex2mathml.converter import convert

_LOG = logging.getLogger("mkdocs.hooks")
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">(?:\\\((?P<inline>.*?)\\\)|\\\[(?P<block>.*?)\\\])</(?P=tag)>', re.DOTALL
)
_BAR = re.compile(r"<mo>(&#x02016;|&#x02223;|&#x0007C;|\|)</mo>")  # bars with an exponent would have two sizes
_LINK = re.compile(r'href="(?P<path>[^":#]+\.(?:md|ipynb))(?P<anchor>#[^"]*)?"')
_SEARCH = '<div class="md-search" data-md-component="search" role="dialog"'


def _mathml(match: re.Match[str]) -> str:
    block = match["block"] is not None
    formula = entities.unescape(match["block"] if block else match["inline"])
    text = convert(formula, display="block" if block else "inline")
    return _BAR.sub(r'<mo stretchy="false">\1</mo>', text)


def _resolved(page: Any, files: Any, match: re.Match[str]) -> str:
    """Return a link of a notebook, which mkdocs itself leaves as it is, with the address of the page on the site."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), match["path"]))
    target = files.get_file_from_path(path)
    if target is None:
        _LOG.warning("Notebook '%s' links to '%s', which is no page.", page.file.src_uri, match["path"])
        return match[0]
    return f'href="{target.url_relative_to(page.file)}{match["anchor"] or ""}"'


def on_page_content(html: str, page: Any, files: Any, **kwargs: Any) -> str:
    """Replace the formulas of a page, and the links of a notebook."""
    if page.file.src_uri.endswith(".ipynb"):
        html = _LINK.sub(lambda match: _resolved(page, files, match), html)
    return _FORMULA.sub(_mathml, html)


def on_post_page(output: str, **kwargs: Any) -> str:
    """Name the search dialog for screen readers, which the theme does not, and let no empty cell be a header."""
    return output.replace(_SEARCH, f'{_SEARCH} aria-label="Search"').replace("<th></th>", "<td></td>")
