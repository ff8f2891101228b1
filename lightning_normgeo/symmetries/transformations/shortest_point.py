r"""The shortest point of an orbit of rescalings: minimization of ‖θ‖² over the coefficients of generators.

:math:`f(c) = \sum_e w_e^2 e^{2(S^T c)_e}`, summed over the elements e of the parameters, is convex. Its gradient is 2Q
of each generator, so that all conserved quantities vanish at the minimum. A parameter with exponents along several
axes, such as rows and columns, is kept as the array of its squares over these axes; the others are summed up before.

Newton's method with the step length :math:`\ln(1+\beta)/\beta`, β = 2 max_e \|(S^T d)_e\| for the step d, decreases f
in each step without a line search (Sun & Tran-Dinh 2019, functions with \|f'''\| ≤ β f''). Conjugate gradients solve
its equations; the Hessian is applied as sums over slices and never stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, cg

from lightning_normgeo.symmetries.slices import Slices

Values = npt.NDArray[np.float64]
_STEPS = 200
_FAR = 35.0
"""The largest logarithm of a factor; beyond it slices are taken to vanish at the minimum."""
_LEAST = 1e-13


@dataclass(frozen=True)
class Minimum:
    """A minimum of ‖θ‖² over some generators.

    Attributes:
        coefficients: of all generators, zero for those that were left out.
        vanishing: numbers of generators along which ‖θ‖² has no minimum.
    """

    coefficients: Values
    vanishing: npt.NDArray[np.int64]


class _Squares:
    """Squares of one parameter, summed over axes along which no exponent varies."""

    def __init__(self, squares: npt.NDArray[Any], slices: Sequence[Slices]) -> None:
        self.slices = slices
        kept = {axis for own in slices for axis in own.axes}
        self._axes = sorted(kept)
        inside = tuple(axis for axis in range(squares.ndim) if axis not in kept)
        self.squares: Values = squares.sum(axis=inside)
        self._shapes = [[own.sizes[axis] for axis in self._axes] for own in slices]
        self._letters = [[k for k, axis in enumerate(self._axes) if own.sizes[axis] > 1] for own in slices]
        self.weights = self.squares

    def move(self, logarithms: Values) -> None:
        """Scale the squares as weights that are multiplied by e^logarithm."""
        factors = np.exp(2 * logarithms)
        self.weights = self.squares
        for own, shape in zip(self.slices, self._shapes, strict=True):
            self.weights = self.weights * factors[own.start : own.stop].reshape(shape)

    def add_sums(self, into: Values) -> None:
        """Add the sums of the weights over each slice."""
        every = list(range(len(self._axes)))
        for own, letters in zip(self.slices, self._letters, strict=True):
            into[own.start : own.stop] += np.einsum(self.weights, every, letters).reshape(-1)

    def add_products(self, sums: Values, values: Values, into: Values) -> None:
        """Add the sums over each slice of the weights times the values of all slices that an element is in.

        Args:
            sums: of the weights over each slice.
            values: one for each slice.
            into: sums that are added to.
        """
        every = list(range(len(self._axes)))
        for own, letters in zip(self.slices, self._letters, strict=True):
            into[own.start : own.stop] += sums[own.start : own.stop] * values[own.start : own.stop]
            for other, others in zip(self.slices, self._letters, strict=True):
                if other is not own:
                    part = values[other.start : other.stop].reshape([self.weights.shape[k] for k in others])
                    product = np.einsum(self.weights, every, part, others, letters, optimize=True)
                    into[own.start : own.stop] += product.reshape(-1)


def shortest(
    exponents: csr_array,
    slices: Sequence[Slices],
    squares: Mapping[str, npt.NDArray[Any]],
    chosen: npt.NDArray[np.int64],
) -> Minimum:
    """Return the coefficients of some generators that make ‖θ‖² smallest.

    Generators along which ‖θ‖² only falls, since one side is zero, have no minimum and are left out. Several that each
    have a minimum may have none together: then their combination scales everything in the same direction, and is an
    invariance. Of these one is left out, the first that takes part in it, until a minimum exists.

    Args:
        exponents: of all generators, ``(generators, slices)``.
        slices: of the columns.
        squares: squares of each parameter by name, in float64.
        chosen: numbers of the generators that may change.

    Cost: about ten steps, each of a few passes over the parameters that have exponents along several axes.
    """
    sums = slice_sums(slices, squares)
    vanishing: list[int] = []
    one_sided = _one_sided(exponents[chosen], sums)
    vanishing += chosen[one_sided].tolist()
    chosen = chosen[~one_sided]
    while True:
        matrix = exponents[chosen].tocsr()
        found, far = _newton(matrix, _arrays(matrix, slices, squares), len(sums))
        if not far.any():
            break
        leaving = _first_to_leave(matrix, found, far)
        vanishing += chosen[leaving].tolist()
        chosen = np.delete(chosen, leaving)
    coefficients = np.zeros(exponents.shape[0])
    coefficients[chosen] = found
    return Minimum(coefficients, np.sort(np.array(vanishing, np.int64)))


def slice_sums(slices: Sequence[Slices], arrays: Mapping[str, npt.NDArray[Any]]) -> Values:
    """Return the sum of the arrays over each slice."""
    parts = [_over(own, arrays[own.parameter]) for own in slices]
    return np.concatenate(parts) if parts else np.zeros(0)


def _over(own: Slices, array: npt.NDArray[Any]) -> Values:
    inside = tuple(axis for axis, size in enumerate(own.sizes) if size == 1 and own.shape[axis] > 1)
    summed: Values = array.sum(axis=inside) if inside else array
    return summed.reshape(-1)


def _one_sided(matrix: csr_array, sums: Values) -> npt.NDArray[np.bool_]:
    """Return the generators for which all growing or all shrinking slices are zero."""
    above, below = (matrix.multiply(sign * matrix > 0) @ sums for sign in (1, -1))
    result: npt.NDArray[np.bool_] = (above <= 0) | (below >= 0)
    return result


def _first_to_leave(matrix: csr_array, coefficients: Values, far: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the first generator with a large coefficient of each set that shares slices and runs away.

    Coefficients that run away are proportional to those of the invariance. The first one is taken, not the largest, so
    that the same one is left out wherever the weights begin.
    """
    _, labels = connected_components(matrix @ matrix.T != 0, directed=False)
    sizes = np.where(np.isin(labels, labels[far]), np.abs(coefficients), 0.0)
    largest = np.zeros(labels.max() + 1)
    np.maximum.at(largest, labels, sizes)
    candidates = np.flatnonzero((sizes > 0) & (sizes >= 0.5 * largest[labels]))
    _, first = np.unique(labels[candidates], return_index=True)
    leaving: npt.NDArray[np.int64] = candidates[first]
    return leaving


