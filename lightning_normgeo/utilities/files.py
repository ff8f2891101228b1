"""Files that survive a kill: lines that are appended, and documents of which a reader never sees half."""

from __future__ import annotations

import codecs
import errno
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_NOT_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""Some file systems cannot be told to bring a file to the disk."""


def parsed(line: bytes) -> dict[str, Any]:
    """The JSON object that a line holds.

    Texts have no half surrogates, which nothing could write: a question mark is in the place of each.

    Raises:
        ValueError: saying in a few words why it is none.
    """
    try:
        text = line.strip(b"\0 \t\r\n").decode("utf-8-sig")  # a file system that crashed leaves zeros
    except UnicodeDecodeError as error:
        raise ValueError("no UTF-8") from error
    try:
        found = json.loads(text)
        found = _encodable(found) if "\\u" in text else found
    except (ValueError, RecursionError) as error:
        raise ValueError("no JSON") from error
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


_LONGEST = 2**28
"""Bytes of a line, of which a record has thousands: a file without ends of lines is read in parts of this size."""


def raw_lines(path: Path) -> Iterator[bytes]:
    """The lines of a text in UTF-8 as they are, and of one in UTF-16 as if it were."""
    with path.open("rb") as file:
        wide = file.read(2) in _WIDE
        file.seek(0)
        if not wide:
            yield from iter(lambda: file.readline(_LONGEST), b"")
            return
    with path.open(encoding="utf-16", errors="replace") as texts:
        for text in texts:
            yield text.encode()


def read_lines(path: Path, left_out: Counter[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file that has one in each line; other lines are left out.

    Args:
        path: of the file.
        left_out: counts these by reason.
    """
    for line in raw_lines(path):
        if line.isspace():
            continue
        try:
            yield parsed(line)
        except ValueError as error:
            if left_out is not None:
                left_out[str(error)] += 1


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Let a file be written beside ``path``, and put it in its place at once when it is on the disk.

    Nothing is left of one that failed.
    """
    draft = path.with_name(f"{path.name}.part")
    try:
        yield draft
        _synchronize(draft)
        os.replace(draft, path)  # noqa: PTH105 - atomic
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a file, replacing what is there at once; its folder is made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        draft.write_bytes(content)


def write_document(path: Path, document: Any) -> None:
    """Write JSON, replacing what is there at once; numbers that are not finite become null."""
    write_file(path, as_json(document))


def as_json(document: Any) -> bytes:
    """A document as the text of a JSON file; numbers that are not finite become null."""
    return (json.dumps(finite(document), indent=2, default=str, allow_nan=False) + "\n").encode()


def finite(value: Any) -> Any:
    """Return nested values with None for numbers that JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _synchronize(path: Path) -> None:
    """Bring a file from the operating system's memory to the disk: else a crash could leave its name without it."""
    with path.open("rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in _NOT_SYNCED:
                raise


def _encodable(value: Any) -> Any:
    if isinstance(value, dict):
        return {_encodable(key): _encodable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_encodable(entry) for entry in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
