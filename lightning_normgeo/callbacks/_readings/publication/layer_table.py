"""A table with the curves of many layers, which gives a logger one key instead of thousands."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_normgeo.errors import is_rank_zero, warn_once

KEY = "geometry/layers"
_MAX_ROWS = 10_000
"""W&B truncates the file of a longer table."""


class LayerTable:
    """The per-layer curves of one training, in at most 10,000 rows, for loggers that have tables.

    A row is one layer at one measured step: ``step``, ``layer`` and one column for each quantity, by its metric key,
    None where a layer lacks it. When there would be too many rows, every second step is dropped, and from then on
    every second new one too; the first and the last step are always kept. Memory and file size are therefore bounded
    for any length of the run. Which steps are kept depends on their numbers alone (every second, fourth, eighth … of
    the cadence, counted from the beginning of the training), so that monitors with different cadences, or a run and
    its continuation, keep the same steps. The local record keeps all steps.

    Args:
        max_rows: the largest number of rows. Default: 10,000.
    """

    def __init__(self, max_rows: int = _MAX_ROWS) -> None:
        self._max_rows = max_rows
        self._steps: dict[int, dict[str, dict[str, float]]] = {}
        self._stride = 1

    def add(
        self, step: int, layers: Mapping[str, Mapping[str, float]], tabled: Sequence[Mapping[str, frozenset[str]]]
    ) -> None:
        """Add a measured step; does nothing on ranks other than zero.

        Args:
            step: the step number in loggers, counted from 0.
            layers: for each quantity, its values by layer.
            tabled: for each monitor, the layers that belong in the table, by metric group.
        """
        rows = _by_layer(layers, tabled) if is_rank_zero() else {}
        if not rows:
            return
        self._steps[step] = rows
        self._drop()
        while self._length() > self._max_rows and len(self._steps) > 2:
            self._stride *= 2
            self._drop()

    def columns(self) -> list[str]:
        """Return the names of the columns."""
        quantities = {key: None for rows in self._steps.values() for values in rows.values() for key in values}
        return ["step", "layer", *quantities]

    def rows(self) -> list[list[Any]]:
        """Return the rows, ordered by step."""
        quantities = self.quantities()
        rows = [
            [step, layer, *map(values.get, quantities)]
            for step, by_layer in self._steps.items()
            for layer, values in by_layer.items()
        ]
        return rows[-self._max_rows :]  # a huge model may exceed the limit with its first and last step alone

    def quantities(self) -> list[str]:
        """Return the keys of the quantities in the table."""
        return self.columns()[2:]

    def publish(self, loggers: Iterable[Any]) -> None:
        """Log the table with every logger that has a ``log_table`` method (WandbLogger), and clear it.

        A logger that fails causes a warning, not an error.
        """
        able = [logger for logger in loggers if self._steps and hasattr(logger, "log_table")]
        columns, rows = (self.columns(), self.rows()) if able else ([], [])
        for logger in able:
            try:
                logger.log_table(key=KEY, columns=columns, data=rows)
            except Exception as error:
                warn_once(f"{type(logger).__name__} failed to log the table {KEY}: {error!r}.")
        self._steps = {}

    def _length(self) -> int:
        return sum(map(len, self._steps.values()))

    def _drop(self) -> None:
        """Drop steps that are no multiples of the stride (counted from 1, as in cadences), but not the ends."""
        ends = (min(self._steps), max(self._steps))
        self._steps = {
            step: rows for step, rows in self._steps.items() if step in ends or (step + 1) % self._stride == 0
        }


def _by_layer(
    layers: Mapping[str, Mapping[str, float]], tabled: Sequence[Mapping[str, frozenset[str]]]
) -> dict[str, dict[str, float]]:
    """Return the values of each layer in the table, by quantity."""
    found: dict[str, dict[str, float]] = {}
    for quantity, values in layers.items():
        group = quantity.partition("/")[0]
        wanted: set[str] = set().union(*(choice.get(group, ()) for choice in tabled))
        for layer in values if wanted else ():
            if layer in wanted:
                found.setdefault(layer, {})[quantity] = values[layer]
    return found
