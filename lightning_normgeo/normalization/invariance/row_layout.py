"""Where the rows of a weight are in the tensors computed from it, followed through reshapes without running anything.

A row index is written in mixed radix: a *piece* (size, stride) of an axis is the digit (row // stride) % size of the
row, or, with stride 0, nothing of it. Convolution outputs have one piece (rows, 1) on the channel axis; a group
normalization splits it into (groups, rows/groups) and (rows/groups, 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """Part of an axis: ``size`` consecutive steps that move the row by ``stride`` each; stride 0: not at all."""

    size: int
    stride: int


class Axis(NamedTuple):
    """One dimension of a tensor.

    Attributes:
        size: its length.
        pieces: most significant first.
        cut: the slice, index or concatenation (a node and its output) that left some rows of the pieces out, put them
            in another order, or put other things next to them; None where there are exactly the rows of the pieces.
            Which row an entry belongs to is then known to nobody, and the pieces only tell axes of one cut apart.
    """

    size: int
    pieces: tuple[Piece, ...]
    cut: Any = None

    @property
    def digits(self) -> tuple[Piece, ...]:
        """The pieces that say something about the row."""
        return tuple(piece for piece in self.pieces if piece.stride)


@dataclass(frozen=True)
class ScaleState:
    """A tensor that is positively homogeneous in the rows of a weight.

    Multiplying row i by α multiplies the elements that belong to it by α to the power of ``degree``.

    Attributes:
        axes: one entry per dimension.
        degree: the power.
        offset: the axis along which an added constant varies that is not scaled (a bias), or None.
        data: whether the data has come in, as it does in the linear map that the weight is for.
        statistic: whether it was taken over some axes, as what a normalization divides by.
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
        """Return the same with other axes."""
        return replace(self, axes=tuple(axes))


def plain(size: int) -> Axis:
    """Return an axis along which the row does not change."""
    return Axis(size, (Piece(size, 0),))


def rows(size: int, stride: int = 1) -> Axis:
    """Return an axis that enumerates rows."""
    return Axis(size, (Piece(size, stride),))


def picked(size: int, stride: int, cut: Any) -> Axis:
    """Return an axis of rows that were picked by an index: ``size`` entries, told apart by ``stride``."""
    return Axis(size, (Piece(size, stride),), cut)


def split(axis: Axis, high: int) -> tuple[tuple[Piece, ...], tuple[Piece, ...]] | None:
    """Split the pieces of an axis into the first ``high`` steps and the rest; None where a piece does not divide."""
    taken: list[Piece] = []
    left = list(axis.pieces)
    while prod(piece.size for piece in taken) < high:
        need = high // prod(piece.size for piece in taken)
        size, stride = left.pop(0)
        if need % size == 0:
            taken.append(Piece(size, stride))
        elif size % need == 0:
            taken.append(Piece(need, stride * (size // need)))
            left.insert(0, Piece(size // need, stride))
        else:
            return None
    return tuple(taken), tuple(left)


def fused(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Return the pieces with neighbours joined that count on from each other."""
    found: list[Piece] = []
    for size, stride in pieces:
        if size == 1:
            continue
        if found and found[-1].stride == stride * size:
            size *= found.pop().size
        found.append(Piece(size, stride))
    return tuple(found) or tuple(pieces[:1])


def regroup(axes: Sequence[Axis], shape: Sequence[int]) -> tuple[Axis, ...] | None:
    """Return the axes after a view with another shape; None where rows cannot be followed through it."""
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
            # two axes of one cut stay the same entries side by side; parts of an axis would not
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
    padded = [plain(1)] * (len(shape) - len(a)) + list(a)
    return tuple(
        axis if axis.size == size else plain(size)._replace(cut=axis.cut)
        for axis, size in zip(padded, shape, strict=True)
    )


def contiguous_units(merged: set[Piece], rows: int) -> int | None:
    """Return the number of units, if rows that differ in the merged digits belong together.

    Args:
        merged: digits over which rows were brought together.
        rows: how many rows there are.

    Returns:
        The number of units of equally many consecutive rows, or None where rows of a unit are not consecutive.
    """
    together = 1
    for size, stride in sorted(merged, key=lambda piece: piece.stride):
        if stride > together:
            return None
        together = lcm(together, stride * size)
    return rows // together if rows % together == 0 else None
