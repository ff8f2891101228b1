"""Degrees of homogeneity of the elements of a tensor, as sums of few unknown exponents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np

from lightning_normgeo.symmetries.equations.exponents import Exponents, Ids


class FreeConstant:
    """The freedom in an outer sum p_i + q_j: p + c and q − c give the same degrees.

    Only copies of a parameter have one. The first operation on them that is no copy either chooses c so that its own
    equation becomes simple, or sets it to any value; so no other degree contains a constant that is still free.

    Attributes:
        axes: axes of the tensor with a constant c for each index; usually none.
    """

    def __init__(self, exponents: Exponents, some: Ids, axes: frozenset[int] = frozenset()) -> None:
        """Create a constant that is not fixed yet; ``some`` are the unknowns that may be set to zero to fix it."""
        self.axes = axes
        self._exponents = exponents
        self._some = [some]

    @property
    def unused(self) -> bool:
        """Whether no equation has fixed the constant yet."""
        return bool(self._some)

    def use(self) -> None:
        """Note that an equation fixes the constant, for all tensors that have it."""
        self._some.clear()

    def fix(self) -> None:
        """Give the constant some value if it has none yet."""
        if self._some:
            self._exponents.vanish(self._some.pop())

    def along(self, axes: frozenset[int]) -> FreeConstant:
        """Return the same constant for a tensor with other axes."""
        moved = FreeConstant(self._exponents, np.zeros(0, np.int64), axes)
        moved._some = self._some
        return moved


@dataclass(frozen=True)
class Degree:
    r"""The degree d of each element of a tensor: under the symmetry it is multiplied by :math:`e^{t d}`.

    Attributes:
        shape: shape of the tensor.
        terms: unknowns whose sum is the degree. Each array has as many dimensions as the tensor, and size 1 along axes
            on which it does not depend. Without terms the degree is 0.
        constant: freedom in the terms of a parameter, until an operation uses it.
        statistic: whether the tensor is a reduction, such as a variance or a norm, to which an ε may be added.
    """

    shape: tuple[int, ...]
    terms: tuple[Ids, ...] = ()
    constant: FreeConstant | None = None
    statistic: bool = False

    def over(self, shape: Sequence[int], terms: Sequence[Ids]) -> Degree:
        """Return the degree of another tensor with other terms, a copy of elements of this one."""
        return Degree(tuple(shape), tuple(terms), self.constant, self.statistic)

    def plain(self, statistic: bool = False) -> Degree:
        """Return the same degree with a fixed constant."""
        if self.constant is not None:
            self.constant.fix()
        return Degree(self.shape, self.terms, None, statistic)

    def lifted(self, ndim: int) -> Degree:
        """Return the degree with axes of size 1 in front, for broadcasting."""
        front = (1,) * (ndim - len(self.shape))
        if not front:
            return self
        return replace(
            self,
            shape=front + self.shape,
            terms=tuple(term.reshape(front + term.shape) for term in self.terms),
            constant=self.constant and self.constant.along(frozenset(axis + len(front) for axis in self.constant.axes)),
        )

    def permuted(self, order: Sequence[int]) -> Degree:
        """Return the degree after an exchange of axes: new axis k is the old axis ``order[k]``."""
        moved = self.over([self.shape[d] for d in order], [term.transpose(order) for term in self.terms])
        if self.constant is None or not self.constant.axes:
            return moved
        return replace(moved, constant=self.constant.along(frozenset(order.index(axis) for axis in self.constant.axes)))

    def viewed(self, shape: Sequence[int]) -> Degree:
        """Return the degree after a change of the shape that keeps the order of elements."""
        moved = self.over(shape, [viewed(term, self.shape, shape) for term in self.terms])
        merged = any(sum(term.shape[axis] > 1 for term in moved.terms) > 1 for axis in range(len(moved.shape)))
        return moved.plain(self.statistic) if merged or (self.constant and self.constant.axes) else moved

    def taken(self, axis: int, indices: Sequence[int] | Ids, keep: bool = True) -> Degree:
        """Return the degree of elements picked along an axis; without ``keep`` of one element, without the axis."""
        terms = [term.take(indices, axis) if term.shape[axis] > 1 else term for term in self.terms]
        shape = list(self.shape)
        if keep:
            shape[axis] = len(indices)
        else:
            del shape[axis]
            terms = [np.asarray(term.take(0, axis)) for term in terms]
        picked = self.over(shape, terms)
        axes = self.constant.axes if self.constant else frozenset()
        return picked.plain(self.statistic) if axis in axes or (axes and not keep) else picked


def viewed(array: Ids, old: Sequence[int], new: Sequence[int]) -> Ids:
    """Return an array that broadcasts to the shape ``old`` as one that broadcasts to ``new``, in the same order."""
    expanded, shape = list(array.shape), []
    for before, after in joint_axes(old, new):
        if any(array.shape[axis] > 1 for axis in before):
            for axis in before:
                expanded[axis] = old[axis]
            shape += [new[axis] for axis in after]
        else:
            shape += [1] * len(after)
    result: Ids = np.broadcast_to(array, expanded).reshape(shape)
    return result


def joint_axes(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the smallest sets of neighboring axes of two shapes that hold the same number of elements."""
    found, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        before, after = list(range(i, min(i + 1, len(old)))), list(range(j, min(j + 1, len(new))))
        i, j = i + len(before), j + len(after)
        while (left := prod(old[d] for d in before)) != (right := prod(new[d] for d in after)):
            if left < right:
                before.append(i)
                i += 1
            else:
                after.append(j)
                j += 1
        found.append((before, after))
    return found
