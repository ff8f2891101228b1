"""Choice of solutions with entries of one sign, where a basis has others."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array, vstack

from lightning_normgeo.symmetries.equations.exponents import Ids, Values

_TOLERANCE = 1e-9
_TRIED = 8


def with_few_signs(basis: csr_array, columns: Ids) -> csr_array:
    """Return a basis of the same solutions in which more of them have no negative entry.

    A stream of a network that ends in a normalization can be scaled alone, or against readers whose scales are removed
    as well; the first one is the simpler statement. A solution of both signs is replaced by its sum with positive ones
    if that is positive and has no more entries.

    Args:
        basis: solutions of shape (solutions, unknowns).
        columns: the unknowns whose signs count, each as often as it occurs.

    Cost: one look at all entries; some operations of numpy for each solution that may be replaced.
    """
    signed = basis[:, columns].tocsr()
    signed.eliminate_zeros()
    positive, negative = _rows_with(signed, 1), _rows_with(signed, -1)
    one_sign = positive ^ negative
    by_column = abs(signed[np.flatnonzero(one_sign)]).tocsc()
    sources, reached = np.flatnonzero(one_sign), np.diff(by_column.indptr) > 0
    replaced: dict[int, csr_array] = {}
    for row in np.flatnonzero(positive & negative & _within_reach(signed, reached)):
        for sign in (1.0, -1.0):
            added = _made_positive(signed, int(row), sign, by_column, sources)
            if added is not None:
                replaced[int(row)] = sum((basis[[k]] * factor for k, factor in added), basis[[row]] * sign)
                break
    if not replaced:
        return basis
    kept = np.setdiff1d(np.arange(basis.shape[0]), list(replaced))
    order = np.argsort(np.concatenate([kept, list(replaced)]), kind="stable")
    return vstack([basis[kept], *replaced.values()], format="csr")[order]


def _rows_with(matrix: csr_array, sign: int) -> npt.NDArray[np.bool_]:
    """Return a flag for each row: whether it has an entry of a sign."""
    counts = np.concatenate([[0], np.cumsum(matrix.data * sign > 0)])
    return np.asarray(counts[matrix.indptr[1:]] > counts[matrix.indptr[:-1]])


def _within_reach(matrix: csr_array, reached: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the rows whose entries of one sign are all in columns of solutions of one sign."""
    result = np.zeros(matrix.shape[0], bool)
    for sign in (1, -1):
        outside = (matrix.data * sign > 0) & ~reached[matrix.indices]
        counts = np.concatenate([[0], np.cumsum(outside)])
        result |= counts[matrix.indptr[1:]] == counts[matrix.indptr[:-1]]
    return result


def _made_positive(
    matrix: csr_array, row: int, sign: float, by_column: csr_array, sources: Ids
) -> list[tuple[int, float]] | None:
    """Return rows of one sign and factors with which they have to be added to a row to make it positive."""
    columns, values = _entries(matrix, row)
    values = values * sign
    added = []
    while values.min(initial=0.0) < -_TOLERANCE:
        column = int(columns[values.argmin()])
        for place in range(*by_column.indptr[column : column + 2])[:_TRIED]:
            other = int(sources[by_column.indices[place]])
            size = int(matrix.indptr[other + 1] - matrix.indptr[other])
            if size > 2 * len(columns):
                continue  # cannot become shorter
            more, entries = _entries(matrix, other)
            factor = -float(values.min()) / float(entries[more == column][0])
            summed = _sum(columns, values, more, entries * factor)
            if len(summed[0]) <= len(columns) and (summed[1] < 0).sum() < (values < 0).sum():
                columns, values = summed
                added.append((other, factor))
                break
        else:
            return None
    return added


def _entries(matrix: csr_array, row: int) -> tuple[Ids, Values]:
    where = slice(matrix.indptr[row], matrix.indptr[row + 1])
    return matrix.indices[where], matrix.data[where]


def _sum(columns: Ids, values: Values, more: Ids, others: Values) -> tuple[Ids, Values]:
    """Return the sum of two sparse rows."""
    both, places = np.unique(np.concatenate([columns, more]), return_inverse=True)
    total: Values = np.bincount(places.ravel(), np.concatenate([values, others])).astype(np.float64)
    kept = np.abs(total) > _TOLERANCE
    return both[kept], total[kept]
