"""Rows of data for figures: one row for each curve, with its points as two lists."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lightning_normgeo.errors import nearest_names, warn_once
from lightning_normgeo.report.compared_runs import Run
from lightning_normgeo.runs.records.record import finite_points
from lightning_normgeo.runs.records.record_curves import LayerPoints

ALL = "all layers"
"""The choice of a layer that stands for the aggregate over all layers."""
_POINTS, _FEWEST, _MOST = 60_000, 12, 150
"""Points of all curves of a page, and the smallest and largest share of one curve."""
_LAYERS = 240
"""Layers that the readers of a page can choose, of all its runs together."""
_QUANTITIES = 24
"""Rough number of the quantities that a page draws."""

Row = dict[str, Any]
Points = Sequence[tuple[int, float]]
"""Pairs of a step and a value."""


class Curves:
    """The curves of several runs, thinned so that a page with all of them stays small; extreme values stay.

    Of long runs only every second, fourth, eighth … step with values by layer has been read.

    Args:
        runs: Runs of the report.
        patterns: Globs of the layers that the reader can choose. Default: the layers with metric keys of their own
            (those of the first residual block, unless the monitors were set otherwise), and some between input and
            output.

    Attributes:
        runs: The same.
        layers: Names of the layers that the reader can choose.
        titles: Their titles, with the batch normalization behind each if there is one.
    """

    def __init__(self, runs: Sequence[Run], patterns: Sequence[str] = ()) -> None:
        self.runs = runs
        self._pairs = [_normalizations_behind(run) for run in runs]
        known = {layer: behind for pairs in self._pairs for layer, behind in pairs.items()}
        self.layers = _choose(runs, known, patterns)
        self.titles = {layer: _title(layer, known.get(layer)) for layer in self.layers}
        self._most = _share(len(runs))
        self._most_of_layer = _share(len(runs) * len(self.layers))

    def of(self, names: Mapping[str, str]) -> list[Row]:
        """Return the curves of metrics.

        Args:
            names: Label of each metric key in the figure.

        Returns:
            A row for each run, metric and layer (:data:`ALL` among them) that has points, with the fields ``panel``,
            ``series``, ``run``, ``group``, ``quantity``, ``layer``, ``step`` and ``value``; values are finite and
            rounded to five digits.
        """
        return [
            row
            for run, pairs in zip(self.runs, self._pairs, strict=True)
            for key, label in names.items()
            for layer, points in self._layers_of(run, pairs, key)
            for row in self._rows(run, label, layer, points)
        ]

    def ratios(self, measured: str, predicted: Mapping[str, str]) -> list[Row]:
        """Return by how much the ratio of one metric to others differs from 1, at the steps that have both.

        Args:
            measured: Metric key above the fraction bar.
            predicted: Label of each metric key below it in the figure. Where its value is zero there is no ratio.

        Returns:
            Rows as :meth:`of` returns them. Their values are ratios minus 1: of a ratio itself, five digits would not
            show a deviation of 10⁻⁶.
        """
        return [
            row
            for run, pairs in zip(self.runs, self._pairs, strict=True)
            for key, label in predicted.items()
            for (layer, above), (_, below) in zip(
                self._layers_of(run, pairs, measured), self._layers_of(run, pairs, key), strict=True
            )
            for row in self._rows(run, label, layer, _deviations(above, below))
        ]

    def _rows(self, run: Run, label: str, layer: str, points: Points) -> Iterator[Row]:
        """Yield the row of one curve, thinned; none without points."""
        if points:
            yield {
                "panel": run.panel,
                "series": run.series,
                "group": run.group,
                "run": run.name,
                "quantity": label,
                "layer": layer,
                **_columns(points, self._most if layer == ALL else self._most_of_layer),
            }

    def _layers_of(self, run: Run, pairs: Mapping[str, str], key: str) -> Iterator[tuple[str, Points]]:
        """Yield the name and points of the aggregate and of each layer that can be chosen."""
        yield ALL, run.record.points(key)
        for layer in self.layers:
            behind = pairs.get(layer, layer)
            yield self.titles[layer], layer_curve(run, key, layer) or layer_curve(run, key, behind)


def layer_curve(run: Run, key: str, layer: str) -> list[tuple[int, float]]:
    """Return the finite (step, value) pairs of one layer, from the record's values by layer or else its own key."""
    points = run.record.layers.get(key, [])
    if isinstance(points, LayerPoints):
        recorded = points.of_layer(layer)
    else:
        recorded = [(step, values[layer]) for step, values in points if layer in values]
    return finite_points(recorded or run.record.metrics.get(f"{key}/{layer}", []))


