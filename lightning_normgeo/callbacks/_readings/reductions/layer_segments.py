"""Per-layer reductions over the units of many layers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.geometry.columns import repeated, run_maxima, run_sums, table

_WHOLE: dict[str, Any] = {"maximum": torch.amax, "sum": torch.sum, "mean": torch.mean}


class LayerSegments:
    """Layers with several units each, whose per-unit values are stored in one flat tensor over all layers.

    Args:
        names: names of the layers.
        lengths: the number of units of each layer.
        device: the device of the values, which has float64, see :func:`.observing_device`.
    """

    def __init__(self, names: Sequence[str], lengths: Sequence[int], device: torch.device) -> None:
        self.names = list(names)
        self._units = sum(lengths)
        self._each = tuple(lengths)
        self._lengths = table(self._each, device)

    def spread(self, values: Sequence[float | Tensor]) -> Tensor:
        """Return a flat tensor that repeats the value of each layer for each of its units."""
        return repeated(values, self._each, self._lengths.device)

    def maximum(self, values: Tensor) -> Tensor:
        """Return the maximum over the units of each layer."""
        return run_maxima(values, self._each)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the units of each layer."""
        return run_sums(values, self._each)

    def spread_each(self, values: Tensor) -> Tensor:
        """Return a flat tensor that repeats each element of ``values``, one per layer, for each unit of its layer."""
        return values.repeat_interleave(self._lengths, output_size=self._units)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the units of each layer."""
        return self.sum(values) / self._lengths

    def reading(
        self,
        key: str,
        values: Tensor,
        reduce: Callable[[Tensor], Tensor],
        finish: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Reading:
        """Return a reading with ``finish(reduce(values))`` for each layer, and the same over all units as its total.

        Args:
            key: ``{group}/{quantity}``.
            values: one value per unit.
            reduce: a bound method of this object: maximum, sum or mean.
            finish: applied to the reduced values, such as the square root of a mean of squares. Default: identity.
        """
        whole: Callable[[Tensor], Tensor] = _WHOLE[reduce.__name__]
        return Reading(key, finish(whole(values)), finish(reduce(values)), self.names)

    def sums(self, columns: Mapping[str, Tensor]) -> Iterator[Reading]:
        """Yield a reading of sums for each of several quantities, by key, on a GPU all made by the same kernels."""
        values = list(columns.values())
        apart = self._lengths.is_cpu  # where a copy takes longer than an operation
        sums = torch.stack([self.sum(one) for one in values]) if apart else self.sum(torch.stack(values))
        parts = zip(columns, sums.sum(1).unbind(), sums.unbind(), strict=True)
        for key, total, by_layer in parts:
            yield Reading(key, total, by_layer, self.names)

    def maximum_of_some(self, key: str, values: Tensor, chosen: Tensor) -> Reading:
        """Return a reading of the maxima over the ``chosen`` units: per layer (-∞ for one without any) and in total."""
        known = torch.where(chosen, values, -torch.inf)
        return replace(self.reading(key, known, self.maximum), partial=True)

    def reading_of_some(
        self,
        key: str,
        values: Tensor,
        chosen: Tensor,
        finish: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Reading:
        """Return a reading of means over the ``chosen`` units: per layer (NaN for a layer without any) and in total.

        The values of the others may be NaN.
        """
        weights, values = chosen.to(values), torch.where(chosen, values, 0.0)
        total = finish(values.sum() / weights.sum())
        by_layer = finish(self.sum(values) / self.sum(weights))
        return Reading(key, total, by_layer, self.names, partial=True)
