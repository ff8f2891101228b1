"""Runs what a study has left to run on this machine, one after another or several at a time."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from lightning_normgeo.study.definition import Study, arguments_of
from lightning_normgeo.study.resources import resource_share
from lightning_normgeo.study.run_process import RunProcess
from lightning_normgeo.study.run_progress import RunProgress
from lightning_normgeo.study.study_index import Index, IndexEntry, Status

NORMGEO = (sys.executable, "-m", "lightning_normgeo")


class Display(Protocol):
    """Shows how far runs are."""

    def update(self, entry: IndexEntry, watch: RunProgress) -> None:
        """Show a run; called when it begins, from time to time, and when it has ended."""

    def stopping(self, count: int) -> None:
        """Say that so many runs were asked to end."""


class Runner:
    """Runs what a study has left to run.

    Args:
        index: of the study.
        display: is told what happens.
        jobs: how many runs at a time.
        program: what is called with the arguments of each run.
        patience: seconds that runs get to end by themselves when they are interrupted.

    Attributes:
        signal: the number of the one that has interrupted it.
    """

    def __init__(
        self,
        index: Index,
        display: Display,
        jobs: int = 1,
        program: Sequence[str] = NORMGEO,
        patience: float = 20.0,
    ) -> None:
        self._index, self._display, self._jobs = index, display, jobs
        self._program, self._patience = program, patience
        self._active: list[RunProcess] = []
        self._left: list[IndexEntry] = []
        self._interrupts = 0
        self.signal = int(signal.SIGINT)

    @property
    def interrupted(self) -> bool:
        """Whether it was told to stop."""
        return self._interrupts > 0

    def interrupt(self, number: int = signal.SIGINT, *_: Any) -> None:
        """Stop soon; the second time at once. A handler of signals: it does nothing itself, wherever it comes."""
        self._interrupts += 1
        self.signal = int(number)

    def run(self, every: float = 0.5) -> None:
        """Run everything that has not finished, also what failed before; return when nothing is left.

        Args:
            every: seconds between two looks at the runs.
        """
        left = [entry for entry in self._index.entries if entry.status != "finished"]
        self._left = sorted(left, key=lambda entry: entry.status != "running")  # these have their share already
        try:
            while (self._left or self._active) and not self.interrupted:
                while self._left and len(self._active) < self._jobs:
                    self._begin(self._left.pop(0))
                time.sleep(every)
                self._look()
        finally:
            self._stop()

    def _begin(self, entry: IndexEntry) -> None:
        taken = {attempt.slot for attempt in self._active}
        slot = next(k for k in range(self._jobs) if k not in taken)
        attempt = RunProcess(entry, self._index.folder_of(entry), slot)
        entry.status, entry.error = "running", ""
        if not attempt.folder.in_use:
            entry.error = self._start(attempt)
        self._active.append(attempt)
        self._display.update(entry, attempt.watch)
        if entry.error:
            self._conclude(attempt, "failed")
        else:
            self._save()

    def _start(self, attempt: RunProcess) -> str:
        """Start the process of an attempt and return why it cannot be; nothing if it was."""
        entry, folder = attempt.entry, attempt.folder.path
        try:
            if self._index.would_mix(entry):
                return f"began with other settings; remove {folder} to begin anew, or restore the settings"
            entry.digest = self._index.study.digest(entry.options)
            attempt.start(self._command(entry, folder), self._environment(attempt.slot))
        except OSError as error:
            return f"cannot be started: {error}"
        return ""

    def _command(self, entry: IndexEntry, folder: Path) -> list[str]:
        return [*self._program, *arguments_for(self._index.study, entry.options, folder)]

    def _environment(self, slot: int) -> dict[str, str]:
        group = os.environ.get("WANDB_RUN_GROUP", self._index.study.name)
        return {**resource_share(slot, self._jobs), "WANDB_RUN_GROUP": group}

    def _look(self) -> None:
        for attempt in list(self._active):
            ended = attempt.ended  # before the last look, which then misses nothing
            attempt.watch.look()
            if ended and attempt.is_ours and not attempt.folder.finished:
                attempt.kill()
                ended = not attempt.give_way()
            if not ended:
                self._display.update(attempt.entry, attempt.watch)
            elif attempt.folder.finished:
                self._conclude(attempt, "finished")
            elif attempt.is_ours:
                attempt.entry.error = attempt.error
                self._conclude(attempt, "failed")
            else:  # it was killed as well, as whoever started it
                self._conclude(attempt, "interrupted")
                self._left.insert(0, attempt.entry)

    def _conclude(self, attempt: RunProcess, status: Status) -> None:
        self._active.remove(attempt)
        attempt.entry.status, attempt.entry.seconds = status, attempt.seconds
        if status == "finished":
            attempt.entry.error = attempt.folder.divergence
        self._save()
        self._display.update(attempt.entry, attempt.watch)

    def _save(self) -> None:
        with suppress(OSError):  # a full disk: runs matter more, and their folders say how far they are
            self._index.save()

    def _stop(self) -> None:
        """Ask all runs to end, and make them; those of others go on alone."""
        ours = [attempt for attempt in self._active if attempt.is_ours]
        for attempt in ours:
            attempt.terminate()
        try:
            if ours:
                self._display.stopping(len(ours))
            deadline = time.monotonic() + self._patience
            while not all(attempt.ended for attempt in ours) and time.monotonic() < deadline and self._interrupts < 2:
                time.sleep(0.1)
        finally:  # whatever cannot be shown
            for attempt in ours:
                attempt.kill()
        for attempt in ours:
            self._conclude(attempt, "finished" if attempt.folder.finished else "interrupted")


def arguments_for(study: Study, options: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the arguments of the run with these options, after ``normgeo``."""
    return ["fit", *study.shared, *arguments_of(options), f"--run={folder}"]
