"""Ways to cut a weight into slices, each of which has an exponent of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from lightning_normgeo.symmetries.equations.exponents import Ids

TOLERANCE = 1e-9  # exponents are small rational numbers


class Cut(NamedTuple):
    """Slices of a weight along one dimension, or for each index into several leading dimensions.

    Attributes:
        dim: dimension that numbers the slices; 0 if several leading ones do.
        groups: number of groups of a transposed convolution, whose output channels are spread over them; otherwise 1.
        leading: number of leading dimensions that number the slices.
    """

    dim: int = 0
    groups: int = 1
    leading: int = 1

    def rows(self, shape: Sequence[int]) -> int:
        """Return the number of slices of a weight."""
        return prod(shape[: self.leading]) if self.leading > 1 else shape[self.dim] * self.groups

    def spread(self, rows: Ids, shape: Sequence[int]) -> Ids:
        """Return one number per slice as an array that broadcasts to the weight."""
        if self.groups > 1:
            # shape (inputs, outputs per group, ...): the inputs of a group are consecutive
            inputs, each, *kernel = shape
            by_group = np.broadcast_to(rows.reshape(self.groups, 1, each), (self.groups, inputs // self.groups, each))
            return by_group.reshape(inputs, each, *(1 for _ in kernel))
        wide = range(self.leading) if self.leading > 1 else (self.dim,)
        return rows.reshape([size if axis in wide else 1 for axis, size in enumerate(shape)])


def cuts(shape: Sequence[int], first: Cut) -> Iterator[Cut]:
    """Yield all ways to cut a weight except the first one."""
    yield from (Cut(dim) for dim in range(len(shape)) if dim != first.dim)
    yield from (Cut(leading=leading) for leading in range(2, len(shape)))


def units(values: csr_array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None:
    """Return the solution that scales each unit, and the exponent of its slices there.

    A unit is a run of consecutive slices with the same exponent in one solution, and 0 in all others; all units have
    the same length.

    Args:
        values: exponents of the slices in each solution, of shape (solutions, slices).

    Returns:
        Both in the order of the units; None if the slices are not divided in this way.
    """
    slices = values.shape[1]
    values = values.tocsc()
    if not bool((np.diff(values.indptr) == 1).all()):
        return None
    solution, exponent = values.indices.astype(np.int64), values.data
    count = 1 + int((solution[1:] != solution[:-1]).sum())
    if slices % count or len(np.unique(solution)) < count:
        return None
    blocks, powers = solution.reshape(count, -1), exponent.reshape(count, -1)
    alike = (blocks == blocks[:, :1]) & (abs(powers - powers[:, :1]) <= TOLERANCE * abs(powers))
    return (blocks[:, 0], powers[:, 0]) if bool(alike.all()) else None
