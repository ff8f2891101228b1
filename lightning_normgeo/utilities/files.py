"""Files that survive a killed process: appended lines, and documents that are replaced atomically."""

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

from lightning_normgeo.errors import ConfigurationError

try:
    import orjson  # reads lines five times as fast
except ImportError:
    orjson = None  # type: ignore[assignment]

_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_NOT_SYNCED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
"""Errors of file systems on which ``fsync`` is not possible."""


def parsed(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line.

    Unpaired surrogates in texts, which no encoding could write again, are replaced by question marks.

    Raises:
        ValueError: if the line holds no JSON object; the message says why in a few words.
    """
    if orjson is not None:
        with suppress(ValueError):  # what it does not take is read, or refused, below
            fast = orjson.loads(line)
            if isinstance(fast, dict):
                return fast
    try:
        text = line.strip(b"\0 \t\r\n").decode("utf-8-sig")  # file systems may leave zeros after a crash
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
"""The largest number of bytes that are read as one line. Lines of records have thousands of bytes; the bound is for
files without line ends."""


def raw_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a text file as bytes of UTF-8, whether the file is in UTF-8 or UTF-16."""
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
    """Yield the JSON objects of a file that has one per line, without the lines that hold none.

    Args:
        path: path of the file.
        left_out: counter that is increased for each line without a JSON object, by reason; empty lines do not count.
            Default: none.
    """
    for line in raw_lines(path):
        if line.isspace():
            continue
        try:
            yield parsed(line)
        except ValueError as error:
            if left_out is not None:
                left_out[str(error)] += 1


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that a user has given; a leading ``~`` is the home folder, also where no shell has replaced it.

    Raises:
        ConfigurationError: If it is an address of remote storage, which would become folders of such a name.
    """
    if is_address(path):
        raise ConfigurationError(f"{path} is an address. Give the path of a file or folder of this machine.")
    return Path(os.path.expanduser(path))  # noqa: PTH111 - keeps the ~name of nobody, where Path raises an error


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address of remote storage, as ``s3://bucket/runs``."""
    return isinstance(path, str) and "://" in path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Context for writing a file: yields a draft beside ``path`` that atomically replaces it once it is on the disk.

    If the context fails, the draft is removed and ``path`` stays unchanged.
    """
    draft = path.with_name(f"{path.name}.part")
    try:
        yield draft
        _synchronize(draft)
        os.replace(draft, path)  # noqa: PTH105 - replaces atomically
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a file, atomically replacing an existing one; its folder is created if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        draft.write_bytes(content)


def write_document(path: Path, document: Any) -> None:
    """Write a JSON file, atomically replacing an existing one; numbers that are not finite become null."""
    write_file(path, as_json(document))


def as_json(document: Any) -> bytes:
    """Return a document as the content of a JSON file; numbers that are not finite become null."""
    return (json.dumps(finite(document), indent=2, default=str, allow_nan=False) + "\n").encode()


def finite(value: Any) -> Any:
    """Return nested values with None in place of infinite numbers and NaN, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _synchronize(path: Path) -> None:
    """Force a file to the disk: after a crash its name could otherwise exist without its content."""
    with path.open("rb+") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in _NOT_SYNCED:
                raise


def _encodable(value: Any) -> Any:
    """Return nested values with question marks in place of unpaired surrogates."""
    if isinstance(value, dict):
        return {_encodable(key): _encodable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_encodable(entry) for entry in value]
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
