"""Progress of a run, read from the record that it is writing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

from lightning_normgeo.runs.records.record import RECORD_NAME
from lightning_normgeo.runs.records.record_lines import checked
from lightning_normgeo.runs.records.whole_lines import LineNames
from lightning_normgeo.utilities.files import parsed

_Before = TypeVar("_Before")


class RunProgress:
    """Follows a record while it is being written, and keeps the progress of its run.

    Args:
        folder: Folder of the run, which need not exist yet.

    Attributes:
        epoch: Number of finished epochs.
        epochs: Largest number of epochs; None if it is unknown or unlimited.
        step: Last step that was logged.
        accuracy: Last validation accuracy, in [0, 1]; None before the first.
        testing: Whether training has ended, so that the run is being tested.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / RECORD_NAME
        self._at = 0
        self._names = LineNames()
        self.epoch = 0
        self.step = 0
        self.epochs: int | None = None
        self.accuracy: float | None = None
        self.testing = False

    @property
    def text(self) -> str:
        """The progress in one line."""
        if self.testing:
            return "testing"
        if not self._at:
            return "starting"
        of_all = f"/{self.epochs}" if self.epochs else ""
        parts = [f"epoch {self.epoch + 1}{of_all}", f"step {self.step}"]
        if self.accuracy is not None:
            parts.append(f"val {100 * self.accuracy:.1f} %")
        return ", ".join(parts)

    @property
    def fraction(self) -> float:
        """The finished part of the training, in [0, 1]."""
        if self.testing:
            return 1.0
        return min(1.0, self.epoch / self.epochs) if self.epochs else 0.0

    def look(self) -> None:
        """Read the lines that were completed since the last call; damaged ones are skipped."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._at:  # shorter than before: the record was begun anew
                    self._at = 0
                file.seek(self._at)
                new = file.read()
        except OSError:
            return
        lines, end, _ = new.rpartition(b"\n")
        self._at += len(lines) + len(end)
        for line in lines.split(b"\n"):
            try:
                self._take(self._names.named(checked(parsed(line))))
            except ValueError:
                continue

    def _take(self, line: dict[str, Any]) -> None:
        """Update the progress by a line of the record."""
        values = line.get("values", {})
        if line["kind"] == "environment":  # a process begins or resumes the run
            self.testing = False
        elif line["kind"] == "settings":
            match values.get("config"):
                case {"trainer": {"max_epochs": int(epochs)}}:
                    self.epochs = epochs if epochs > 0 else None
        elif line["kind"] == "end":
            self.testing = line["status"] == "success"
        elif line["kind"] == "metrics":
            self.epoch = int(_finite(values.get("epoch"), self.epoch))
            self.step = line["step"] or self.step
            self.accuracy = _finite(values.get("val/accuracy"), self.accuracy)


def _finite(value: float | None, before: _Before) -> float | _Before:
    """Return a value, or the previous one if it is missing or not finite."""
    return value if value is not None and math.isfinite(value) else before
