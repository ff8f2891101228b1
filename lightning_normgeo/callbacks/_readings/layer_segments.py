"""Per-layer reductions over the units of many layers at once."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.geometry.rows import has_float64, wide_dtype


def _key(value: float | Tensor) -> float | int:
    """Return a key that is equal for equal numbers and for the same tensor, whose value is not read."""
    return id(value) if isinstance(value, Tensor) else value


@functools.lru_cache(maxsize=256)
def _on_device(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return lengths as a tensor on a device; cached, since the layers rarely change between steps."""
    return torch.tensor(lengths, device=device)


_WHOLE: dict[str, Any] = {"maximum": torch.amax, "sum": torch.sum, "mean": torch.mean}


class LayerSegments:
    """Layers with several units each, whose per-unit values are stored in one flat tensor over all layers.

    Args:
        names: names of the layers.
        lengths: the number of units of each layer.
        device: the device of the values.
    """

    def __init__(self, names: Sequence[str], lengths: Sequence[int], device: torch.device) -> None:
        self.names = list(names)
        self._units = sum(lengths)
        self._each = tuple(lengths)
        self._lengths = _on_device(self._each, device)

    def spread(self, values: Sequence[float | Tensor]) -> Tensor:
        """Return a flat tensor that repeats the value of each layer for each of its units."""
        device, runs = self._lengths.device, []
        for _, both in itertools.groupby(zip(values, self._each, strict=True), key=lambda pair: _key(pair[0])):
            same = list(both)
            value, units = same[0][0], sum(length for _, length in same)
            # filled on the device, with the number as a kernel argument: a tensor built on the host would be a transfer
            runs.append(torch.full((units,), 1.0, dtype=wide_dtype(device), device=device).mul_(value))
        return torch.cat(runs)

    def maximum(self, values: Tensor) -> Tensor:
        """Return the maximum over the units of each layer."""
        if has_float64(values.device):
            return torch.segment_reduce(values, "max", lengths=self._lengths, unsafe=True)
        return self._whole(values).scatter_reduce(0, self._places, values, "amax", include_self=False)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the units of each layer."""
        if has_float64(values.device):
            return torch.segment_reduce(values, "sum", lengths=self._lengths, unsafe=True)
        return self._whole(values).index_add(0, self._places, values)

    def spread_sums(self, values: Tensor) -> Tensor:
        """Return for each unit the sum over the units of its layer."""
        return self.sum(values).repeat_interleave(self._lengths, output_size=self._units)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the units of each layer."""
        if has_float64(values.device):
            return torch.segment_reduce(values, "mean", lengths=self._lengths, unsafe=True)
        return self.sum(values) / self._lengths

    def _whole(self, values: Tensor) -> Tensor:
        """Return zeros, one per layer, for devices without float64 (MPS), which have no segment_reduce either."""
        return values.new_zeros(len(self._each))

    @cached_property
    def _places(self) -> Tensor:
        """The index of the layer of each unit."""
        layers = torch.arange(len(self._each), device=self._lengths.device)
        return layers.repeat_interleave(self._lengths, output_size=self._units)

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

    def reading_of_some(
        self,
        key: str,
        values: Tensor,
        chosen: Tensor,
        finish: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Reading:
        """Return a reading of means over the ``chosen`` units: per layer (NaN for a layer without any) and in total."""
        weights = chosen.to(values)
        total = finish((values * weights).sum() / weights.sum())
        by_layer = finish(self.sum(values * weights) / self.sum(weights))
        return Reading(key, total, by_layer, self.names, partial=True)
