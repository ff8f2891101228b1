"""Standard streams that stop nothing: what cannot be shown is not."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, cast

_FULL = (errno.ENOSPC, errno.EDQUOT)


class PipeSafeStream:
    """A text file that drops what it has no room for, as on a full disk.

    It falls silent once nobody reads it any more, as a terminal that is gone.

    Args:
        file: such as the standard output.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        """Write a text, or nothing."""
        try:
            return self._file.write(text)
        except OSError as error:
            self._fail(error)
            return len(text)

    def flush(self) -> None:
        """Write what is left, or nothing."""
        try:
            self._file.flush()
        except OSError as error:
            self._fail(error)

    def end(self) -> None:
        """Write what is left, for the last time."""
        try:
            self._file.flush()
        except (OSError, ValueError):
            self._silence()

    def _fail(self, error: OSError) -> None:
        if error.errno not in _FULL:  # else there may be room again
            self._silence()

    def _silence(self) -> None:
        """Lead it nowhere: Python itself would fail to write the rest at its end."""
        with suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), self._file.fileno())


@contextmanager
def outlets() -> Iterator[None]:
    """Let the standard streams stop nothing meanwhile."""
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
