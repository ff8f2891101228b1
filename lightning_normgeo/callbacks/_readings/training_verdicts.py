"""Verdicts of a training for loggers that have tables, from a few curves that are kept in memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
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
        self, loggers: Iterable[Any], observation: Mapping[str, Any], keys: Iterable[str], resumed: bool
    ) -> None:
        """Log the verdicts and the meanings of keys with every logger that has tables, and headline values with W&B.

        Args:
            loggers: Loggers of the Trainer; one that fails causes a warning, not an error.
            observation: Summary of the training; see :attr:`Record.observations`.
            keys: Keys to explain.
            resumed: Whether the training went on from a checkpoint. Its first part is in the run's record, if it has
                one.
        """
        loggers = list(loggers)
        able = [logger for logger in loggers if self._curves and hasattr(logger, "log_table")]
        if not able or not is_rank_zero():
            return
        record = self._record(loggers, observation, resumed)
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

    def _record(self, loggers: Iterable[Any], observation: Mapping[str, Any], resumed: bool) -> Record:
        """Return a record with the curves, or that of the run if it also has the steps before a checkpoint."""
        for logger in loggers if resumed else ():
            if hasattr(logger, "log_observation"):
                with suppress(ConfigurationError):  # a logger of the project's own, without a record to read
                    record = read_record(logger.log_dir)
                    record.results.clear()  # accuracies have a table of their own
                    return record
        curves = {key: list(zip(*curve, strict=True)) for key, curve in self._curves.items()}
        return Record(Path(), metrics=curves, observations=[dict(observation)])
