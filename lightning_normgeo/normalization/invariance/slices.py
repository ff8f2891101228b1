"""Ways to cut a weight into the slices that are scaled one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor

from lightning_normgeo.normalization.invariance.row_layout import Axis, Piece, ScaleState, plain, rows


@dataclass(frozen=True)
class Slices:
    """The slices along one dimension, or for each index of several leading ones.

    Attributes:
        dim: the dimension that enumerates them.
        groups: of a transposed convolution, whose output channels are spread over its groups.
        leading: how many leading dimensions enumerate them; ``dim`` is 0 where they are several.
    """

    dim: int
    groups: int = 1
    leading: int = 1

    def count(self, weight: Tensor) -> int:
        """Return how many slices there are."""
        return prod(weight.shape[self.dim : self.dim + self.leading]) * self.groups

    def state(self, weight: Tensor) -> ScaleState:
        """Return the state of a weight whose slices are scaled one by one."""
        if self.groups > 1:
            inputs, each, *kernel = weight.shape
            first = Axis(inputs, (Piece(self.groups, each), Piece(inputs // self.groups, 0)))
            return ScaleState((first, rows(each), *map(plain, kernel)))
        axes = [plain(size) for size in weight.shape]
        stride = 1
        for d in reversed(range(self.dim, self.dim + self.leading)):
            axes[d] = rows(weight.shape[d], stride)
            stride *= weight.shape[d]
        return ScaleState(tuple(axes))


def other_slices(weight: Tensor, dim: int) -> Iterator[Slices]:
    """Yield the ways to cut a weight besides those along ``dim``."""
    yield from (Slices(d) for d in range(weight.ndim) if d != dim)
    yield from (Slices(0, leading=leading) for leading in range(2, weight.ndim))
