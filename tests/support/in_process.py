"""Runs of a study in the process of the test."""

from __future__ import annotations

from typing import Any

from lightning_normgeo.cli import run
from lightning_normgeo.study import runner
from lightning_normgeo.study.run_process import RunProcess


class InProcess(RunProcess):
    """An attempt without a process of its own, which would take longer to start than to run."""

    pid = 0
    ended = True

    def start(self, command: Any, environment: Any) -> None:
        run([*command[len(runner.NORMGEO) :]])

    def kill(self) -> None:
        raise AssertionError("it has not finished")
