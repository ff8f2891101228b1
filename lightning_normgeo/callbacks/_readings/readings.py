"""From per-unit tensors to numbers in loggers: one stacked device tensor, one host transfer, all loggers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo._lightning import is_wandb
from lightning_normgeo.errors import warn_once


@dataclass(frozen=True)
class Reading:
    """One quantity at one step.

    Attributes:
        key: ``{group}/{quantity}``.
        total: the aggregate, a scalar on the device, or None.
        by_layer: one value per site, or None.
        layers: what the entries of ``by_layer`` belong to.
        watch: whether the aggregate also goes to ``trainer.callback_metrics``.
        internal: whether it is for the session alone and goes to no logger.
        partial: whether it is NaN where it is not known, which is no reason to say anything.
    """

    key: str
    total: Tensor | None
    by_layer: Tensor | None = None
    layers: Sequence[str] = ()
    watch: bool = False
    internal: bool = False
    partial: bool = False


@dataclass(frozen=True)
class HostValues:
    """Readings on the host.

    Attributes:
        scalars: finite aggregates and chosen sites, by metric key.
        layers: for each quantity its finite values by site, for records that keep every layer.
        watched: the aggregates for ``trainer.callback_metrics``.
        dropped: how many values were not finite.
        internal: what is for the session alone, by key and site.
    """

    scalars: dict[str, float]
    layers: dict[str, dict[str, float]]
    watched: dict[str, float]
    dropped: int = 0
    internal: dict[str, dict[str, float]] = field(default_factory=dict)


def transfer(
    readings: Sequence[Reading], valid: Sequence[Tensor], chosen: dict[str, frozenset[str]]
) -> HostValues | None:
    """Bring readings to the host in one transfer.

    Args:
        readings: quantities on one device.
        valid: boolean scalars; unless all hold the readings describe a step that did not happen.
        chosen: for each group the sites that get metric keys of their own.

    Returns:
        The row, or None for an invalid step.
    """
    parts = [flag.reshape(1) for flag in valid]
    for reading in readings:
        parts += [part.reshape(-1) for part in (reading.total, reading.by_layer) if part is not None]
    wide = next((part.dtype for part in parts if part.is_floating_point()), torch.float64)
    values = iter(torch.cat([part.to(wide) for part in parts]).tolist())
    flags = [next(values) for _ in valid]
    if not all(flags):
        return None
    row = HostValues({}, {}, {})
    dropped = sum(_unpack(reading, values, chosen, row) for reading in readings)
    return replace(row, dropped=dropped)


def _unpack(reading: Reading, values: Any, chosen: dict[str, frozenset[str]], row: HostValues) -> int:
    """Add one reading to the row; return how many of its values were not finite."""
    found: list[float] = []
    if reading.total is not None:
        found.append(next(values))
        if math.isfinite(found[0]):
            row.scalars[reading.key] = found[0]
            if reading.watch:
                row.watched[reading.key] = found[0]
    if reading.by_layer is not None:
        by_layer = {layer: next(values) for layer in reading.layers}
        found += by_layer.values()
        finite = {layer: value for layer, value in by_layer.items() if math.isfinite(value)}
        if reading.internal:
            row.internal.setdefault(reading.key, {}).update(finite)  # invariant weights and controls
        else:
            row.layers[reading.key] = finite
            wanted = chosen.get(reading.key.partition("/")[0], frozenset())
            row.scalars.update({f"{reading.key}/{layer}": value for layer, value in finite.items() if layer in wanted})
    return 0 if reading.partial or reading.internal else sum(not math.isfinite(value) for value in found)


def publish(row: HostValues, loggers: Iterable[Any], step: int, for_wandb: Mapping[str, float]) -> None:
    """Send a row to every logger; one that fails is reported and never stops the training.

    Loggers with a ``log_layers`` method (RecordLogger) also get every layer.

    Args:
        row: of a measured step.
        loggers: of the Trainer.
        step: as Lightning counts.
        for_wandb: the part of the scalars that W&B gets.
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