def _arrays(matrix: csr_array, slices: Sequence[Slices], squares: Mapping[str, npt.NDArray[Any]]) -> list[_Squares]:
    """Return the squares of the parameters with slices that some generator scales."""
    touched = np.zeros(matrix.shape[1], bool)
    touched[matrix.indices] = True
    by_name: dict[str, list[Slices]] = {}
    for own in slices:
        if touched[own.start : own.stop].any():
            by_name.setdefault(own.parameter, []).append(own)
    return [_Squares(squares[name], own) for name, own in by_name.items()]


def _newton(matrix: csr_array, arrays: Sequence[_Squares], count: int) -> tuple[Values, npt.NDArray[np.bool_]]:
    """Return the coefficients at the minimum, and which generators drive slices to zero."""
    coefficients = np.zeros(matrix.shape[0])
    size, square, transposed = abs(matrix), matrix.power(2), matrix.T.tocsr()
    none = np.zeros(matrix.shape[0], bool)
    for _ in range(_STEPS if matrix.shape[0] else 0):
        logarithms = transposed @ coefficients
        sums = np.zeros(count)
        for own in arrays:
            own.move(logarithms)
            own.add_sums(sums)
        quantity = matrix @ sums
        worst = float(np.max(np.abs(quantity) / (size @ sums)))
        if worst <= _LEAST:
            break
        far = np.abs(logarithms) > _FAR
        if far.any():
            return coefficients, np.asarray((size @ far) > 0)
        step = _newton_step(matrix, transposed, arrays, sums, quantity, square @ sums, max(1e-12, min(0.1, worst)))
        reach = 2 * _largest(arrays, transposed @ step)
        coefficients = coefficients + step * (np.log1p(reach) / reach if reach > 0 else 1.0)
    return coefficients, none


def _newton_step(
    matrix: csr_array,
    transposed: csr_array,
    arrays: Sequence[_Squares],
    sums: Values,
    quantity: Values,
    diagonal: Values,
    tolerance: float,
) -> Values:
    """Return the solution d of 2 S X Sᵀ d = -Q, where X holds the sums of squares that two slices share."""
    root = np.sqrt(2 * diagonal)

    def apply(values: Values) -> Values:
        moved, products = transposed @ (values.reshape(-1) / root), np.zeros(len(sums))
        for own in arrays:
            own.add_products(sums, moved, products)
        result: Values = 2 * (matrix @ products) / root
        return result

    size = len(quantity)
    operator = LinearOperator((size, size), matvec=apply, dtype=np.float64)
    solution, _ = cg(operator, -quantity / root, rtol=tolerance, atol=0.0, maxiter=500)
    step: Values = solution / root
    return step


def _largest(arrays: Sequence[_Squares], logarithms: Values) -> float:
    """Return a bound on the logarithms of the factors of single elements."""
    sums = [sum(float(np.abs(logarithms[s.start : s.stop]).max()) for s in own.slices) for own in arrays]
    return max(sums, default=0.0)
