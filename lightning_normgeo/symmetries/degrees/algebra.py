"""Operations on degrees that add equations between exponents: equality, sums, products, contractions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lightning_normgeo.symmetries.degrees.degree import Degree, FreeConstant
from lightning_normgeo.symmetries.degrees.liveness import any_along
from lightning_normgeo.symmetries.equations.exponents import ZERO, Exponents, Ids, Mask, Part


def tidy(exponents: Exponents, degree: Degree) -> Degree:
    """Return the same degree without terms that are zero, and without axes along which a term is known not to vary."""
    terms = [_shrunk(exponents, term) for term in degree.terms]
    return replace(degree, terms=tuple(term for term in terms if np.any(term != ZERO)))


def _shrunk(exponents: Exponents, term: Ids) -> Ids:
    roots, factors = exponents.resolve(term)
    for axis in range(term.ndim):
        if term.shape[axis] > 1:
            first, factor = roots.take([0], axis), factors.take([0], axis)
            if bool((roots == first).all()) and bool((factors == factor).all()):
                roots, factors, term = first, factor, term.take([0], axis)
    return np.where(factors == 1.0, roots, np.where(roots == ZERO, ZERO, term))


def joint(exponents: Exponents, degree: Degree) -> Ids:
    """Return the degree as one term."""
    if not degree.terms:
        return np.zeros((1,) * len(degree.shape), np.int64)
    if len(degree.terms) == 1:
        return degree.terms[0]
    return exponents.total([(term, 1.0) for term in degree.terms])


def make_zero(exponents: Exponents, degree: Degree, where: Mask | None = None) -> None:
    """Require that the degree of each element is 0."""
    _sum_to_zero(exponents, [(term, 1.0) for term in degree.terms], where)


def make_equal(exponents: Exponents, a: Degree, b: Degree, where: Mask | None = None) -> None:
    """Require that two tensors that are broadcast against each other have the same degree."""
    ndim = max(len(a.shape), len(b.shape))
    a, b = a.lifted(ndim), b.lifted(ndim)
    _sum_to_zero(exponents, [(term, 1.0) for term in a.terms] + [(term, -1.0) for term in b.terms], where)


def _sum_to_zero(exponents: Exponents, parts: Sequence[Part], where: Mask | None) -> None:
    if not parts:
        return
    everywhere = where is None or bool(where.all())
    axes = [axis for axis in range(parts[0][0].ndim) if any(term.shape[axis] > 1 for term, _ in parts)]
    if everywhere and len(axes) > 1 and all(_varying(term) < 2 for term, _ in parts):
        for axis in axes:  # f_i + g_j = 0 for all i, j if it holds for all i at j = 0 and for all j at i = 0
            exponents.add_to_zero([(_line(term, axis), factor) for term, factor in parts])
    else:
        exponents.add_to_zero(parts, where)


def _varying(term: Ids) -> int:
    """Return the number of axes along which a term varies."""
    return sum(size > 1 for size in term.shape)


def _line(term: Ids, axis: int) -> Ids:
    """Return the elements of a term along an axis, at the first index of all other axes."""
    line: Ids = np.moveaxis(term, axis, -1).reshape(-1, term.shape[axis])[0]
    return line


def weighted(exponents: Exponents, degree: Degree, factor: float) -> Degree:
    """Return a multiple of a degree, that of a power."""
    return replace(
        degree.plain(degree.statistic), terms=tuple(exponents.total([(term, factor)]) for term in degree.terms)
    )


def combined(exponents: Exponents, parts: Sequence[tuple[Degree, float]], shape: Sequence[int]) -> Degree:
    """Return the sum of multiples of degrees that are broadcast against each other, that of a product."""
    terms = [
        (term, factor)
        for degree, factor in parts
        for term in degree.plain().lifted(len(shape)).terms
        if np.any(term != ZERO)
    ]
    return Degree(tuple(shape), tuple(_by_footprint(exponents, terms)))


def _by_footprint(exponents: Exponents, terms: Sequence[tuple[Ids, float]]) -> list[Ids]:
    """Return sums of terms: one for each set of axes, and none for a subset of the axes of another."""
    parts: dict[tuple[int, ...], list[tuple[Ids, float]]] = defaultdict(list)
    for term, factor in terms:
        parts[term.shape].append((term, factor))
    for small in sorted(parts, key=np.prod):
        for large in sorted(parts, key=np.prod, reverse=True):
            if small != large and all(a in (1, b) for a, b in zip(small, large, strict=True)):
                parts[large] += parts.pop(small)
                break
    return [
        shared[0][0] if len(shared) == 1 and shared[0][1] == 1.0 else exponents.total(shared)
        for shared in parts.values()
    ]


def constant_along(exponents: Exponents, degree: Degree, axes: Sequence[int], where: Mask | None = None) -> Degree:
    """Require that degrees do not vary along some axes, as in a sum over them, and return them with size 1 there.

    Args:
        exponents: receives the equations.
        degree: of the tensor.
        axes: axes that are summed over.
        where: elements that matter, broadcastable. Default: all.
    """
    for axis in axes:
        degree = _constant_along(exponents, degree, axis, where)
    return degree


def _constant_along(exponents: Exponents, degree: Degree, axis: int, where: Mask | None) -> Degree:
    varying = [term for term in degree.terms if term.shape[axis] > 1]
    terms = [term for term in degree.terms if term.shape[axis] == 1]
    if varying and _can_choose(degree, varying, axis):
        degree.constant.use()  # type: ignore[union-attr]
        if len(varying) == 1:
            exponents.vanish(varying[0])
        else:
            exponents.add_to_zero([(term, 1.0) for term in varying])
    elif varying:
        whole = varying[0] if len(varying) == 1 else exponents.total([(term, 1.0) for term in varying])
        first = whole.take([0], axis) if where is None or where.all() else _first_selected(whole, where, axis)
        exponents.equal(whole, first, where=where)
        terms.append(first)
    shape = list(degree.shape)
    shape[axis] = 1
    return tidy(exponents, degree.over(shape, terms))


def _can_choose(degree: Degree, varying: Sequence[Ids], axis: int) -> bool:
    """Whether the free constant can be chosen so that the sum of the terms that vary along an axis is zero."""
    constant = degree.constant
    if constant is None or not constant.unused:
        return False
    allowed = constant.axes | {axis}
    return all(term.shape[d] == 1 or d in allowed for term in varying for d in range(term.ndim))


def contracted(
    exponents: Exponents, a: tuple[Degree, str], b: tuple[Degree, str], result: str, where: Mask | None = None
) -> Degree:
    """Return the degree of a sum of products of two tensors, as in ``einsum``.

    Args:
        exponents: receives the equations.
        a: degree of the first tensor, and a letter for each axis.
        b: degree of the second tensor, and a letter for each axis.
        result: letters of the axes of the result; the others are summed over.
        where: elements of the result that matter. Default: all.
    """
    letters = result + "".join(dict.fromkeys(letter for letter in a[1] + b[1] if letter not in result))
    sizes: dict[str, int] = {}
    for degree, own in (a, b):
        for letter, size in zip(own, degree.shape, strict=True):
            sizes[letter] = max(sizes.get(letter, 1), size)
    one, other = (_arranged(degree, own, letters) for degree, own in (a, b))
    constant = _one_constant(other.constant, one.constant)
    whole = Degree(tuple(sizes[letter] for letter in letters), (*one.terms, *other.terms), constant)
    summed = range(len(result), len(letters))
    if where is not None:
        where = where.reshape(where.shape + (1,) * len(summed))
    whole = constant_along(exponents, whole, summed, where)
    shape = whole.shape[: len(result)]
    terms = [(term.reshape(term.shape[: len(result)]), 1.0) for term in whole.terms]
    return Degree(shape, tuple(_by_footprint(exponents, terms)))


def _one_constant(first: FreeConstant | None, second: FreeConstant | None) -> FreeConstant | None:
    """Return a constant that the product of two tensors can choose; the other one is fixed."""
    if first is None or not first.unused:
        return second
    if second is not None:
        second.fix()  # if both are the same, the sum p_k + q_k of a square does not depend on it
    return first


def _arranged(degree: Degree, own: str, letters: str) -> Degree:
    """Return a degree with one axis per letter, of size 1 for letters that it does not have."""
    present = sorted(range(len(own)), key=lambda axis: letters.index(own[axis]))
    ordered = degree.permuted(present)
    places = [letters.index(own[axis]) for axis in present]
    shape = [1] * len(letters)
    for axis, place in enumerate(places):
        shape[place] = ordered.shape[axis]
    terms = []
    for term in ordered.terms:
        size = [1] * len(letters)
        for axis, place in enumerate(places):
            size[place] = term.shape[axis]
        terms.append(term.reshape(size))
    constant = ordered.constant
    if constant is not None:
        constant = constant.along(frozenset(places[axis] for axis in constant.axes))
    return Degree(tuple(shape), tuple(terms), constant)


def _first_selected(whole: Ids, where: Mask, axis: int) -> Ids:
    """Return the first element along an axis that matters, for each index of the other axes."""
    mask = np.broadcast_to(where, np.broadcast_shapes(where.shape, whole.shape))
    extra = tuple(d for d in range(whole.ndim) if whole.shape[d] == 1)
    mask = any_along(mask, extra)
    position = np.broadcast_to(mask, whole.shape).argmax(axis=axis, keepdims=True)
    return np.take_along_axis(whole, position, axis)
