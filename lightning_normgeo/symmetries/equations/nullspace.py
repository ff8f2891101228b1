"""Solutions of homogeneous linear equations in rational numbers, with few nonzero entries each."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from lightning_normgeo.symmetries.equations.exponents import ZERO, Exponents, Ids, Values

Rational = int | Fraction
Equation = dict[int, Rational]
"""Coefficients by unknown; their sum over the unknowns is zero."""
_LARGEST_DENOMINATOR = 10**6


def solution(exponents: Exponents) -> csr_array:
    """Return a basis of all solutions, as a matrix of shape (solutions, unknowns).

    Each independent unknown that is in no equation is a solution alone. The others are found by Gaussian elimination in
    exact fractions, separately for each set of equations that share unknowns.

    Cost: linear in the number of equations, except within such a set.
    """
    exponents.substitute()
    equations = list(_equations(exponents.sums))
    bound = np.unique([unknown for equation in equations for unknown in equation]).astype(np.int64)
    free = np.setdiff1d(exponents.roots(), bound, assume_unique=True)
    solutions: list[Equation] = [{int(unknown): 1} for unknown in free]
    for part in _independent_parts(equations):
        solutions += nullspace(part)
    return _expanded(exponents, solutions)


def _equations(sums: Sequence[tuple[Ids, Values]]) -> Iterator[Equation]:
    """Yield the different equations with rational coefficients, the first of which is 1."""
    seen = set()
    for rows, coefficients in sums:
        for row, values in zip(rows.tolist(), coefficients.tolist(), strict=True):
            terms = sorted((unknown, value) for unknown, value in zip(row, values, strict=True) if unknown != ZERO)
            key = tuple((unknown, round(value / terms[0][1], 9)) for unknown, value in terms)
            if key not in seen:
                seen.add(key)
                yield {unknown: _rational(value / terms[0][1]) for unknown, value in terms}


@lru_cache(maxsize=1024)
def _rational(value: float) -> Rational:
    return _short(Fraction(value).limit_denominator(_LARGEST_DENOMINATOR))


def _short(value: Fraction) -> Rational:
    """Return a fraction as an integer if it is one, which is much faster to compute with."""
    return value.numerator if value.denominator == 1 else value


def _quotient(a: Rational, b: Rational) -> Rational:
    if b in (1, -1):
        return a * b
    return _short(Fraction(a) / b)


def _independent_parts(equations: Sequence[Equation]) -> Iterator[list[Equation]]:
    """Yield sets of equations that have no unknown in common."""
    if not equations:
        return
    numbers = {unknown: k for k, unknown in enumerate(sorted({u for equation in equations for u in equation}))}
    rows = [k for k, equation in enumerate(equations) for _ in equation]
    columns = [len(equations) + numbers[unknown] for equation in equations for unknown in equation]
    size = len(equations) + len(numbers)
    _, labels = connected_components(csr_array((np.ones(len(rows)), (rows, columns)), shape=(size, size)), False)
    parts: dict[int, list[Equation]] = defaultdict(list)
    for equation, label in zip(equations, labels, strict=False):
        parts[label].append(equation)
    yield from parts.values()


def nullspace(equations: Sequence[Equation]) -> list[Equation]:
    """Return a basis of the solutions of a few equations, one for each unknown that stays free.

    Gaussian elimination that begins with the shortest equation, and solves it for the unknown that is in the fewest
    others (Markowitz 1957), which keeps equations and solutions short.
    """
    pivots = _eliminated([dict(equation) for equation in equations])
    unknowns = sorted({unknown for equation in equations for unknown in equation})
    free = [unknown for unknown in unknowns if unknown not in pivots]
    values: dict[int, Equation] = {unknown: {unknown: 1} for unknown in free}
    for pivot in reversed(pivots):  # an equation contains only pivots that were found after it
        value: Equation = defaultdict(int)
        for unknown, coefficient in pivots[pivot].items():
            for parameter, factor in values[unknown].items():
                value[parameter] += coefficient * factor
        values[pivot] = {parameter: factor for parameter, factor in value.items() if factor}
    solutions: dict[int, Equation] = {parameter: {} for parameter in free}
    for unknown, value in values.items():
        for parameter, factor in value.items():
            solutions[parameter][unknown] = factor
    return list(solutions.values())


def _eliminated(equations: list[Equation]) -> dict[int, Equation]:
    """Return for each pivot, in the order of elimination, the combination of other unknowns that it equals."""
    users: dict[int, set[int]] = defaultdict(set)
    for k, equation in enumerate(equations):
        for unknown in equation:
            users[unknown].add(k)
    queue = [(len(equation), k) for k, equation in enumerate(equations)]
    heapq.heapify(queue)
    pivots: dict[int, Equation] = {}
    done: set[int] = set()
    while queue:
        length, k = heapq.heappop(queue)
        equation = equations[k]
        if k in done or not equation or len(equation) != length:
            continue  # an equation that became shorter is in the queue again
        pivot = min(equation, key=lambda unknown: (len(users[unknown]), -unknown))  # rather a sum than its parts
        done.add(k)
        for unknown in equation:
            users[unknown].discard(k)
        divisor = -equation[pivot]
        pivots[pivot] = {u: _quotient(c, divisor) for u, c in equation.items() if u != pivot}
        for other in list(users.pop(pivot)):
            _replace(equations[other], pivot, pivots[pivot], users, other)
            heapq.heappush(queue, (len(equations[other]), other))
    return pivots


def _replace(equation: Equation, pivot: int, value: Equation, users: dict[int, set[int]], number: int) -> None:
    """Replace a pivot in an equation by its value."""
    factor = equation.pop(pivot)
    for unknown, coefficient in value.items():
        total = equation.get(unknown, 0) + factor * coefficient
        if total:
            equation[unknown] = total
            users[unknown].add(number)
        else:
            equation.pop(unknown, None)
            users[unknown].discard(number)


def _expanded(exponents: Exponents, solutions: Sequence[Equation]) -> csr_array:
    """Return solutions in terms of the roots as a matrix over all unknowns."""
    rows = [k for k, found in enumerate(solutions) for _ in found]
    columns = [unknown for found in solutions for unknown in found]
    values = [float(value) for found in solutions for value in found.values()]
    every = np.arange(exponents.count)
    roots, factors = exponents.resolve(every)
    by_root = csr_array((values, (rows, columns)), shape=(len(solutions), exponents.count))
    to_all = csr_array((factors, (roots, every)), shape=(exponents.count, exponents.count))
    return (by_root @ to_all).tocsr()
