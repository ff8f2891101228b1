"""One attempt at a run: a process of its own, so that one that fails does not stop the others."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from lightning_normgeo.runs.run_folder import RunFolder
from lightning_normgeo.study.run_progress import RunProgress
from lightning_normgeo.study.study_index import IndexEntry

OUTPUT_NAME = "output.log"
_PATIENCE = 1.0
"""Seconds that processes which were killed have to let go of the folder."""
_ERROR = re.compile(r"(normgeo: |\S+: )?error: |[\w.]*(Error|Exception|Interrupt|Exit|Failure)\b")


class RunProcess:
    """A run under way.

    Args:
        entry: of the run in its study's index.
        folder: of the run.
        slot: which share of the machine it has.
    """

    def __init__(self, entry: IndexEntry, folder: RunFolder, slot: int) -> None:
        self.entry, self.folder, self.slot = entry, folder, slot
        self.watch = RunProgress(folder.path)
        self._popen: subprocess.Popen[bytes] | None = None
        self._output = folder.path / OUTPUT_NAME
        self._began, self._output_began = time.monotonic(), 0

    @property
    def is_ours(self) -> bool:
        """Whether this process started it; an earlier one that was killed may have left its run behind."""
        return self.pid is not None

    @property
    def pid(self) -> int | None:
        """The process, and the group of all that it starts; None if it is not ours."""
        return self._popen.pid if self._popen is not None else None

    @property
    def seconds(self) -> float:
        """How long it has been watched."""
        return round(time.monotonic() - self._began, 2)

    @property
    def ended(self) -> bool:
        """Whether nothing runs any more."""
        return not self.folder.in_use if self._popen is None else self._popen.poll() is not None

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the process; what it prints is appended to ``output.log`` in the run's folder.

        Raises:
            OSError: if the folder cannot be made, or the process not be started.
        """
        self.folder.path.mkdir(parents=True, exist_ok=True)
        with self._output.open("ab") as output:
            self._output_began = output.tell()
            self._popen = subprocess.Popen(  # noqa: S603 - this package's own command
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                start_new_session=True,  # so that it is this process that decides what an interrupt does
            )

    def terminate(self) -> None:
        """Ask the run to end."""
        if self._popen is not None:
            self._popen.terminate()

    def kill(self) -> None:
        """End whatever is left of it: also the processes of other devices, where the first one died."""
        if self._popen is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    def give_way(self) -> bool:
        """Watch whoever is writing the folder instead of the own process, which has ended; False if nobody is.

        A command that was killed may have left behind a run which was only starting, and not to be seen.
        """
        deadline = time.monotonic() + _PATIENCE
        while self.folder.in_use:
            if time.monotonic() > deadline:
                self._popen = None
                return True
            time.sleep(0.05)
        return False

    @property
    def error(self) -> str:
        """What went wrong, in one line."""
        code = self._popen.returncode if self._popen is not None else None
        if code is not None and code < 0:
            hint = ", as when memory runs out" if code == -signal.SIGKILL else ""
            return f"ended by {signal.Signals(-code).name}{hint}"
        if code == 0:  # what it printed reads like success
            return "ended with exit status 0, but did not finish"
        lines = self._lines()
        told = [line for line in lines if _ERROR.match(line)]
        return (told or lines or [f"exit status {code}"])[-1].strip()[:300]

    def _lines(self) -> list[str]:
        """Return what the process printed, without empty lines."""
        try:
            with self._output.open("rb") as output:
                output.seek(self._output_began)
                text = output.read().decode(errors="replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()]
