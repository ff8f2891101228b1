"""An attempt at a run, in a process of its own, so that a run that fails does not stop the others."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from lightning_normgeo.runs.folders.run_folder import RunFolder
from lightning_normgeo.study.run_progress import RunProgress
from lightning_normgeo.study.study_index import IndexEntry

OUTPUT_NAME = "output.log"
_PATIENCE = 1.0
"""Seconds that killed processes have to release the lock of the folder."""
_ERROR = re.compile(r"(normgeo: |\S+: )?error: |[\w.]*(Error|Exception|Interrupt|Exit|Failure)\b")
"""A line of output that names an error: of this package, of another command, or of a traceback."""


class RunProcess:
    """An attempt at a run and its process.

    Args:
        entry: Entry of the run in the study's index.
        folder: Folder of the run.
        slot: Number of its share of the machine; see :func:`resource_share`.
    """

    def __init__(self, entry: IndexEntry, folder: RunFolder, slot: int) -> None:
        self.entry, self.folder, self.slot = entry, folder, slot
        self.watch = RunProgress(folder.path)
        self._popen: subprocess.Popen[bytes] | None = None
        self._output = folder.path / OUTPUT_NAME
        self._began = time.monotonic()
        self._output_began = 0

    @property
    def is_ours(self) -> bool:
        """Whether the process was started here; otherwise an earlier command that was killed has left it behind."""
        return self.pid is not None

    @property
    def pid(self) -> int | None:
        """Id of the process, which is also that of its process group; None if it was not started here."""
        return self._popen.pid if self._popen is not None else None

    @property
    def seconds(self) -> float:
        """Seconds since this object was created to start or watch the process."""
        return round(time.monotonic() - self._began, 2)

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return not self.folder.in_use if self._popen is None else self._popen.poll() is not None

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start the process, and append its output to ``output.log`` in the run's folder.

        Args:
            command: Command with its arguments.
            environment: Environment variables, added to those of this process.

        Raises:
            OSError: If the folder cannot be created or the process cannot be started.
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
                start_new_session=True,  # so that Ctrl-C reaches only the command, which then stops its runs
            )

    def terminate(self) -> None:
        """Ask the process to end, by SIGTERM."""
        if self._popen is not None:
            self._popen.terminate()

    def kill(self) -> None:
        """Kill the process and its group: where the first rank died, those of other devices may still run."""
        if self._popen is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    def give_way(self) -> bool:
        """Watch another process that writes the folder, after the own one has ended; return whether there is one.

        An earlier command that was killed may have left behind a process of this run. If that was still starting when
        this attempt began, it had not locked the folder yet.
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
        """Reason why the process failed, in one line of at most 300 characters."""
        code = self._popen.returncode if self._popen is not None else None
        if code is not None and code < 0:
            hint = ", as when memory runs out" if code == -signal.SIGKILL else ""
            return f"ended by {signal.Signals(-code).name}{hint}"
        if code == 0:  # its output reads like success, so that no line of it explains this
            return "ended with exit status 0, but did not finish"
        lines = self._lines()
        errors = [line for line in lines if _ERROR.match(line)]
        return (errors or lines or [f"exit status {code}"])[-1].strip()[:300]

    def _lines(self) -> list[str]:
        """Return the output of this attempt, without empty lines."""
        try:
            with self._output.open("rb") as output:
                output.seek(self._output_began)
                text = output.read().decode(errors="replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()]
