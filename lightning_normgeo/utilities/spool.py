"""Lines and files that wait in memory while they cannot be written."""

from __future__ import annotations

import errno
import os
import time
from collections import deque
from contextlib import suppress
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from lightning_normgeo.utilities.files import write_file

MOST_WAITING = 16 * 2**20
"""Bytes that may wait."""
_SLOW, _PATIENCE = 0.1, 10.0
"""An attempt that fails after more than so many seconds, as on a network, is not repeated before so many times as long:
no more than a tenth of the time is lost."""
_PAUSE = 1.0
"""Seconds between two attempts at a whole file."""


class Outage(NamedTuple):
    """A time when lines could not be written.

    Attributes:
        reason: as the operating system gives it.
        waited: how many lines were written later.
        lost: how many were not, as too many waited.
    """

    reason: str
    waited: int
    lost: int


class _Line(NamedTuple):
    data: bytes
    spare: bool


class Spool:
    """Appends lines to a file and writes whole files; what cannot be written waits, and is tried again with the next.

    Nothing raises an error of the file system. Where half of a line was written before the disk was full, the other
    half follows. A half line that somebody else has left, killed, is ended before the next one begins.

    Cost: one system call for each line; at most :data:`MOST_WAITING` bytes of memory, twice that with whole files.

    Args:
        path: of the file with lines; it and its folder are made when there is something to write.
        most: bytes of lines that may wait, and of whole files. Beyond that the oldest are dropped, and counted; of
            lines those first that can be spared.

    Attributes:
        path: the same.
        error: why lines cannot be written at present; None while they are.
        lost: how many lines were dropped.
    """

    def __init__(self, path: Path, most: int = MOST_WAITING) -> None:
        self.path = path
        self.error: Exception | None = None
        self.lost = 0
        self._most = most
        self._lines: deque[_Line] = deque()
        self._size = 0
        self._written = 0  # bytes of the first line
        self._files: dict[Path, bytes] = {}
        self._problems: dict[Path, str] = {}
        self._waited, self._outage_lost, self._outage = 0, 0, ""
        self._lines_again, self._files_again = 0.0, 0.0
        self._file: FileIO | None = None

    @property
    def waiting(self) -> int:
        """How many lines are not written yet."""
        return len(self._lines)

    @property
    def files(self) -> dict[Path, str]:
        """The whole files that are not written, and why."""
        return dict(self._problems)

    def append(self, text: str, spare: bool = False) -> bool:
        """Append a line; return whether it is written.

        Args:
            text: of the line, without its end.
            spare: whether it is dropped before others where too much waits.
        """
        self._lines.append(_Line(text.encode("utf-8", "replace") + b"\n", spare))
        self._size += len(self._lines[-1].data)
        self.flush()
        while self._size > self._most and len(self._lines) > 1:
            self._drop()
        return not self._lines

    def put(self, path: Path, content: bytes) -> bool:
        """Write a whole file, replacing an earlier one at once; return whether it is written."""
        self._files.pop(path, None)
        self._files[path] = content
        self._write_file(path)
        while sum(map(len, self._files.values())) > self._most:
            self._files.pop(next(iter(self._files)))  # its problem stays to be told
        return path not in self._problems

    def flush(self, now: bool = False) -> None:
        """Write what waits, as far as that is possible.

        Args:
            now: also where a slow attempt has just failed.
        """
        began, failing = time.monotonic(), self.error is not None
        if self._lines and (now or began >= self._lines_again):
            self._write_lines()
            self._lines_again = _patient(began) if self._lines else 0.0
        now = now or (failing and self.error is None)  # there is room again
        if self._files and (now or began >= self._files_again):
            for path in list(self._files):
                self._write_file(path)
            self._files_again = _patient(began) + _PAUSE

    def ended_outage(self) -> Outage | None:
        """What happened, once, when lines are written again after a time when they were not."""
        if not self._outage or self.error is not None:
            return None
        outage = Outage(self._outage, self._waited, self._outage_lost)
        self._outage, self._waited, self._outage_lost = "", 0, 0
        return outage

    def close(self) -> None:
        """Write what waits, and let go of the file; the next line opens it again."""
        self.flush(now=True)
        self._close()

    def _write_lines(self) -> None:
        try:
            file = self._open()
            while self._lines:
                data = self._lines[0].data
                while self._written < len(data):
                    count = file.write(data[self._written :])
                    if not count:  # no system does this to a file
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    self._written += count
                self._waited += bool(self._outage)
                self._forget(0)
        except (OSError, ValueError) as error:  # the second: a name that no file can have
            self.error, self._outage = error, reason_of(error)
            self._close()
        else:
            self.error = None

    def _open(self) -> FileIO:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # without a buffer, so that it is known how much was written
            self._file = self.path.open("ab", buffering=0)
            self._take_up(self._file)
        return self._file

    def _take_up(self, file: FileIO) -> None:
        """Go on in the middle of the first line if that is how the file ends; else begin with a new line."""
        half = self._lines[0].data[: self._written]
        with self.path.open("rb") as found:
            length = found.seek(0, 2)
            found.seek(max(0, length - max(1, len(half))))
            tail = found.read()
        if half and tail == half:
            return
        self._written = 0
        if tail and not tail.endswith(b"\n"):
            file.write(b"\n")

    def _write_file(self, path: Path) -> None:
        try:
            write_file(path, self._files[path])
        except (OSError, ValueError) as error:
            self._problems[path] = reason_of(error)
        else:
            self._files.pop(path)
            self._problems.pop(path, None)

    def _drop(self) -> None:
        """Drop the oldest line that can be spared, of those that wait before the last."""
        older = enumerate(islice(self._lines, len(self._lines) - 1))
        chosen = next((k for k, line in older if line.spare), 0)
        self.lost += 1
        self._outage_lost += 1
        self._forget(chosen)

    def _forget(self, number: int) -> None:
        self._size -= len(self._lines[number].data)
        del self._lines[number]
        if number == 0:
            self._written = 0

    def _close(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            self._file = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open file and what waits, which belong to one process."""
        return Spool(self.path, self._most).__dict__


def _patient(began: float) -> float:
    """When an attempt that began then and ends now is worth a repetition."""
    now = time.monotonic()
    took = now - began
    return now + _PATIENCE * took if took > _SLOW else now


def reason_of(error: Exception) -> str:
    """Why something cannot be written, in the operating system's words."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
