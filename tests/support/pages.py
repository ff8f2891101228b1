"""Markdown pages of the documentation: their code blocks, commands, links and pictures."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_normgeo.cli import NormgeoCLI
from lightning_normgeo.report.report_command import report_parser
from lightning_normgeo.study import load_study
from lightning_normgeo.study.study_command import study_parser
from support.isolation import REPOSITORY
from support.scripts import load_script

DOCS = REPOSITORY / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTEBOOKS = sorted((DOCS / "tutorials").glob("*.ipynb"))
_BLOCK = re.compile(r"(?:<!-- fragment: (?P<reason>.+) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A code block; ``reason`` says why it is a fragment that cannot run by itself, if it is one."""

    page: Path
    language: str
    code: str
    reason: str | None


def named(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def blocks(page: Path, language: str) -> list[Block]:
    """Return the code blocks of a page."""
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(page, match["language"], match["code"], match["reason"]) for match in found if match[2] == language]


def commands(page: Path) -> Iterator[str]:
    """Yield the lines of a page's shell blocks, without comments."""
    for block in blocks(page, "bash"):
        for line in block.code.splitlines():
            if line.partition(" #")[0].strip():
                yield line.partition(" #")[0].strip()


def without_code(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def entries() -> set[str]:
    """Return the paths of all entries in the API reference."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    return set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))


def public_names(package: str) -> set[str]:
    """Return the names that a package exports: those that it imports ``as`` themselves, also for types only."""
    file = REPOSITORY.joinpath(*package.split("."), "__init__.py")
    imports = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names if alias.asname == alias.name}


def generator() -> ModuleType:
    """Return ``docs/generate.py``."""
    return load_script("docs/generate.py")


def accept(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a command of ``normgeo`` as a shell does; models are built and trained in other tests."""
    parsed: list[Any] = []
    monkeypatch.setattr(NormgeoCLI, "instantiate_classes", lambda self: parsed.append(self.config))
    monkeypatch.setattr(NormgeoCLI, "after_instantiate_classes", lambda self: None)
    monkeypatch.setattr(NormgeoCLI, "_run_subcommand", lambda self, name: None)
    for check_of in ("check_exists", "check_checkpoint"):  # files that only the reader has
        monkeypatch.setattr(f"lightning_normgeo.cli.command.{check_of}", lambda *_: None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, name, *options = shlex.split(command.partition(" > ")[0])
    if name == "study":
        path = study_parser().parse_args(options).study
        assert path.endswith(".yaml") or load_study(path).runs()  # which other tests check in full
    elif name == "report":
        assert report_parser().parse_args(options).runs
    else:
        NormgeoCLI([name, *options])
        assert parsed
