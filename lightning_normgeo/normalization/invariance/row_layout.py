"""Layout of the rows of a weight in the tensors computed from it, followed through reshapes without running anything.

The question is to which row of the weight each element of such a tensor belongs. The answer is kept per axis, with the
row index written in mixed radix: a *piece* (size, stride) of an axis is the digit (row // stride) % size of the row
index. A piece with stride 0 is not a digit: the row does not change along it.

Example: the output of a convolution with 64 filters has the single piece (64, 1) on its channel axis. A group
normalization with 32 groups splits it into (32, 2), the group, and (2, 1), the filter within the group.

Digits are enough because a view never reorders elements: it splits an axis into digits or joins neighboring axes,
while permutations only exchange axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """Part of an axis: ``size`` consecutive positions, each of which advances the row index by ``stride``."""

    size: int
    stride: int


class Axis(NamedTuple):
    """One dimension of a tensor, and the rows along it.

    Attributes:
        size: length of the axis.
        pieces: the digits of the row index along it, most significant first.
        cut: the operation (a node and its output) that dropped or reordered rows along this axis, or put other
            elements next to them, such as a slice, an index or a concatenation; None if the pieces describe the axis
            exactly. After a cut it is unknown which row an element belongs to. The pieces then only serve to recognize
            that two axes come from the same cut.
    """

    size: int
    pieces: tuple[Piece, ...]
    cut: Any = None

    @property
    def digits(self) -> tuple[Piece, ...]:
        """The pieces along which the row changes."""
        return tuple(piece for piece in self.pieces if piece.stride)


@dataclass(frozen=True)
class ScaleState:
    """The dependence of a tensor on the scale of the rows of a weight: positively homogeneous of some degree.

    Multiplying row i by α > 0 multiplies the elements that belong to row i by α to the power of ``degree``.

    Attributes:
        axes: the layout of the rows, one entry per dimension.
        degree: degree of homogeneity.
        offset: axis along which an added constant (a bias) varies that does not scale with the weight; None if no
            constant was added.
        data: whether the tensor depends on the data, as it does behind the linear map that uses the weight. False for
            tensors computed from weights only.
        statistic: whether the tensor is a reduction over some axes, such as the deviation that a normalization divides
            by. An ε may be added to it.
    """

    axes: tuple[Axis, ...]
    degree: float = 1.0
    offset: int | None = None
    data: bool = False
    statistic: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        return tuple(axis.size for axis in self.axes)

    def over(self, axes: Sequence[Axis]) -> ScaleState:
        """Return the same state with other axes."""
        return replace(self, axes=tuple(axes))


def plain_axis(size: int) -> Axis:
    """Return an axis along which the row does not change, such as the batch."""
    return Axis(size, (Piece(size, 0),))


def rows(size: int, stride: int = 1) -> Axis:
    """Return an axis along which every position is another row, each ``stride`` rows behind the one before."""
    return Axis(size, (Piece(size, stride),))


def picked(size: int, stride: int, cut: Any) -> Axis:
    """Return an axis of ``size`` rows that an index has picked; ``stride`` distinguishes it from other such axes."""
    return Axis(size, (Piece(size, stride),), cut)


def split(axis: Axis, high: int) -> tuple[tuple[Piece, ...], tuple[Piece, ...]] | None:
    """Split the pieces of an axis for a view as (``high``, rest); None if a boundary falls inside a digit.

    Args:
        axis: to be split.
        high: length of the first of the two new axes.

    Returns:
        The pieces of both axes.
    """
    taken: list[Piece] = []
    left = list(axis.pieces)
    while prod(piece.size for piece in taken) < high:
        need = high // prod(piece.size for piece in taken)
        size, stride = left.pop(0)
        if need % size == 0:
            taken.append(Piece(size, stride))
        elif size % need == 0:
            # row-major order: one step of the more significant digit skips all positions of the less significant one
            taken.append(Piece(need, stride * (size // need)))
            left.insert(0, Piece(size // need, stride))
        else:
            return None  # as in a view of (6, 4) as (4, 6): no digit of 6 rows has 4 values
    return tuple(taken), tuple(left)


def fused(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Return the pieces in canonical form, which is equal for equal layouts, however views split and joined them."""
    found: list[Piece] = []
    for size, stride in pieces:
        if size == 1:
            continue  # a digit with one value says nothing about the row
        # Two digits are one if the more significant advances by as many rows as the less significant spans. Two pieces
        # with stride 0 are joined by the same rule.
        if found and found[-1].stride == stride * size:
            size *= found.pop().size
        found.append(Piece(size, stride))
    return tuple(found) or tuple(pieces[:1])  # an axis of length 1 keeps a piece, since no axis is without any


