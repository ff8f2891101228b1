"""Runs a study on this machine: each run a process of its own, so that one that fails does not stop the others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning_normgeo.study.definition import Study, arguments_of
from lightning_normgeo.study.index import Entry, Index
from lightning_normgeo.study.watch import Watch

OUTPUT_NAME = "output.log"
_PATIENCE = 20.0


class Display(Protocol):
    """Shows how far runs are."""

    def update(self, entry: Entry, watch: Watch) -> None:
        """Show a run; called when it begins, from time to time, and when it has ended."""


@dataclass
class _Process:
    """A run under way; ``popen`` is None for one that somebody else's process is writing."""

    entry: Entry
    popen: subprocess.Popen[bytes] | None
    watch: Watch
    slot: int
    began: float


class Runner:
    """Runs what a study has left to run.

    Args:
        index: of the study.
        display: is told what happens.
        jobs: how many runs at a time.
    """

    def __init__(self, index: Index, display: Display, jobs: int = 1) -> None:
        self._index, self._display, self._jobs = index, display, jobs
        self._active: list[_Process] = []

    def run(self, every: float = 0.5) -> None:
        """Run everything that has not finished, also what failed before; return when nothing is left.

        Args:
            every: seconds between two looks at the runs.
        """
        left = [entry for entry in self._index.entries if entry.status != "finished"]
        self._index.save()
        try:
            while left or self._active:
                while left and len(self._active) < self._jobs:
                    self._start(left.pop(0))
                time.sleep(every)
                self._look()
        except BaseException:
            self._stop()
            raise

    def _start(self, entry: Entry) -> None:
        folder = self._index.folder_of(entry)
        taken = {process.slot for process in self._active}
        slot = next(k for k in range(self._jobs) if k not in taken)
        # an earlier attempt that was killed may have left its run behind, which then goes on alone
        popen = None if folder.in_use else self._spawn(entry, folder.path, slot)
        self._active.append(_Process(entry, popen, Watch(folder.path), slot, time.monotonic()))
        entry.status, entry.error = "running", ""
        self._index.save()
        self._display.update(entry, self._active[-1].watch)

    def _spawn(self, entry: Entry, folder: Path, slot: int) -> subprocess.Popen[bytes]:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "lightning_normgeo", *arguments_for(self._index.study, entry.options, folder)]
        with (folder / OUTPUT_NAME).open("ab") as output:
            return subprocess.Popen(  # noqa: S603 - this package's own command
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_share(slot, self._jobs)},
                start_new_session=True,  # so that it is this process that decides what an interrupt does
            )

    def _look(self) -> None:
        for process in list(self._active):
            process.watch.look()
            folder = self._index.folder_of(process.entry)
            if process.popen is None:
                code = None if folder.in_use else 0 if folder.finished else 1
            else:
                code = process.popen.poll()
            if code is not None:
                self._active.remove(process)
                self._conclude(process, "finished" if code == 0 and folder.finished else "failed")
            self._display.update(process.entry, process.watch)

    def _conclude(self, process: _Process, status: Any) -> None:
        entry = process.entry
        entry.status, entry.seconds = status, round(time.monotonic() - process.began, 1)
        entry.error = _last_line(self._index.folder_of(entry).path / OUTPUT_NAME) if status == "failed" else ""
        self._index.save()

    def _stop(self) -> None:
        """Ask all runs to end, and make them."""
        for process in self._active:
            if process.popen is not None:
                process.popen.terminate()
        deadline = time.monotonic() + _PATIENCE
        for process in self._active:
            if process.popen is not None:
                with suppress(subprocess.TimeoutExpired):
                    process.popen.wait(max(0.0, deadline - time.monotonic()))
                process.popen.kill()
                process.popen.wait()
            self._conclude(process, "interrupted")
            self._display.update(process.entry, process.watch)


def arguments_for(study: Study, options: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the arguments of the run with these options, after ``normgeo``."""
    return ["fit", *study.shared, *arguments_of(options), f"--run={folder}"]


def _share(slot: int, jobs: int) -> dict[str, str]:
    """Return the environment that gives one of several runs its share of the machine."""
    if jobs == 1:
        return {}
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    devices = _devices()
    mine = devices[slot::jobs] or devices[slot % len(devices) :][:1] if devices else []
    return {"OMP_NUM_THREADS": threads, **({"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {})}


def _devices() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _last_line(path: Path) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")[:500]
