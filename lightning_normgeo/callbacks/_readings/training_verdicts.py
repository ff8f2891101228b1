"""Verdicts of a training for loggers that have tables, from a few curves that are kept in memory."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning_normgeo._lightning import is_wandb
from lightning_normgeo.errors import ConfigurationError, is_rank_zero, warn_once
from lightning_normgeo.runs.quantities import key_meanings
from lightning_normgeo.runs.records.record import Record
from lightning_normgeo.runs.records.record_reader import read_record
from lightning_normgeo.runs.verdicts import logged_verdicts
from lightning_normgeo.runs.verdicts.claims.claims import VERDICT_KEYS
from lightning_normgeo.runs.verdicts.logged_verdicts import OBSERVATION


class TrainingVerdicts:
    """The curves that verdicts are made from, 16 bytes a point."""

    def __init__(self) -> None:
        self._curves: dict[str, tuple[array[int], array[float]]] = {}

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add the values of a measured step."""
        for key in VERDICT_KEYS:
            if key in scalars:
                steps, values = self._curves.setdefault(key, (array("q"), array("d")))
                steps.append(step)
                values.append(scalars[key])

    def publish(
        self,
        loggers: Iterable[Any],
        observation: Mapping[str, Any],
        keys: Iterable[str],
        resumed: bool,
        lost: Sequence[str] = (),
        step: int = 0,
    ) -> None:
        """Log the verdicts and the meanings of keys with every logger that has tables, and headline values with W&B.

        Args:
            loggers: Loggers of the Trainer; one that fails causes a warning, not an error.
            observation: Summary of the training; see :attr:`Record.observations`.
            keys: Keys to explain.
            resumed: Whether the training went on from a checkpoint. Its first part is in the run's record, if it has
                one.
            lost: Keys of losses that are not finite at the end. The run's record, if it has one, has their steps.
            step: Step at the end.
        """
        loggers = list(loggers)
        able = [logger for logger in loggers if self._curves and hasattr(logger, "log_table")]
        if not able or not is_rank_zero():
            return
        complete = self._of_run(loggers) if resumed or lost else None
        record = self._record(observation, lost, step) if complete is None else complete
        rows, meanings = logged_verdicts.verdict_rows(record), key_meanings.key_rows(keys)
        for logger in able:
            try:
                if rows:
                    logger.log_table(key=logged_verdicts.TRAINING, columns=logged_verdicts.COLUMNS, data=rows)
                if meanings:
                    logger.log_table(key=logged_verdicts.KEYS, columns=key_meanings.COLUMNS, data=meanings)
                if is_wandb(logger):
                    told = {key: value for key, value in observation.items() if key != "wandb_keys"}
                    logger.experiment.summary.update({**logged_verdicts.headlines(record), OBSERVATION: told})
            except Exception as error:
                warn_once(f"{type(logger).__name__} failed to log the verdicts of the training: {error!r}.")

    def _of_run(self, loggers: Iterable[Any]) -> Record | None:
        """Return the record of the run, which has its losses, and the steps before a checkpoint; None without one."""
        for logger in loggers:
            if hasattr(logger, "log_observation"):
                with suppress(ConfigurationError):  # a logger of the project's own, without a record to read
                    record = read_record(logger.log_dir, most_by_layer=1)
                    record.results.clear()  # accuracies have a table of their own
                    return record
        return None

    def _record(self, observation: Mapping[str, Any], lost: Iterable[str], step: int) -> Record:
        """Return a record with the curves, and with losses that are not finite at the end."""
        curves = {key: list(zip(*curve, strict=True)) for key, curve in self._curves.items()}
        ends = {key: [(step, math.nan)] for key in lost}
        return Record(Path(), metrics=curves | ends, observations=[dict(observation)])
