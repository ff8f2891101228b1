"""Symmetries of one layer alone: exponents of slices of its weight while nothing else is scaled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, diags_array

from lightning_normgeo.normalization.autograd.graph import Node
from lightning_normgeo.symmetries.degrees.degree import Degree
from lightning_normgeo.symmetries.equations.exponents import Exponents, Ids, Mask
from lightning_normgeo.symmetries.equations.nullspace import solution
from lightning_normgeo.symmetries.propagation import Degrees, Propagation
from lightning_normgeo.symmetries.slices import Slices
from lightning_normgeo.symmetries.solution import Solution
from lightning_normgeo.symmetries.units.cuts import Cut, units

_NOWHERE = -1


@dataclass(frozen=True)
class LayerSolutions:
    """Symmetries that scale slices of one layer and nothing else.

    Attributes:
        basis: exponents of shape (solutions, columns + 1); the last column is zero.
        columns: unknowns that are not zero in some solution, in ascending order.
        weight: unknown exponent of each slice of the weight.
        bias: unknown exponent of each entry of the bias; empty without a bias.
        degrees: degrees of weight and bias.
    """

    basis: csr_array
    columns: Ids
    weight: Ids
    bias: Ids
    degrees: Degrees

    @property
    def count(self) -> int:
        """The number of solutions."""
        return int(self.basis.shape[0])

    @cached_property
    def covered(self) -> Mask:
        """The slices of the weight that some solution scales."""
        found: Mask = np.diff(self.of(self.weight).tocsc().indptr) > 0
        return found

    @cached_property
    def divided(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]] | None:
        """The solution and the exponent of each unit of the weight, see :func:`.cuts.units`."""
        return units(self.of(self.weight))

    def of(self, ids: Ids) -> csr_array:
        """Return the values of some unknowns, of shape (solutions, unknowns)."""
        values = self.basis[:, self._places(ids)].tocsr()
        values.eliminate_zeros()
        return values

    def _places(self, ids: Ids) -> Ids:
        """Return the column of each unknown."""
        places = np.searchsorted(self.columns, ids)
        there = np.append(self.columns, _NOWHERE)[places] == ids
        found: Ids = np.where(there, places, len(self.columns))
        return found

    def moves(self, ids: Ids) -> bool:
        """Whether one of the unknowns is not zero in some solution."""
        return bool((self._places(np.ravel(ids)) < len(self.columns)).any())

    def within(self, rows: slice) -> LayerSolutions:
        """Return the solutions for some rows of the weight, and the entries of the bias beside them.

        Solutions that scale other rows, too, are left out.
        """
        outside = np.delete(self.weight, rows)
        kept = np.flatnonzero(np.diff(self.of(outside).indptr) == 0)
        bias = self.bias[rows] if self.bias.size == self.weight.size else self.bias
        return replace(self._some(self.basis[kept]), weight=self.weight[rows], bias=bias)

    def rows(self, numbers: npt.NDArray[np.int64], scale: npt.NDArray[np.float64]) -> LayerSolutions:
        """Return some of the solutions, each divided by a number."""
        return self._some(diags_array(1 / scale) @ self.basis[numbers])

    def _some(self, basis: csr_array) -> LayerSolutions:
        """Return other solutions in the same columns."""
        used = np.unique(basis.indices)
        return replace(self, basis=basis[:, np.append(used, len(self.columns))].tocsr(), columns=self.columns[used])


class AllLayers:
    """The symmetries of one layer alone among the generators of a graph, for all layers.

    They are what :func:`solve_layer` finds for the layer, except where a generator scales other layers, too, although a
    combination with others would not: a layer in front of another one without a normalization between them.

    Args:
        found: all generators of the graph.
    """

    def __init__(self, found: Solution) -> None:
        self._found = found
        self._slices: dict[str, list[Slices]] = {}
        for own in found.slices:
            self._slices.setdefault(own.parameter, []).append(own)
        self._generators_of = found.exponents.T.tocsr()
        self._sizes = np.diff(found.exponents.indptr)

    def alone(self, weight: str, bias: str, cut: Cut) -> LayerSolutions | None:
        """Return the generators that scale slices of a weight and its bias only; None if they miss some slices.

        Args:
            weight: name of the weight.
            bias: name that its bias has, if there is one.
            cut: the slices of the weight.
        """
        own = self._along(weight, cut)
        if own is None:
            return None
        places = [own, *self._slices.get(bias, ())]
        touched = np.concatenate([self._generators_of[one.start : one.stop].indices for one in places])
        generators, inside = np.unique(touched, return_counts=True)
        generators = generators[inside == self._sizes[generators]]
        weight_ids, *bias_ids = (self._found.unknowns[one.start : one.stop] for one in places)
        found = LayerSolutions(
            *_compact(self._found.basis[generators]),
            np.broadcast_to(weight_ids, cut.rows(own.shape)),
            np.concatenate([np.zeros(0, np.int64), *bias_ids]),
            self._found.degrees,
        )
        return found if bool(found.covered.all()) else None

    def _along(self, weight: str, cut: Cut) -> Slices | None:
        """Return the slices of a weight that a cut makes, if there are such."""
        if cut.groups > 1 or cut.leading > 1:
            return None
        varying = [[axis for axis, size in enumerate(own.sizes) if size > 1] for own in self._slices[weight]]
        fits = [own for own, axes in zip(self._slices[weight], varying, strict=True) if axes in ([], [cut.dim])]
        return fits[0] if len(fits) == 1 else None


def solve_layer(propagation: Propagation, leaf: Node, bias: Node | None, cut: Cut) -> LayerSolutions:
    """Return the symmetries that scale slices of a weight, entries of a bias, and nothing else.

    Args:
        propagation: of the graph.
        leaf: node of the weight.
        bias: node of its bias; None without one.
        cut: the slices of the weight.

    Cost: a walk over the operations behind the weight, up to those where the scale ends.
    """
    exponents, shape = Exponents(), tuple(leaf.variable.shape)
    weight = exponents.new((cut.rows(shape),))
    start = {leaf: Degree(shape, (cut.spread(weight, shape),))}
    of_bias: Ids = np.zeros(0, np.int64)
    if bias is not None:
        of_bias = exponents.new(tuple(bias.variable.shape))
        start[bias] = Degree(of_bias.shape, (of_bias,))
    degrees = propagation.from_some(start, exponents)
    return LayerSolutions(*_compact(solution(exponents)), weight, of_bias.ravel(), degrees)


def _compact(basis: csr_array) -> tuple[csr_array, Ids]:
    """Return a basis without the columns that are zero in all solutions, except for one at the end, and the others."""
    basis = basis.tocsr()
    basis.eliminate_zeros()
    columns, places = np.unique(basis.indices, return_inverse=True)
    shape = (basis.shape[0], len(columns) + 1)
    return csr_array((basis.data, places.ravel(), basis.indptr), shape=shape), columns.astype(np.int64)
