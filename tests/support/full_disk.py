"""Disks that fail: by the operating system's own limit on file sizes, or at a chosen call."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

resource = pytest.importorskip("resource", reason="no such limit")

PLACES = ("mkdir", "open", "write", "fsync", "replace")
"""Calls that write a file."""


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """Limit the size of files by the operating system; of a longer file only the first part is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def failing(place: str, folder: Path, number: int = errno.ENOSPC) -> Iterator[None]:
    """Make one call fail for all files below a folder; files already open can be written unless it is ``write``."""
    with pytest.MonkeyPatch.context() as patch:

        def below(path: Any) -> bool:
            return folder.resolve() in (Path(path).resolve(), *Path(path).resolve().parents)

        def fail(path: Any) -> None:
            if below(path):
                raise OSError(number, os.strerror(number), str(path))

        originals = {"mkdir": Path.mkdir, "open": Path.open, "fsync": os.fsync, "replace": os.replace}

        def opened(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if place == "open" and set(mode) & set("aw+"):
                fail(path)
            file = originals["open"](path, mode, *args, **kwargs)
            if place == "write" and set(mode) & set("aw") and below(path):
                return Unwritable(file, number)
            return file

        if place == "mkdir":
            patch.setattr(Path, "mkdir", lambda path, *a, **k: fail(path) or originals["mkdir"](path, *a, **k))
        elif place == "fsync":

            def fsync(descriptor: int) -> None:
                fail(Path(f"/proc/self/fd/{descriptor}").readlink())
                originals["fsync"](descriptor)

            patch.setattr(os, "fsync", fsync)
        elif place == "replace":
            patch.setattr(os, "replace", lambda one, other: fail(other) or originals["replace"](one, other))
        else:
            patch.setattr(Path, "open", opened)
        yield


class Unwritable:
    """An open file that accepts half of the first write, and then nothing."""

    def __init__(self, file: Any, number: int) -> None:
        self._file, self._number, self._half = file, number, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> int:
        if not self._half:
            self._half = True
            count = int(self._file.write(data[: len(data) // 2]))
            if count and isinstance(self._file, io.RawIOBase):  # other files cannot report a partial write
                return count
        raise OSError(self._number, os.strerror(self._number))

    def __enter__(self) -> Unwritable:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