def regroup(axes: Sequence[Axis], shape: Sequence[int]) -> tuple[Axis, ...] | None:
    """Return the axes after a view with another shape; None if the rows cannot be followed through it.

    Both shapes enumerate the same elements in row-major order. So the old axes are consumed from the left, and each new
    axis takes whole old axes or the more significant part of one.
    """
    # Axes of length 1 are dropped, since a view may insert and remove them anywhere. One with a cut must not be
    # dropped: it is one of several rows, and the cut is the only trace of that.
    if any(axis.cut and axis.size == 1 for axis in axes):
        return None
    left = [axis for axis in axes if axis.size != 1]
    found = []
    for size in shape:
        pieces: tuple[Piece, ...] = ()
        cut, taken = None, 1
        while taken < size:
            if not left or size % taken:
                return None
            axis, need = left.pop(0), size // taken
            # Axes of one and the same cut may be joined: together they still hold all its elements in order. An axis
            # with a cut cannot be split, since the position of a row along it is unknown, nor joined with another cut.
            if axis.cut and (axis.size > need or (cut and cut != axis.cut)):
                return None
            cut = cut or axis.cut
            if axis.size <= need:
                pieces, taken = pieces + axis.pieces, taken * axis.size
                continue
            parts = split(axis, need)
            if parts is None:
                return None
            pieces, taken = pieces + parts[0], taken * need
            left.insert(0, Axis(axis.size // need, parts[1]))
        if taken != size:
            return None
        found.append(Axis(size, fused(pieces), cut))
    return tuple(found) if not left else None


def broadcast(a: Sequence[Axis], shape: Sequence[int]) -> tuple[Axis, ...]:
    """Return the axes of a tensor broadcast to ``shape``."""
    padded = [plain_axis(1)] * (len(shape) - len(a)) + list(a)  # torch aligns shapes at their last dimension
    return tuple(
        # a repeated axis holds one row throughout; if it was cut out of several, that is still to be remembered
        axis if axis.size == size else plain_axis(size)._replace(cut=axis.cut)
        for axis, size in zip(padded, shape, strict=True)
    )


def contiguous_units(merged: set[Piece], rows: int) -> int | None:
    """Return the number of units, where rows that differ only in a merged digit belong to the same unit.

    Args:
        merged: digits over which rows were merged.
        rows: number of rows.

    Returns:
        The number of units, each of equally many consecutive rows; None if the rows of a unit are not consecutive.
    """
    together = 1  # rows 0 to together - 1 are one unit, and so are the blocks of this length behind them
    # Least significant digit first. The digit (size, stride) joins the rows r, r + stride, r + 2 stride, ... within a
    # block of stride * size rows.
    for size, stride in sorted(merged, key=lambda piece: piece.stride):
        # r and r + stride are joined without the rows between them, as c, c + C/g, ... are after a channel shuffle
        if stride > together:
            return None
        # digits of several paths may overlap: blocks of 4 and blocks of 6 rows are linked up to blocks of 12
        together = lcm(together, stride * size)
    return rows // together if rows % together == 0 else None
