"""Writing of lines and files that keeps them in memory while the disk is full or out of reach."""

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
"""The largest number of bytes that wait in memory."""
_SLOW, _PATIENCE = 0.1, 10.0
"""A failed attempt that took longer than the first number, in seconds, as on a network, is repeated only after the
second number times as long: at most a tenth of the time is lost."""
_PAUSE = 1.0
"""Seconds between two attempts to write whole files."""


class Outage(NamedTuple):
    """A period in which lines could not be written.

    Attributes:
        reason: the operating system's message.
        waited: number of lines that were written later.
        lost: number of lines that were dropped, as too many waited.
    """

    reason: str
    waited: int
    lost: int


class _Line(NamedTuple):
    data: bytes
    spare: bool


class Spool:
    """Writer that appends lines to a file and writes whole files, and keeps in memory what cannot be written yet.

    The next call tries to write it again. No method raises errors of the file system. If the disk gets full in the
    middle of a line, the rest of the line follows later. An unfinished line of a process that was killed is ended
    before the next line begins.

    Cost: one system call per line; at most :data:`MOST_WAITING` bytes of memory for lines, and as many for whole files.

    Args:
        path: path of the file with lines; it and its folder are created when there is something to write.
        most: the largest number of bytes of waiting lines, and of waiting files. Beyond it the oldest are dropped; of
            lines the dispensable ones first.

    Attributes:
        path: path of the file with lines.
        error: the reason why lines cannot be written at present; None while they can.
        lost: number of lines that were dropped.
    """

    def __init__(self, path: Path, most: int = MOST_WAITING) -> None:
        self.path = path
        self.error: Exception | None = None
        self.lost = 0
        self._most = most
        self._lines: deque[_Line] = deque()
        self._size = 0
        self._written = 0  # bytes of the first waiting line that are in the file already
        self._files: dict[Path, bytes] = {}
        self._problems: dict[Path, str] = {}
        self._waited, self._outage_lost, self._outage = 0, 0, ""
        self._lines_again, self._files_again = 0.0, 0.0
        self._file: FileIO | None = None

    @property
    def waiting(self) -> int:
        """The number of lines that are not written yet."""
        return len(self._lines)

    @property
    def files(self) -> dict[Path, str]:
        """The reason for each whole file that could not be written."""
        return dict(self._problems)

    def append(self, text: str, spare: bool = False) -> bool:
        """Append a line and return whether it is written.

        Args:
            text: the line without its line end.
            spare: whether the line is dispensable, and dropped before others when too many bytes wait.
        """
        self._lines.append(_Line(text.encode("utf-8", "replace") + b"\n", spare))
        self._size += len(self._lines[-1].data)
        self.flush()
        while self._size > self._most and len(self._lines) > 1:
            self._drop()
        return not self._lines

    def put(self, path: Path, content: bytes) -> bool:
        """Write a whole file, atomically replacing an existing one, and return whether it is written."""
        self._files.pop(path, None)
        self._files[path] = content
        self._write_file(path)
        while sum(map(len, self._files.values())) > self._most:
            self._files.pop(next(iter(self._files)))  # its entry in `files` stays, so that it is reported
        return path not in self._problems

    def flush(self, now: bool = False) -> None:
        """Write waiting lines and files, as far as possible.

        Args:
            now: whether to try even if a slow attempt has failed recently.
        """
        began, failing = time.monotonic(), self.error is not None
        if self._lines and (now or began >= self._lines_again):
            self._write_lines()
            self._lines_again = _next_attempt(began) if self._lines else 0.0
        now = now or (failing and self.error is None)  # the disk has room again
        if self._files and (now or began >= self._files_again):
            for path in list(self._files):
                self._write_file(path)
            self._files_again = _next_attempt(began) + _PAUSE

    def ended_outage(self) -> Outage | None:
        """Return the last outage once lines are written again, the first time it is asked for; else None."""
        if not self._outage or self.error is not None:
            return None
        outage = Outage(self._outage, self._waited, self._outage_lost)
        self._outage, self._waited, self._outage_lost = "", 0, 0
        return outage

    def close(self) -> None:
        """Write waiting lines and files, and close the file; the next line opens it again."""
        self.flush(now=True)
        self._close()

    def _write_lines(self) -> None:
        try:
            file = self._open()
            while self._lines:
                data = self._lines[0].data
                while self._written < len(data):
                    count = file.write(data[self._written :])
                    if not count:  # no operating system does this for a file, but the loop has to end
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    self._written += count
                self._waited += bool(self._outage)
                self._forget(0)
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            self.error, self._outage = error, reason_of(error)
            self._close()
        else:
            self.error = None

    def _open(self) -> FileIO:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # without a buffer, so that the number of bytes in the file is known
            self._file = self.path.open("ab", buffering=0)
            self._take_up(self._file)
        return self._file

    def _take_up(self, file: FileIO) -> None:
        """Continue the first waiting line if the file ends with its written part; else start on a new line."""
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
        """Drop the oldest dispensable line, or else the oldest line, but never the last one."""
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

    def __del__(self) -> None:
        """Close the file of a spool that nobody has closed; there is no buffer whose bytes could get lost."""
        if "_file" in vars(self):
            self._close()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state of a new spool, as the open file and waiting lines belong to one process."""
        return Spool(self.path, self._most).__dict__


def _next_attempt(began: float) -> float:
    """Return the time at which a failed attempt may be repeated, from the time at which it began."""
    now = time.monotonic()
    took = now - began
    return now + _PATIENCE * took if took > _SLOW else now


def reason_of(error: Exception) -> str:
    """Return the reason of an error of writing: the operating system's message, where there is one."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
