"""Publisher of measured rows to loggers, the layer table and ``trainer.callback_metrics``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lightning_normgeo._lightning import hide_charts, is_wandb
from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep, Monitor
from lightning_normgeo.callbacks._monitors.units.unit_confirmation import Verdict
from lightning_normgeo.callbacks._readings.publication.layer_table import LayerTable
from lightning_normgeo.callbacks._readings.publication.wandb_keys import for_wandb, without_chart
from lightning_normgeo.callbacks._readings.readings import HostValues, log_readings
from lightning_normgeo.callbacks._readings.residual_warnings import report_residuals
from lightning_normgeo.callbacks._readings.training_verdicts import TrainingVerdicts
from lightning_normgeo.errors import skipped_on_error, warn_once
from lightning_normgeo.runs.records.record import is_loss

_IN_A_ROW = 3
"""Number of measured steps in a row without finite gradients at which they are reported; a gradient scaler may skip a
single step."""


class Publisher:
    """Sends the rows of measured steps to every logger of a Trainer.

    Attributes:
        rows: the number of rows sent so far.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._table = LayerTable()
        self._verdicts = TrainingVerdicts()
        self._resumed = False
        self._observation: dict[str, Any] = {}
        self._at_wandb: set[str] = set()
        self._not_finite: list[int] = []

    def check(self, row: HostValues, measured: MeasuredStep, verdict: Verdict | None) -> None:
        """Warn about large residuals in a row, and set ``eq16_applies`` to 0 where ε makes weights not orthogonal."""
        report_residuals(row, measured.steps)
        covered = "norm_growth/eq16_applies"
        if covered in row.scalars and verdict is not None and verdict.by_epsilon:
            row.scalars[covered] = 0.0

    def witness(self, finite: bool, step: int) -> None:
        """Record whether the gradients of a measured step are finite."""
        self._not_finite = [] if finite else [*self._not_finite, step]

    def publish(self, row: HostValues, trainer: Any, step: int, monitors: list[Monitor]) -> None:
        """Send a row to all loggers, to the layer table and to ``trainer.callback_metrics``."""
        self.rows += 1
        if row.dropped:
            keys = ", ".join(row.dropped[:3]) + (" …" if len(row.dropped) > 3 else "")
            warn_once(f"Values that are not finite are left out of the logs ({keys}).", about="values not finite")
        log_readings(row, trainer.loggers, step, self._for_wandb(row, trainer.loggers, monitors))
        if any(hasattr(logger, "log_table") for logger in trainer.loggers):  # else nobody would get what it keeps
            self._table.add(step, row.layers, [monitor.tabled() for monitor in monitors])
        self._verdicts.add(step, row.scalars)
        self._resumed = getattr(trainer, "ckpt_path", None) is not None
        trainer.callback_metrics.update({key: torch.tensor(row.scalars[key]) for key in row.watched})

    def _for_wandb(self, row: HostValues, loggers: Iterable[Any], monitors: list[Monitor]) -> dict[str, float]:
        """Return the numbers of a row that W&B gets; before new keys are logged, those without a chart are hidden."""
        able = [logger for logger in loggers if is_wandb(logger)]
        sent = for_wandb(row.scalars, monitors) if able else {}
        new = [key for key in sent if key not in self._at_wandb]
        self._at_wandb.update(new)
        for logger in able:
            hide_charts(logger, without_chart(new, monitors))
        return sent

    @skipped_on_error
    def finish(self, trainer: Any) -> None:
        """Log the verdicts, the meanings of the keys, and the layer table, once."""
        keys = dict.fromkeys([*sorted(self._at_wandb), *self._table.quantities()])
        lost = _lost(trainer.callback_metrics)
        self._verdicts.publish(trainer.loggers, self._observation, keys, self._resumed, lost, trainer.global_step)
        self._table.publish(trainer.loggers)

    def note(self, loggers: Iterable[Any], observation: Mapping[str, Any]) -> None:
        """Send the summary of the training to every logger that keeps one, with steps left out and their reasons."""
        values = self._observation = dict(observation)
        if self._at_wandb:
            values["wandb_keys"] = sorted(self._at_wandb)
        if self.rows and len(self._not_finite) >= _IN_A_ROW:
            values["not_finite_since"] = self._not_finite[0]
        for logger in loggers:
            if hasattr(logger, "log_observation"):
                try:
                    logger.log_observation(values)
                except Exception as error:
                    warn_once(f"{type(logger).__name__} failed to keep what was left out: {error!r}.")


def _lost(metrics: Mapping[str, Any]) -> list[str]:
    """Return the keys of the losses at the end of a training if none of them is finite."""
    losses = {key: torch.as_tensor(value) for key, value in metrics.items() if is_loss(key)}
    return list(losses) if not any(bool(value.isfinite().all()) for value in losses.values()) else []
