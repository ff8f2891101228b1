"""Unknown exponents of slices, kept as multiples of few independent ones.

Every slice of a parameter has an unknown exponent. Most equations between them have two unknowns, x = c·y, or one,
x = 0. These are solved at once by a weighted union-find structure: each unknown is a known multiple of its *root*.
Equations with more unknowns are kept for :func:`.nullspace.solution`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
"""Unknowns by their number; 0 is not an unknown but the number zero."""
Values = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Part = tuple[Ids, float]
"""Unknowns and their common coefficient in a sum."""

ZERO = 0
_TOLERANCE = 1e-9  # factors are products of small rational numbers
_DIGITS = 9
_SHORT = 3


class Exponents:
    """Unknowns and the linear equations between them.

    Attributes:
        count: number of unknowns, with the zero.
        sums: equations Σ_k c_k·x_k = 0 that are left: unknowns of shape (m, k) and coefficients of the same shape.
        cause: what is responsible for the equations that are being added, such as a node of the graph.

    Cost: each equation is a few operations of numpy on all its elements.
    """

    def __init__(self) -> None:
        self.count = 1
        self._root: Ids = np.zeros(1024, np.int64)
        self._factor: Values = np.ones(1024)
        self._joined: Ids = np.zeros(1024, np.int64)  # the history of unions, without shortened paths
        self._causes: list[Any] = [None] * 1024
        self.sums: list[tuple[Ids, Values]] = []
        self.cause: Any = None

    def new(self, shape: Sequence[int]) -> Ids:
        """Return new unknowns in an array of the given shape."""
        size = int(np.prod(shape, dtype=np.int64))
        first, self.count = self.count, self.count + size
        if self.count > len(self._root):
            self._grow()
        ids = np.arange(first, self.count, dtype=np.int64)
        self._root[ids] = self._joined[ids] = ids
        result: Ids = ids.reshape(shape)
        return result

    def _grow(self) -> None:
        more = max(len(self._root), self.count - len(self._root))
        self._root = np.concatenate([self._root, np.zeros(more, np.int64)])
        self._factor = np.concatenate([self._factor, np.ones(more)])
        self._joined = np.concatenate([self._joined, np.zeros(more, np.int64)])
        self._causes += [None] * more

    def resolve(self, ids: Ids) -> tuple[Ids, Values]:
        """Return the root of each unknown, and its factor: unknown = factor · root. For zero, both are 0."""
        roots, factors = self._root[ids], self._factor[ids]
        while bool(((above := self._root[roots]) != roots).any()):
            factors = factors * self._factor[roots]
            roots = above
        zero = roots == ZERO
        if bool(zero.any()):
            factors = np.where(zero, 0.0, factors)
        self._root[ids], self._factor[ids] = roots, factors
        self._factor[ZERO] = 1.0
        return roots, factors

    def equal(self, a: Ids, b: Ids, ratio: float = 1.0, where: Mask | None = None) -> None:
        """Add the equations a = ratio · b, elementwise with broadcasting.

        Args:
            a: unknowns.
            b: unknowns.
            ratio: common factor, not 0.
            where: elements for which the equation holds, broadcastable. Default: all.
        """
        (a, b), ratios = selected([a, b], where), ratio
        while len(a):
            root_a, factor_a = self.resolve(a)
            root_b, factor_b = self.resolve(b)
            known = (root_a == root_b) & (np.abs(factor_a - ratios * factor_b) <= _TOLERANCE * np.abs(factor_a))
            a, b = a[~known], b[~known]
            if self._join(root_a[~known], factor_a[~known], root_b[~known], ratios * factor_b[~known]):
                return

    def _join(self, root_a: Ids, factor_a: Values, root_b: Ids, factor_b: Values) -> bool:
        """Make each larger root a multiple of the smaller one, for the first equation of each larger root.

        Returns:
            Whether no two equations have the same larger root, so that all of them hold now.
        """
        root_b = np.where(root_a == root_b, ZERO, root_b)  # c·x = d·x with c ≠ d: only x = 0
        upper, lower = np.maximum(root_a, root_b), np.minimum(root_a, root_b)
        equations = len(upper)
        upper, first = np.unique(upper, return_index=True)
        lower, swapped = lower[first], (root_b > root_a)[first]
        over = np.where(swapped, factor_b[first], factor_a[first])
        under = np.where(swapped, factor_a[first], factor_b[first])
        self._root[upper] = self._joined[upper] = lower
        self._factor[upper] = np.where(lower == ZERO, 0.0, under / over)
        for root in upper[lower == ZERO]:
            self._causes[root] = self.cause
        return len(upper) == equations

    def vanish(self, ids: Ids, where: Mask | None = None) -> None:
        """Add the equations x = 0."""
        self.equal(ids, np.zeros((1,) * ids.ndim, np.int64), where=where)

    def add_to_zero(self, parts: Sequence[Part], where: Mask | None = None) -> None:
        """Add the equations Σ_k c_k·x_k = 0, elementwise with broadcasting."""
        if len(parts) == 2:
            (a, first), (b, second) = parts
            self.equal(a, b, -second / first, where)
            return
        rows, coefficients = self._rows(parts, where)
        self._add_rows(rows, coefficients)

    def total(self, parts: Sequence[Part]) -> Ids:
        """Return Σ_k c_k·x_k as unknowns, elementwise with broadcasting; new ones where they are no known unknown."""
        shape = np.broadcast_shapes(*[ids.shape for ids, _ in parts])
        rows, coefficients, back = self._rows(parts, None, return_inverse=True)
        results = np.zeros(len(rows), np.int64)
        count = (rows != ZERO).sum(1)
        column = (rows != ZERO).argmax(1)
        every = np.arange(len(rows))
        plain = (count == 1) & (coefficients[every, column] == 1.0)
        results[plain] = rows[every, column][plain]
        made = np.flatnonzero((count > 0) & ~plain)
        results[made] = self.new((len(made),))
        left, factors = results[made][:, None], np.full((len(made), 1), -1.0)
        self._add_rows(np.hstack([left, rows[made]]), np.hstack([factors, coefficients[made]]))
        summed: Ids = results[back].reshape(shape)
        return summed

    def _rows(self, parts: Sequence[Part], where: Mask | None, return_inverse: bool = False) -> Any:
        """Return the different rows of roots and coefficients of a sum, and optionally the row of each element."""
        resolved = [self.resolve(ids) for ids in selected([ids for ids, _ in parts], where)]
        roots, coefficients = _collected(
            np.stack([root for root, _ in resolved], 1),
            np.stack([c * factor for (_, factor), (_, c) in zip(resolved, parts, strict=True)], 1),
        )
        first, back = _different(roots, coefficients)
        found = roots[first], coefficients[first]
        return (*found, back) if return_inverse else found

    def _add_rows(self, rows: Ids, coefficients: Values) -> None:
        """Add an equation for each row; those with one or two unknowns are solved at once."""
        count = (rows != ZERO).sum(1)
        order = np.argsort(rows == ZERO, axis=1, kind="stable")  # unknowns first
        rows = np.take_along_axis(rows, order, 1)
        coefficients = np.take_along_axis(coefficients, order, 1)
        self.vanish(rows[count == 1, 0])
        two = count == 2
        if two.any():
            self._equal_by_ratio(rows[two, 0], rows[two, 1], -coefficients[two, 1] / coefficients[two, 0])
        if (count > 2).any():
            self.sums.append((rows[count > 2], coefficients[count > 2]))

    def substitute(self) -> None:
        """Replace the unknowns of all sums by their roots, and solve those that have become short."""
        while True:
            sums, self.sums = self.sums, []
            before = self._joined.copy()
            for rows, coefficients in sums:
                roots, factors = self.resolve(rows)
                rows, coefficients = _collected(roots, coefficients * factors)
                first, _ = _different(rows, coefficients)
                self._add_rows(rows[first], coefficients[first])
            self._compare_sums()
            if np.array_equal(before, self._joined):
                return

    def _compare_sums(self) -> None:
        """Solve what pairs of sums say that differ in one unknown: x + y + u = 0 = x + y + v gives u = v.

        A hypernetwork has such sums for each weight that it makes. Afterwards few different ones are left.
        """
        short = [((rows != ZERO).sum(1) == _SHORT, rows, coefficients) for rows, coefficients in self.sums]
        rows = np.concatenate([np.zeros((0, _SHORT), np.int64), *(rows[own, :_SHORT] for own, rows, _ in short)])
        coefficients = np.concatenate([np.zeros((0, _SHORT)), *(values[own, :_SHORT] for own, _, values in short)])
        order = np.argsort(rows, axis=1)
        rows = np.take_along_axis(rows, order, 1)
        coefficients = np.take_along_axis(coefficients, order, 1)
        for last in range(_SHORT if len(rows) else 0):
            a, b = (column for column in range(_SHORT) if column != last)
            ratio = np.round(coefficients[:, b] / coefficients[:, a], _DIGITS)
            first, back = _different(rows[:, [a, b]], ratio[:, None])
            factors = coefficients[:, last] / coefficients[:, a]
            self._equal_by_ratio(rows[:, last], rows[first[back], last], factors[first[back]] / factors)

    def _equal_by_ratio(self, a: Ids, b: Ids, ratios: Values) -> None:
        """Add the equations a = ratio · b for ratios of which there are few different ones."""
        for ratio in np.unique(ratios):
            same = ratios == ratio
            self.equal(a[same], b[same], float(ratio))

    def cause_of_zero(self, ids: Ids) -> Any:
        """Return the cause of the first unknown that is known to be zero; None if there is none."""
        roots, _ = self.resolve(ids)
        zero = ids[roots == ZERO].ravel()
        if not len(zero) or zero[0] == ZERO:
            return None
        current = int(zero[0])
        while self._joined[current] != ZERO:
            current = int(self._joined[current])
        return self._causes[current]

    def roots(self) -> Ids:
        """Return all independent unknowns."""
        every = np.arange(1, self.count, dtype=np.int64)
        found: Ids = every[self._root[every] == every]
        return found


def selected(arrays: Sequence[Ids], where: Mask | None) -> list[Ids]:
    """Return the elements of arrays under a mask, flat, after broadcasting of the arrays.

    Axes along which only the mask varies are left out: an equation holds if any of its elements is selected.
    """
    shape = arrays[0].shape
    if any(array.shape != shape for array in arrays):
        shape = np.broadcast_shapes(*[array.shape for array in arrays])
    flat = [array if array.shape == shape else np.broadcast_to(array, shape) for array in arrays]
    if where is None or where.all():
        return [array.ravel() for array in flat]
    where = where.reshape((1,) * (len(shape) - where.ndim) + where.shape)
    extra = tuple(axis for axis, size in enumerate(shape) if size == 1 and where.shape[axis] > 1)
    mask = np.broadcast_to(where.any(axis=extra, keepdims=True) if extra else where, shape)
    return [array[mask] for array in flat]


def _different(rows: Ids, coefficients: Values) -> tuple[Ids, Ids]:
    """Return the index of the first of each kind of row, and the kind of each row."""
    codes = np.zeros(len(rows), np.int64)
    for column in (*rows.T, *coefficients.T):
        numbers = column
        if column.dtype != np.int64:
            numbers = np.zeros(len(column), np.int64) if (column == column[:1]).all() else _numbered(column)
        codes = _numbered(codes) * (numbers.max(initial=0) + 1) + numbers
    _, first, back = np.unique(codes, return_index=True, return_inverse=True)
    return first, back.ravel()


def _numbered(values: npt.NDArray[Any]) -> Ids:
    """Return small numbers in place of values, the same for equal ones."""
    numbers: Ids = np.unique(values, return_inverse=True)[1].ravel()
    return numbers


def _collected(rows: Ids, coefficients: Values) -> tuple[Ids, Values]:
    """Return rows in which no unknown occurs twice: coefficients of the same unknown are added."""
    rows, coefficients = rows.copy(), coefficients.copy()
    width = rows.shape[1]
    for left in range(width):
        for right in range(left + 1, width):
            same = (rows[:, left] == rows[:, right]) & (rows[:, left] != ZERO)
            coefficients[same, left] += coefficients[same, right]
            rows[same, right] = ZERO
        gone = np.abs(coefficients[:, left]) <= _TOLERANCE
        rows[gone, left] = ZERO
    coefficients[rows == ZERO] = 0.0
    return rows, coefficients