def last_by_layer(run: Run, key: str) -> dict[str, float]:
    """Return the last value of each layer if it is finite, from input to output."""
    points = run.record.layers.get(key, [])
    own = [name for name in run.record.metrics if name.startswith(f"{key}/")]
    keyed = {name.removeprefix(f"{key}/"): run.record.metrics[name][-1][1] for name in own}
    found = {**(points[-1][1] if points else {}), **keyed}
    return {layer: value for layer, value in found.items() if math.isfinite(value)}


def _normalizations_behind(run: Run) -> dict[str, str]:
    """Return the batch normalization behind each layer, by name, where the run has noted it."""
    noted = run.record.observed.get("normalizations")
    return {str(layer): str(behind) for layer, behind in noted.items()} if isinstance(noted, dict) else {}


def _title(layer: str, behind: str | None) -> str:
    """Return a layer with the batch normalization behind it, such as ``layer1.0.conv1 + bn1``."""
    if behind is None:
        return layer
    place, _, own = behind.rpartition(".")
    return f"{layer} + {own if place == layer.rpartition('.')[0] else behind}"


def _choose(runs: Sequence[Run], known: Mapping[str, str], patterns: Sequence[str]) -> list[str]:
    """Return the layers that the reader can choose, in the order of the network."""
    layers = dict.fromkeys(layer for run in runs for layer in last_by_layer(run, "norm_growth/weight_norm"))
    layers |= dict.fromkeys(
        layer for run in runs for layer in last_by_layer(run, "affine/abs_gamma2_minus_sigma2_mean")
    )
    pairs = {layer: behind for layer, behind in known.items() if layer in layers}
    layers = {layer: None for layer in layers if layer not in pairs.values()}
    if patterns:
        names = {layer: (layer, pairs.get(layer, layer)) for layer in layers}
        unused = [pattern for pattern in patterns if not any(fnmatch.filter(pair, pattern) for pair in names.values())]
        if layers and unused:
            warn_once(f"layers={unused} matches no layer of these runs. Nearest: {nearest_names(unused[0], layers)}.")
        return [layer for layer in layers if any(fnmatch.filter(names[layer], pattern) for pattern in patterns)]
    keyed = {layer for layer in layers if any(key.endswith(f"/{layer}") for run in runs for key in run.record.metrics)}
    few = max(1, _LAYERS // max(1, len(runs)))
    stride = max(1, math.ceil(len(layers) / few))
    chosen = {*[layer for layer in layers if layer in keyed][:few], *list(layers)[::stride]}
    return [layer for layer in layers if layer in chosen]


def _share(curves: int) -> int:
    """Return the number of points that a curve can have, if each quantity has the given number of curves."""
    return max(_FEWEST, min(_MOST, _POINTS // max(1, _QUANTITIES * curves)))


def _deviations(above: Points, below: Points) -> Points:
    """Return the ratio of two curves minus 1, at the steps at which it is finite."""
    divisors = {step: value for step, value in below if value}
    return finite_points(
        [(step, (value - divisors[step]) / divisors[step]) for step, value in above if step in divisors]
    )


def _columns(points: Points, most: int) -> dict[str, list[float]]:
    """Return points as two lists; of many only ``most`` in even spacing, and those of extreme magnitude."""
    count = len(points)
    if count > most:
        sizes = [abs(value) for _, value in points]
        kept = {round(i * (count - 1) / (most - 1)) for i in range(most)}
        kept |= {sizes.index(min(sizes)), sizes.index(max(sizes))}
        points = [points[k] for k in sorted(kept)]
    return {"step": [step for step, _ in points], "value": [float(f"{value:.5g}") for _, value in points]}
