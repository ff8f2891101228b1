"""The documentation site builds without a warning, and its pages need no other host."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest

from lightning_normgeo import __all__ as public
from support.isolation import REPOSITORY

NEEDED = ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter", "latex2mathml")
MISSING = [name for name in NEEDED if not importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; install the extra `docs`")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site once; links and anchors that do not resolve are warnings, which stop the build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_pages_are_there(site: Path) -> None:
    docs = REPOSITORY / "docs"
    sources = [page.relative_to(docs).with_suffix("") for kind in ("*.md", "*.ipynb") for page in docs.rglob(kind)]
    built = {page.parent.relative_to(site) for page in site.rglob("index.html")}
    assert built == {path.parent if path.name == "index" else path for path in sources}
    assert not list(site.rglob("*.py"))


def test_public_names_have_anchors(site: Path) -> None:
    pages = [page.read_text(encoding="utf-8") for page in (site / "api").rglob("*.html")]
    ends = {name.rpartition(".")[2] for text in pages for name in re.findall(r'id="([\w.]+)"', text)}
    assert set(public) - ends == {"__version__"}


def test_pages_load_nothing_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]* src="(https?:[^"]+)"', text)
        links = re.findall(r"<link[^>]*>", text)
        loaded += [link for link in links if "http" in link and not re.search(r'rel="?(canonical|prev|next)', link)]
        assert loaded == [], page


def test_formulas_and_markup_are_rendered(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = re.sub(r"<(script|pre|code)\b.*?</\1>", "", page.read_text(), flags=re.DOTALL)
        plain = unescape(re.sub(r"<annotation.*?</annotation>|<[^>]+>", "", text, flags=re.DOTALL))
        left = re.findall(r":(?:math|func|class|data|meth|attr|mod):|arithmatex|\\\(|--8<--|\.\. math", plain)
        assert left == [], page


def test_links_of_all_pages_resolve(site: Path) -> None:
    """This includes notebooks, whose links mkdocs does not check."""
    text = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    anchors = {page: set(re.findall(r' id="([^"]+)"', content)) for page, content in text.items()}
    for page, content in text.items():
        for link in re.findall(r'<a [^>]*href="([^":]+)"', content) if page.name == "index.html" else ():
            target, _, anchor = unescape(link).partition("#")
            path = (page.parent / target).resolve() if target else page
            path = path / "index.html" if path.is_dir() else path
            assert path.is_file(), f"{page.relative_to(site)}: {link}"
            assert not anchor or unquote(anchor) in anchors[path], f"{page.relative_to(site)}: {link}"
