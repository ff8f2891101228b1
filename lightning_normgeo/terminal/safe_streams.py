"""Standard streams that never raise errors: output that cannot be written is dropped."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

_FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk or an exhausted quota, after which later writes may succeed again."""


class PipeSafeStream:
    """A text file that drops text for which the disk has no room.

    After any other error, such as a closed pipe or terminal, it drops everything.

    Args:
        file: the file to write to, such as the standard output.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it if that fails; return its length."""
        try:
            return self._file.write(text)
        except OSError as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        """Write buffered text, or drop it if that fails."""
        try:
            self._file.flush()
        except OSError as error:
            self._fail(error)

    def end(self) -> None:
        """Write buffered text for the last time, and drop it if that fails."""
        try:
            self._file.flush()
        except (OSError, ValueError):
            self._silence()

    def _fail(self, error: OSError) -> None:
        if error.errno not in _FULL:  # a full disk may have room later
            self._silence()

    def _silence(self) -> None:
        """Redirect the file to the null device, as Python itself would fail to write the buffer at exit."""
        with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self._file.fileno())


@contextmanager
def outlets() -> Iterator[None]:
    """Context in which writing to the standard streams never raises an error."""
    before = sys.stdout, sys.stderr
    own = [None if stream is None else PipeSafeStream(stream) for stream in before]
    sys.stdout, sys.stderr = cast("list[TextIO]", own)
    try:
        yield
    finally:
        for stream in own:
            if stream is not None:
                stream.end()
        sys.stdout, sys.stderr = before
