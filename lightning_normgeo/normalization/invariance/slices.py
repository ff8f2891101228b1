"""Ways to cut a weight into slices, each of which is scaled by a factor of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor

from lightning_normgeo.normalization.invariance.row_layout import Axis, Piece, ScaleState, plain_axis, rows


@dataclass(frozen=True)
class Slices:
    """The slices of a weight along one dimension, or for each index into several leading dimensions.

    Attributes:
        dim: dimension that enumerates the slices.
        groups: number of groups of a transposed convolution, whose output channels are spread over them; otherwise 1.
        leading: number of consecutive dimensions, from ``dim`` on, that enumerate the slices; ``dim`` is 0 if several.
    """

    dim: int
    groups: int = 1
    leading: int = 1

    def count(self, weight: Tensor) -> int:
        """Return the number of slices."""
        return prod(weight.shape[self.dim : self.dim + self.leading]) * self.groups

    def state(self, weight: Tensor) -> ScaleState:
        """Return the initial state of the search, in which every slice of the weight is a row of its own."""
        if self.groups > 1:
            # shape (inputs, outputs per group, ...): the group of an output channel is the leading digit of its input
            inputs, each, *kernel = weight.shape
            first = Axis(inputs, (Piece(self.groups, each), Piece(inputs // self.groups, 0)))
            return ScaleState((first, rows(each), *map(plain_axis, kernel)))
        axes = [plain_axis(size) for size in weight.shape]
        stride = 1
        for d in reversed(range(self.dim, self.dim + self.leading)):
            axes[d] = rows(weight.shape[d], stride)
            stride *= weight.shape[d]
        return ScaleState(tuple(axes))


def other_slices(weight: Tensor, dim: int) -> Iterator[Slices]:
    """Yield all ways to cut a weight except along ``dim``."""
    yield from (Slices(d) for d in range(weight.ndim) if d != dim)
    yield from (Slices(0, leading=leading) for leading in range(2, weight.ndim))
