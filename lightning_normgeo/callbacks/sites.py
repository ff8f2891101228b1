"""Reductions over the units of many layers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.callbacks.readings import Reading
from lightning_normgeo.geometry.rows import wide_dtype

_WHOLE: dict[str, Any] = {"maximum": torch.amax, "sum": torch.sum, "mean": torch.mean}


class Sites:
    """Layers with several units each; a value per unit is one flat tensor over all layers.

    Args:
        names: the layers.
        lengths: how many units each has.
        device: where the values are.
    """

    def __init__(self, names: Sequence[str], lengths: Sequence[int], device: torch.device) -> None:
        self.names = list(names)
        self._units = sum(lengths)
        self._lengths = torch.tensor(list(lengths)).to(device, non_blocking=True)

    def spread(self, values: Sequence[float | Tensor]) -> Tensor:
        """Return one value per layer for each of its units."""
        wide = wide_dtype(self._lengths.device)
        if any(isinstance(value, Tensor) for value in values):
            column = torch.stack([torch.as_tensor(value, dtype=wide, device=self._lengths.device) for value in values])
        else:
            column = torch.tensor(values, dtype=wide).to(self._lengths.device, non_blocking=True)
        return column.repeat_interleave(self._lengths, output_size=self._units)

    def maximum(self, values: Tensor) -> Tensor:
        """Return the maximum over the units of each layer."""
        return torch.segment_reduce(values, "max", lengths=self._lengths, unsafe=True)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the units of each layer."""
        return torch.segment_reduce(values, "sum", lengths=self._lengths, unsafe=True)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the units of each layer."""
        return torch.segment_reduce(values, "mean", lengths=self._lengths, unsafe=True)

    def reading(
        self,
        key: str,
        values: Tensor,
        reduce: Callable[[Tensor], Tensor],
        finish: Callable[[Tensor], Tensor] = lambda x: x,
        watch: bool = False,
    ) -> Reading:
        """Return the reading whose layers are ``finish(reduce(values))`` and whose total treats all units as one layer.

        Args:
            key: ``{group}/{quantity}``.
            values: one value per unit.
            reduce: a bound method of this object: maximum, sum or mean.
            finish: applied to what was reduced, as the square root of a mean of squares.
            watch: whether the total can be watched by other callbacks.
        """
        whole: Callable[[Tensor], Tensor] = _WHOLE[reduce.__name__]
        return Reading(key, finish(whole(values)), finish(reduce(values)), self.names, watch)
