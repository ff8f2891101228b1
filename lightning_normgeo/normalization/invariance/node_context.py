"""What the rules have in common: one autograd node as a rule sees it, and what ends the search.

Scaling the rows of a weight is followed through all that is computed from it, until a normalization absorbs the scale.
A rule takes the states of a node's inputs (None for what does not depend on the weight, or does not change with its
scale) and returns the state of its output, or None. A node without a rule, and a sum with something that is not
scaled, end the search with a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_normgeo.normalization.autograd.graph import Graph, Node
from lightning_normgeo.normalization.invariance.row_layout import (
    Axis,
    Piece,
    ScaleState,
    broadcast,
    fused,
    plain,
    split,
)

Operands = list[ScaleState | None]
_MOVES = {"View", "ReshapeAlias", "UnsafeView", "Unsqueeze", "Squeeze", "Expand", "ToCopy", "Clone"}


UNKNOWN_CONSTANT = "that the graph does not show to be zero"
"""Part of the reason why a weight has no units that a constant decides about: ``ZeroConstants`` would tell."""


class NotInvariantError(Exception):
    """The loss depends on the scale of the weight, or may; the text says why."""


class BiasNotScaledError(NotInvariantError):
    """A bias that is added is not scaled with the weight; scaling both together may do."""


@dataclass
class NodeContext:
    """One node as a rule sees it, and what is collected on the way.

    Attributes:
        graph: the graph it is in.
        node: the autograd node.
        output: which of its outputs is asked for.
        operands: states of its inputs.
        merged: digits over which rows had to be brought together so far.
        absorbers: normalizations that were reached, with the state that went in.
    """

    graph: Graph
    node: Node
    output: int
    operands: Operands
    merged: set[Piece]
    absorbers: list[tuple[Node, ScaleState]]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return shape_of(self.node, self.output)

    def consumers(self) -> list[tuple[Node, int]]:
        """Return what computes with the output, seen through reshapes and copies, and at which position."""
        found, stack = [], list(self.graph.readers[self.node, self.output])
        while stack:
            reader, position = stack.pop()
            if name_of(reader) in _MOVES:
                stack += self.graph.readers[reader, 0]
            else:
                found.append((reader, position))
        return found

    def joined(self, left: Axis, right: Axis) -> Axis:
        """Return an axis of what two tensors are combined to; rows that meet are brought together."""
        same = fused(left.pieces) == fused(right.pieces)
        if left.cut != right.cut or (left.cut and not same):
            raise NotInvariantError("combined with other outputs")
        if same:
            return left
        self.merge([left, right])
        return plain(left.size)

    def combined(self, a: ScaleState, b: ScaleState, degree: float) -> ScaleState:
        """Return the state of an elementwise function of two tensors that both scale."""
        axes = map(self.joined, broadcast(a.axes, self.shape), broadcast(b.axes, self.shape))
        return ScaleState(tuple(axes), degree, None, a.data or b.data, a.statistic and b.statistic)

    def alike(self, a: ScaleState, b: ScaleState) -> ScaleState:
        """Return the state of a function of two tensors that is homogeneous in both jointly: a sum, a maximum."""
        if a.degree != b.degree or a.offset is not None or b.offset is not None:
            raise NotInvariantError("two uses of it that scale in different ways are added up or compared")
        return self.combined(a, b, a.degree)

    def beside_zeros(self) -> bool:
        """Whether all that does not scale here is known to be zero."""
        edges = zip(self.node.next_functions, self.operands, strict=True)
        constant = all(source is None for (source, _), operand in edges if operand is None)
        return constant and self.node in self.graph.zeros

    def merge(self, axes: Sequence[Axis] | Sequence[Piece]) -> None:
        """Bring together the rows along axes or pieces: they only make sense scaled by a common factor."""
        for entry in axes:
            self.merged.update(entry.digits if isinstance(entry, Axis) else [entry] if entry.stride else [])

    def reduce(self, axes: Sequence[Axis]) -> None:
        """Bring together the rows along axes that are summed over or normalized over."""
        if any(axis.cut for axis in axes):
            raise NotInvariantError("summed or normalized together with other outputs (a concatenation)")
        self.merge(axes)

    def absorb(self, state: ScaleState, kept: Sequence[int], groups: int = 1, centers: bool = True) -> None:
        """End a path at a normalization whose statistics are taken for each index of the axes ``kept``.

        With ``groups``, axis 1 is split and its first part kept. One that ``centers`` removes a constant bias too.
        """
        constant = set(kept)  # axes along which a bias may vary and yet be centered away
        if groups > 1:
            constant |= {1} if groups == state.shape[1] else set()
            parts = None if state.axes[1].cut else split(state.axes[1], groups)
            if parts is None:
                raise NotInvariantError("normalized together with other outputs, in groups")
            self.merge(parts[1])
        self.reduce([axis for d, axis in enumerate(state.axes) if d not in kept and (d != 1 or groups == 1)])
        if state.offset is not None and not (centers and state.offset in constant):
            raise BiasNotScaledError("a bias is added before the normalization")
        self.absorbers.append((self.node, state))


def dimensions(saved: Any, ndim: int) -> list[int]:
    """Return dimensions as autograd saves them (None or () for all; negative ones as unsigned numbers)."""
    if ndim == 0:
        return []
    listed = list(range(ndim)) if saved is None else [saved] if isinstance(saved, int) else list(saved)
    return [(d - 2**64 if d >= 2**63 else d) % ndim for d in listed] or list(range(ndim))


def without_offset(state: ScaleState) -> ScaleState:
    """Return ``state`` where no bias is in it."""
    if state.offset is not None:
        raise BiasNotScaledError("a bias is added before it")
    return state


def the_operand(walk: NodeContext) -> ScaleState:
    """Return the one operand that scales."""
    scaled = [operand for operand in walk.operands if operand is not None]
    if len(scaled) != 1:
        raise NotInvariantError(f"read several times by {name_of(walk.node)}")
    return scaled[0]


def name_of(node: Node) -> str:
    """Return the operation of a node, as in ``Convolution``."""
    name: str = node.name().rstrip("0123456789").removesuffix("Backward")
    return name


def shape_of(node: Node, output: int = 0) -> tuple[int, ...]:
    """Return the shape of an output of a node."""
    return tuple(node.variable.shape if hasattr(node, "variable") else node._input_metadata[output].shape)


def bias_axis(size: Sequence[int], shape: Sequence[int]) -> int | None:
    """Return the axis along which a tensor added to one of ``shape`` varies; None where it varies along several."""
    wide = [d - len(size) + len(shape) for d, length in enumerate(size) if length > 1] or [len(shape) - 1]
    return wide[0] if len(wide) == 1 else None
