"""Files that survive a kill: lines that are appended, and documents of which a reader never sees half."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


def open_lines(path: Path) -> TextIO:
    """Open a file of JSON lines to append to, after ending the half line that a killed process may have left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8")
    file.write("\n" * torn)
    return file


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of such a file; a torn one is left out."""
    with path.open(encoding="utf-8") as file:
        for text in file:
            try:
                yield json.loads(text)
            except json.JSONDecodeError:
                continue


def write_document(path: Path, document: Any) -> None:
    """Write JSON, replacing what is there at once."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(draft, path)  # noqa: PTH105 - atomic
