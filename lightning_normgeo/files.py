"""Files that survive a kill: lines that are appended, and documents of which a reader never sees half."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Let a file be written beside ``path``, and put it in its place at once; nothing is left of one that failed."""
    draft = path.with_name(f"{path.name}.part")
    try:
        yield draft
        os.replace(draft, path)  # noqa: PTH105 - atomic
    finally:
        draft.unlink(missing_ok=True)


def write_document(path: Path, document: Any) -> None:
    """Write JSON, replacing what is there at once; numbers that are not finite become null."""
    with replacing(path) as draft:
        text = json.dumps(finite(document), indent=2, default=str, allow_nan=False)
        draft.write_text(text + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """Return nested values with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
