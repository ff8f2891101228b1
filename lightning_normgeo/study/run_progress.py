"""How far a run is, read from the record that it is writing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

from lightning_normgeo.runs.record import RECORD_NAME
from lightning_normgeo.runs.record_lines import checked
from lightning_normgeo.utilities.files import parsed

_Before = TypeVar("_Before")


class RunProgress:
    """Reads what is new in a run's record.

    Args:
        folder: of the run, which need not exist yet.

    Attributes:
        epoch: finished epochs.
        epochs: how many there will be at most; None if that is not known.
        step: the last one that was logged.
        accuracy: on the validation data, None before the first.
        testing: whether training has come to its end.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._at = folder / RECORD_NAME, 0
        self.epoch, self.step = 0, 0
        self.epochs: int | None = None
        self.accuracy: float | None = None
        self.testing = False

    @property
    def text(self) -> str:
        """One line about it."""
        if self.testing:
            return "testing"
        if not self._at:
            return "starting"
        parts = [f"epoch {self.epoch + 1}{f'/{self.epochs}' if self.epochs else ''}", f"step {self.step}"]
        return ", ".join([*parts, *([f"val {100 * self.accuracy:.1f} %"] if self.accuracy is not None else [])])

    @property
    def fraction(self) -> float:
        """The finished part of the training, in [0, 1]."""
        return 1.0 if self.testing else min(1.0, self.epoch / self.epochs) if self.epochs else 0.0

    def look(self) -> None:
        """Read the lines that were finished since the last look; those that are damaged are left out."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._at:  # it was begun anew
                    self._at = 0
                file.seek(self._at)
                new = file.read()
        except OSError:
            return
        lines, end, _ = new.rpartition(b"\n")
        self._at += len(lines) + len(end)
        for line in lines.split(b"\n"):
            try:
                self._take(checked(parsed(line)))
            except ValueError:
                continue

    def _take(self, line: dict[str, Any]) -> None:
        values = line.get("values", {})
        if line["kind"] == "environment":  # the run begins, or goes on
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
    return value if value is not None and math.isfinite(value) else before
