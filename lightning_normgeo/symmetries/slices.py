"""Slices of parameters that have one exponent each, and generators as vectors over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from torch import Tensor

from lightning_normgeo.geometry.rows import as_real
from lightning_normgeo.normalization.autograd.graph import Node
from lightning_normgeo.symmetries.degrees.algebra import tidy
from lightning_normgeo.symmetries.degrees.liveness import any_along
from lightning_normgeo.symmetries.equations.exponents import Ids, Mask
from lightning_normgeo.symmetries.propagation import Degrees, Propagation


@dataclass(frozen=True)
class Slices:
    """All slices of a parameter along some of its axes: one for each index into them.

    Attributes:
        parameter: name of the parameter.
        shape: shape of the parameter.
        axes: axes whose indices number the slices; without axes the whole parameter is the only slice.
        start: number of the first slice among those of all parameters.
        sizes: number of slices along each axis, 1 along axes that a slice contains.
    """

    parameter: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    start: int
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        """The number of slices."""
        return prod(self.sizes)

    @property
    def stop(self) -> int:
        """The number behind that of the last slice."""
        return self.start + self.count

    def text(self, some: int, offset: int = 0) -> str:
        """Return a text for ``some`` of the slices, such as ``fc.weight[i]``, ``fc.weight[:, i]`` or ``fc.weight``.

        Args:
            some: number of slices.
            offset: of the index i, for slices of one block of a packed weight.
        """
        if some == self.count:
            return self.parameter
        index = (f"{offset} + i" if offset else "i") if some == 1 else f"{some} of {self.count}"
        places = [index if axis in self.axes else ":" for axis in range(len(self.shape))]
        while places[-1] == ":":
            places.pop()
        return f"{self.parameter}[{', '.join(places)}]"

    def rows(self, tensor: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape as a matrix ``(slices, n)`` with one slice per row."""
        tensor = as_real(tensor.detach())
        varying = [axis for axis, size in enumerate(self.sizes) if size > 1]
        return tensor.movedim(varying, list(range(len(varying)))).reshape(self.count, -1)

    def spread(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return one value per slice as an array that broadcasts to the parameter."""
        return values.reshape(self.sizes)


def parameter_slices(found: Degrees, names: Mapping[Node, str]) -> tuple[list[Slices], Ids]:
    """Return the slices of all parameters, and the unknown exponent of each slice.

    Args:
        found: degrees of the parameters.
        names: name of each parameter by its node, in the order of the result.
    """
    slices: list[Slices] = []
    unknowns: list[Ids] = [np.zeros(0, np.int64)]
    start = 0
    for node, name in names.items():
        shape = tuple(node.variable.shape)
        degree = tidy(found.exponents, found.parameters[node])
        for term in degree.terms or (np.zeros((1,) * len(shape), np.int64),):
            axes = tuple(axis for axis, size in enumerate(term.shape) if size > 1)
            slices.append(Slices(name, shape, axes, start, term.shape))
            unknowns.append(term.reshape(-1))
            start += term.size
    return slices, np.concatenate(unknowns)


def generators(basis: csr_array, unknowns: Ids) -> csr_array:
    """Return the generators as a matrix of shape (generators, slices), each with 1 as its smallest exponent.

    The exponent with the smallest magnitude becomes 1; if several have it, the one of the first slice.
    """
    matrix = basis[:, unknowns].tocsr()
    matrix.eliminate_zeros()
    matrix.sort_indices()
    matrix = matrix[np.flatnonzero(np.diff(matrix.indptr) > 0)]
    if not matrix.shape[0]:
        return matrix
    magnitudes = np.abs(matrix.data)
    smallest = np.minimum.reduceat(magnitudes, matrix.indptr[:-1])
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    places = np.where(magnitudes <= smallest[rows] * (1 + 1e-9), np.arange(len(rows)), len(rows))
    first = np.minimum.reduceat(places, matrix.indptr[:-1])
    matrix.data = matrix.data / matrix.data[first][rows]
    positive = np.add.reduceat((matrix.data > 0).astype(int), matrix.indptr[:-1])
    mostly_negative = 2 * positive < np.diff(matrix.indptr)
    matrix.data = np.where(mostly_negative[rows], -matrix.data, matrix.data)
    return matrix


def row_scale(matrix: csr_array, raw: csr_array) -> npt.NDArray[np.float64]:
    """Return the factor between corresponding rows of two matrices, none of which is zero."""
    raw = raw.tocsr()
    raw.eliminate_zeros()
    raw.sort_indices()
    scale: npt.NDArray[np.float64] = matrix.data[matrix.indptr[:-1]] / raw.data[raw.indptr[:-1]]
    return scale


def without_effect(found: Propagation, names: Mapping[Node, str], slices: Sequence[Slices]) -> Mask:
    """Return the slices that the results do not depend on at all: not read, or removed by centering or softmax."""
    nodes = {name: node for node, name in names.items()}
    result = np.zeros(slices[-1].stop if slices else 0, bool)
    for own in slices:
        node = nodes[own.parameter]
        live = found.live[node, 0]
        shift = found.shifts.get((node, 0))
        if shift is not None and shift.removes(own.shape, len(own.shape)):
            live = live & ~shift.mask
        inside = [axis for axis, size in enumerate(own.sizes) if size == 1]
        result[own.start : own.stop] = ~np.broadcast_to(any_along(live, inside), own.sizes).reshape(-1)
    return result
