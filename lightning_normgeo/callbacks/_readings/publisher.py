"""Where measured rows go: loggers, the layer table, and what other callbacks can watch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lightning_normgeo._lightning import is_wandb
from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep
from lightning_normgeo.callbacks._monitors.unit_confirmation import Verdict
from lightning_normgeo.callbacks._readings.layer_table import LayerTable
from lightning_normgeo.callbacks._readings.readings import HostValues, publish
from lightning_normgeo.callbacks._readings.residual_warnings import report_residuals
from lightning_normgeo.callbacks._readings.wandb_keys import for_wandb
from lightning_normgeo.errors import skipped_on_error, warn_once

_IN_A_ROW = 3
"""So many measured steps at the end without finite gradients are more than one that a scaler of losses skips."""


class Publisher:
    """Sends rows to every logger of a Trainer.

    Attributes:
        rows: how many there were.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._table = LayerTable()
        self._at_wandb: set[str] = set()
        self._not_finite: list[int] = []

    def check(self, row: HostValues, measured: MeasuredStep, verdict: Verdict | None) -> None:
        """Say what is remarkable in a row before it goes out, and correct what the numbers have refuted."""
        report_residuals(row, measured.steps)
        covered = "norm_growth/eq16_applies"
        if covered in row.scalars and verdict is not None and verdict.by_epsilon:
            row.scalars[covered] = 0.0

    def witness(self, finite: bool, step: int) -> None:
        """Keep since when the gradients of measured steps are not finite."""
        self._not_finite = [] if finite else [*self._not_finite, step]

    def publish(self, row: HostValues, trainer: Any, step: int, monitors: list[Any]) -> None:
        """Log a row at a step."""
        self.rows += 1
        if row.dropped:
            warn_once("Values that are not finite are left out of the logs.")
        sent = for_wandb(row.scalars, monitors) if any(map(is_wandb, trainer.loggers)) else {}
        self._at_wandb.update(sent)
        publish(row, trainer.loggers, step, sent)
        self._table.add(step, row.layers, [monitor.tabled() for monitor in monitors])
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in row.watched.items()})

    @skipped_on_error
    def finish(self, loggers: Iterable[Any]) -> None:
        """Log the table, once."""
        self._table.publish(loggers)

    def note(self, loggers: Iterable[Any], observation: Mapping[str, Any]) -> None:
        """Keep in every record what was measured and left out, what moved the weights, and since when in vain."""
        values = {**observation, **({"wandb_keys": sorted(self._at_wandb)} if self._at_wandb else {})}
        if self.rows and len(self._not_finite) >= _IN_A_ROW:
            values["not_finite_since"] = self._not_finite[0]
        for logger in loggers:
            if hasattr(logger, "log_observation"):
                try:
                    logger.log_observation(values)
                except Exception as error:
                    warn_once(f"{type(logger).__name__} failed to keep what was left out: {error!r}.")
