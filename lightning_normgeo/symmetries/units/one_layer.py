"""Symmetries of one layer alone: exponents of slices of its weight while nothing else is scaled."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, diags_array

from lightning_normgeo.normalization.autograd.graph import Node
from lightning_normgeo.symmetries.degrees.degree import Degree
from lightning_normgeo.symmetries.equations.exponents import Exponents, Ids
from lightning_normgeo.symmetries.equations.nullspace import solution
from lightning_normgeo.symmetries.propagation import Degrees, Propagation
from lightning_normgeo.symmetries.units.cuts import Cut


@dataclass(frozen=True)
class LayerSolutions:
    """Symmetries that scale slices of one layer and nothing else.

    Attributes:
        basis: exponents of shape (solutions, unknowns).
        weight: unknown exponent of each slice of the weight.
        bias: unknown exponent of each entry of the bias; empty without a bias.
        degrees: degrees of weight and bias.
    """

    basis: csr_array
    weight: Ids
    bias: Ids
    degrees: Degrees

    @property
    def count(self) -> int:
        """The number of solutions."""
        return int(self.basis.shape[0])

    def of(self, ids: Ids) -> csr_array:
        """Return the values of some unknowns, of shape (solutions, unknowns)."""
        values = self.basis[:, ids].tocsr()
        values.eliminate_zeros()
        return values

    def moves(self, ids: Ids) -> bool:
        """Whether one of the unknowns is not zero in some solution."""
        return bool(self.of(np.ravel(ids)).nnz)

    def within(self, rows: slice) -> LayerSolutions:
        """Return the solutions for some rows of the weight, and the entries of the bias beside them.

        Solutions that scale other rows, too, are left out.
        """
        outside = np.delete(self.weight, rows)
        kept = np.flatnonzero(np.diff(self.of(outside).indptr) == 0)
        bias = self.bias[rows] if self.bias.size == self.weight.size else self.bias
        return LayerSolutions(self.basis[kept].tocsr(), self.weight[rows], bias, self.degrees)

    def rows(self, numbers: npt.NDArray[np.int64], scale: npt.NDArray[np.float64]) -> LayerSolutions:
        """Return some of the solutions, each divided by a number."""
        basis = (diags_array(1 / scale) @ self.basis[numbers]).tocsr()
        return LayerSolutions(basis, self.weight, self.bias, self.degrees)


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
    return LayerSolutions(solution(exponents), weight, of_bias.ravel(), degrees)
