"""Execution of a study's unfinished runs on this machine, one after another or several at a time."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from lightning_normgeo.runs.folders.finished_checkpoints import drop_optimizer_states
from lightning_normgeo.runs.folders.run_folder import RunFolder
from lightning_normgeo.study.definition import Study, arguments_of
from lightning_normgeo.study.resources import resource_share
from lightning_normgeo.study.run_process import RunProcess
from lightning_normgeo.study.run_progress import RunProgress
from lightning_normgeo.study.study_index import Index, IndexEntry, Status

NORMGEO = (sys.executable, "-m", "lightning_normgeo")
"""The command ``normgeo`` in the current environment."""


class Display(Protocol):
    """Interface of a class that shows the progress of runs."""

    def update(self, entry: IndexEntry, watch: RunProgress) -> None:
        """Display the progress of a run; called when it begins, periodically, and when it has ended."""

    def stopping(self, count: int) -> None:
        """Display that ``count`` runs were asked to end."""


class Runner:
    """Executes the unfinished runs of a study.

    Args:
        index: Index of the study.
        display: Shows the progress.
        jobs: Number of concurrent runs, at least 1.
        program: Command that is called with the arguments of each run.
        patience: Seconds that interrupted runs have to end by themselves before they are killed.

    Attributes:
        signal: Number of the last signal that interrupted the runner.
        freed: Bytes of optimizer states that were dropped from the checkpoints of finished runs.
    """

    def __init__(
        self,
        index: Index,
        display: Display,
        jobs: int = 1,
        program: Sequence[str] = NORMGEO,
        patience: float = 20.0,
    ) -> None:
        self._index = index
        self._display = display
        self._jobs = jobs
        self._program = program
        self._patience = patience
        self._active: list[RunProcess] = []
        self._left: list[IndexEntry] = []
        self._interrupts = 0
        self.signal = int(signal.SIGINT)
        self.freed = 0

    @property
    def interrupted(self) -> bool:
        """Whether the runner was interrupted."""
        return self._interrupts > 0

    def interrupt(self, number: int = signal.SIGINT, *_: Any) -> None:
        """Stop the study: the first call lets active runs end by themselves, the second kills them.

        This is a signal handler, which can run between any two instructions. It therefore only sets a flag.

        Args:
            number: Number of the signal.
        """
        self._interrupts += 1
        self.signal = int(number)

    def run(self, every: float = 0.5) -> None:
        """Execute all runs that have not finished, also those that failed before, and return when none is left.

        Args:
            every: Seconds between two checks of the active runs.
        """
        self._drop_states_of_earlier_runs()
        left = [entry for entry in self._index.entries if entry.status != "finished"]
        # first those that processes of an earlier command are running: they use the machine already
        self._left = sorted(left, key=lambda entry: entry.status != "running")
        try:
            while (self._left or self._active) and not self.interrupted:
                while self._left and len(self._active) < self._jobs:
                    self._begin(self._left.pop(0))
                time.sleep(every)
                self._look()
        finally:
            self._stop()

    def _begin(self, entry: IndexEntry) -> None:
        """Start a run, or watch it if a process of an earlier command is still running it."""
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
        """Start the process of an attempt; return why that is impossible, or an empty text."""
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
        """Update the display, and conclude the attempts that have ended."""
        for attempt in list(self._active):
            ended = attempt.ended  # asked before reading the record, which is then read to its end
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
            else:  # left by an earlier command, and killed like it: start it again
                self._conclude(attempt, "interrupted")
                self._left.insert(0, attempt.entry)

    def _conclude(self, attempt: RunProcess, status: Status) -> None:
        self._active.remove(attempt)
        attempt.entry.status, attempt.entry.seconds = status, attempt.seconds
        if status == "finished":
            attempt.entry.error = attempt.folder.divergence
            self._drop_states(attempt.folder)
        self._save()
        self._display.update(attempt.entry, attempt.watch)

    def _drop_states_of_earlier_runs(self) -> None:
        """Drop the optimizer states of runs that finished when no runner watched, or under an earlier definition."""
        for entry in self._index.entries:
            if entry.status == "finished" and not self.interrupted:
                self._drop_states(self._index.folder_of(entry))

    def _drop_states(self, folder: RunFolder) -> None:
        if not self._index.study.keep_optimizer_states:
            self.freed += drop_optimizer_states(folder.path)

    def _save(self) -> None:
        with suppress(OSError):  # a full disk must not stop the runs, whose folders tell their state anyway
            self._index.save()

    def _stop(self) -> None:
        """Ask the runs that were started here to end, and kill those that do not; others continue on their own."""
        ours = [attempt for attempt in self._active if attempt.is_ours]
        for attempt in ours:
            attempt.terminate()
        try:
            if ours:
                self._display.stopping(len(ours))
            deadline = time.monotonic() + self._patience
            while not all(attempt.ended for attempt in ours) and time.monotonic() < deadline and self._interrupts < 2:
                time.sleep(0.1)
        finally:  # even if the display fails
            for attempt in ours:
                attempt.kill()
        for attempt in ours:
            self._conclude(attempt, "finished" if attempt.folder.finished else "interrupted")


def arguments_for(study: Study, options: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the arguments of ``normgeo`` for one run of a study.

    Args:
        study: The study.
        options: Grid options of the run.
        folder: Folder of the run.
    """
    return ["fit", *study.shared, *arguments_of(options), f"--run={folder}"]
