"""From per-unit tensors to numbers in loggers: one stacked device tensor, one host transfer, all loggers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.errors import warn_once


@dataclass(frozen=True)
class Reading:
    """One quantity at one step.

    Attributes:
        key: ``{group}/{quantity}``.
        total: the aggregate, a scalar on the device, or None.
        by_site: one value per site, or None.
        sites: what the entries of ``by_site`` belong to.
        watch: whether the aggregate also goes to ``trainer.callback_metrics``.
    """

    key: str
    total: Tensor | None
    by_site: Tensor | None = None
    sites: Sequence[str] = ()
    watch: bool = False


@dataclass(frozen=True)
class Row:
    """Readings on the host.

    Attributes:
        scalars: finite aggregates and chosen sites, by metric key.
        layers: for each quantity its finite values by site, for records that keep every layer.
        watched: the aggregates for ``trainer.callback_metrics``.
        dropped: how many values were not finite.
    """

    scalars: dict[str, float]
    layers: dict[str, dict[str, float]]
    watched: dict[str, float]
    dropped: int


def transfer(readings: Sequence[Reading], valid: Sequence[Tensor], chosen: dict[str, frozenset[str]]) -> Row | None:
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
        parts += [part.reshape(-1) for part in (reading.total, reading.by_site) if part is not None]
    wide = next((part.dtype for part in parts if part.is_floating_point()), torch.float64)
    values = iter(torch.cat([part.to(wide) for part in parts]).tolist())
    flags = [next(values) for _ in valid]
    if not all(flags):
        return None
    row = Row({}, {}, {}, 0)
    dropped = 0
    for reading in readings:
        dropped += _unpack(reading, values, chosen, row)
    return Row(row.scalars, row.layers, row.watched, dropped)


def _unpack(reading: Reading, values: Any, chosen: dict[str, frozenset[str]], row: Row) -> int:
    dropped = 0
    if reading.total is not None:
        total = next(values)
        dropped += not math.isfinite(total)
        if math.isfinite(total):
            row.scalars[reading.key] = total
            if reading.watch:
                row.watched[reading.key] = total
    if reading.by_site is not None:
        by_site = {site: next(values) for site in reading.sites}
        finite = {site: value for site, value in by_site.items() if math.isfinite(value)}
        dropped += len(by_site) - len(finite)
        row.layers[reading.key] = finite
        wanted = chosen.get(reading.key.partition("/")[0], frozenset())
        row.scalars.update({f"{reading.key}/{site}": value for site, value in finite.items() if site in wanted})
    return dropped


def publish(row: Row, loggers: Iterable[Any], step: int) -> None:
    """Send a row to every logger; one that fails is reported and never stops the training.

    Loggers with a ``log_layers`` method (RecordLogger) also get every layer.
    """
    for logger in loggers:
        try:
            logger.log_metrics(row.scalars, step=step)
            if hasattr(logger, "log_layers"):
                logger.log_layers(row.layers, step=step)
        except Exception as error:
            warn_once(f"{type(logger).__name__} failed to log step {step}: {error!r}. Training goes on.")
