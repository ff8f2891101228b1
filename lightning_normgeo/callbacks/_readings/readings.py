"""Readings: measured quantities on the device, their values on the host, and their way to all loggers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_normgeo._lightning import is_wandb
from lightning_normgeo.errors import warn_once


@dataclass(frozen=True)
class Reading:
    """One measured quantity at one step, still on the device.

    Attributes:
        key: ``{group}/{quantity}``.
        total: the aggregate over all layers, a scalar on the device, or None.
        by_layer: one value per layer, ``(layers,)``, or None.
        layers: names of the layers in ``by_layer``.
        of_this_process: whether other processes have other values, as those of their own batches. Only aggregates that
            are equal on all processes go to ``trainer.callback_metrics``, which decide when training stops.
        internal: whether only the session uses the reading, and no logger gets it.
        partial: whether NaN means that the value is not known, which needs no warning.
    """

    key: str
    total: Tensor | None
    by_layer: Tensor | None = None
    layers: Sequence[str] = ()
    of_this_process: bool = False
    internal: bool = False
    partial: bool = False


@dataclass(frozen=True)
class HostValues:
    """The readings of one measured step on the host: one row for the loggers.

    Attributes:
        scalars: finite aggregates and finite values of chosen layers, by metric key.
        layers: for each quantity its finite values by layer, for records that keep every layer.
        watched: the keys of the aggregates that also go to ``trainer.callback_metrics``.
        dropped: keys of values that were not finite and are missing.
        internal: values that only the session uses, by key and layer.
    """

    scalars: dict[str, float]
    layers: dict[str, dict[str, float]]
    watched: list[str]
    dropped: Sequence[str] = ()
    internal: dict[str, dict[str, float]] = field(default_factory=dict)


def log_readings(row: HostValues, loggers: Iterable[Any], step: int, for_wandb: Mapping[str, float]) -> None:
    """Send a row to every logger; a logger that fails causes a warning and never stops the training.

    Loggers with a ``log_layers`` method (RecordLogger) also get the values of every layer.

    Args:
        row: the row of a measured step.
        loggers: the loggers of the Trainer.
        step: the step number as Lightning counts it.
        for_wandb: the scalars that are sent to W&B.
    """
    for logger in loggers:
        try:
            logger.log_metrics(dict(for_wandb if is_wandb(logger) else row.scalars), step=step)
            if hasattr(logger, "log_layers"):
                logger.log_layers(row.layers, step=step)
        except Exception as error:
            name = type(logger).__name__
            message = f"{name} failed to log a measured step: {error!r}. Training goes on; this is said once."
            warn_once(message, about=f"{name} failed to log")
