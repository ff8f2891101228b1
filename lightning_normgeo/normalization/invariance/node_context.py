"""Common parts of the rules: the context of one autograd node, and the exceptions that end the search.

A *rule* describes one kind of autograd node. It takes the states of the node's inputs and returns the state of its
output. A state is None for a tensor that does not change with the scale of the weight. A rule raises
:class:`NotInvariantError` if the output is not homogeneous in the rows of the weight, as in a sum with a tensor that
does not scale; so does a node without a rule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch.autograd.function import BackwardCFunction

from lightning_normgeo.normalization.autograd.graph import Graph, Node
from lightning_normgeo.normalization.invariance.row_layout import (
    Axis,
    Piece,
    ScaleState,
    broadcast,
    fused,
    plain_axis,
    split,
)

Operands = list[ScaleState | None]
_MOVES = {"View", "ReshapeAlias", "UnsafeView", "Unsqueeze", "Squeeze", "Expand", "ToCopy", "Clone"}


UNKNOWN_CONSTANT = "that the graph does not show to be zero"
"""Part of the reason for no units where a constant may be zero, which a forward pass under ``ZeroConstants`` shows."""


class NotInvariantError(Exception):
    """Raised if the loss depends on the scale of the weight, or may do so; the message is the reason."""


class BiasNotScaledError(NotInvariantError):
    """Raised if a bias is added that does not scale with the weight; the two scaled together may be invariant."""


@dataclass
class NodeContext:
    """One autograd node during the search, with the results that the search collects.

    Attributes:
        graph: the graph of the node.
        node: the autograd node.
        output: index of the output whose state is wanted.
        operands: states of the inputs of the node; None for inputs that do not scale.
        merged: digits over which rows have been merged so far; rules add to it.
        absorbers: normalizations reached so far, each with the state of its input; rules add to it.
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
        """Return the nodes that compute with the output, with the input position; reshapes and copies are skipped."""
        found, stack = [], list(self.graph.readers[self.node, self.output])
        while stack:
            reader, position = stack.pop()
            if name_of(reader) in _MOVES:
                stack += self.graph.readers[reader, 0]
            else:
                found.append((reader, position))
        return found

    def joined(self, left: Axis, right: Axis) -> Axis:
        """Return one axis of an elementwise combination of two tensors; different rows that meet are merged."""
        same = fused(left.pieces) == fused(right.pieces)
        # after a cut the rows at a position are unknown, so that other rows could not be merged with them either
        if left.cut != right.cut or (left.cut and not same):
            raise NotInvariantError("combined with other outputs")
        if same:
            return left
        self.merge([left, right])
        return plain_axis(left.size)

    def combined(self, a: ScaleState, b: ScaleState, degree: float) -> ScaleState:
        """Return the state of an elementwise function of two tensors that both scale."""
        axes = map(self.joined, broadcast(a.axes, self.shape), broadcast(b.axes, self.shape))
        return ScaleState(tuple(axes), degree, None, a.data or b.data, a.statistic and b.statistic)

    def alike(self, a: ScaleState, b: ScaleState) -> ScaleState:
        """Return the state of a function that is homogeneous of degree 1 in two tensors jointly: a sum, a maximum."""
        if a.degree != b.degree or a.offset is not None or b.offset is not None:
            raise NotInvariantError("two uses of it that scale in different ways are added up or compared")
        return self.combined(a, b, a.degree)

    def beside_zeros(self) -> bool:
        """Whether all inputs of the node that do not scale are constants known to be zero."""
        edges = zip(self.node.next_functions, self.operands, strict=True)
        # no node in front of an input: nothing that requires a gradient, a constant
        constant = all(source is None for (source, _), operand in edges if operand is None)
        return constant and self.node in self.graph.zeros

    def merge(self, axes: Sequence[Axis] | Sequence[Piece]) -> None:
        """Merge the rows along axes or pieces into one unit: only a common factor of theirs can cancel."""
        for entry in axes:
            if isinstance(entry, Axis):
                self.merged.update(entry.digits)
            elif entry.stride:
                self.merged.add(entry)

    def reduce(self, axes: Sequence[Axis]) -> None:
        """Merge the rows along axes that are summed over or normalized over."""
        if any(axis.cut for axis in axes):
            raise NotInvariantError("summed or normalized together with other outputs (a concatenation)")
        self.merge(axes)

    def absorb(self, state: ScaleState, kept: Sequence[int], groups: int = 1, centers: bool = True) -> None:
        """End a path at a normalization, which cancels the scale of its input.

        Args:
            state: of the input.
            kept: axes that the statistics are not taken over: there is one mean and variance for each index into them.
            groups: number of groups into which the channels (axis 1) are split, with statistics for each.
            centers: whether the normalization subtracts the mean, which removes a bias that is constant over the axes
                of the statistics.

        Raises:
            BiasNotScaledError: if a bias was added that the normalization does not remove.
            NotInvariantError: if rows are normalized together with elements that are not rows.
        """
        constant = set(kept)  # axes along which a bias may vary and is still removed by centering
        if groups > 1:
            if groups == state.shape[1]:
                constant.add(1)  # one channel per group: a bias per channel is constant within the group
            parts = None if state.axes[1].cut else split(state.axes[1], groups)
            if parts is None:
                raise NotInvariantError("normalized together with other outputs, in groups")
            self.merge(parts[1])
        self.reduce([axis for d, axis in enumerate(state.axes) if d not in kept and (d != 1 or groups == 1)])
        if state.offset is not None and not (centers and state.offset in constant):
            raise BiasNotScaledError("a bias is added before the normalization")
        self.absorbers.append((self.node, state))


def dimensions(saved: Any, ndim: int) -> list[int]:
    """Return dimensions that autograd has saved on a node, as numbers from 0 to ``ndim`` - 1.

    Args:
        saved: None or () for all dimensions. Negative dimensions are saved as unsigned 64-bit numbers.
        ndim: number of dimensions of the tensor.
    """
    if ndim == 0:
        return []
    if saved is None:
        listed = list(range(ndim))
    elif isinstance(saved, int):
        listed = [saved]
    else:
        listed = list(saved)
    return [(d - 2**64 if d >= 2**63 else d) % ndim for d in listed] or list(range(ndim))


def without_offset(state: ScaleState) -> ScaleState:
    """Return ``state`` unchanged; raise an error if a bias has been added to the tensor."""
    if state.offset is not None:
        raise BiasNotScaledError("a bias is added before it")
    return state


def the_operand(walk: NodeContext) -> ScaleState:
    """Return the state of the only input that scales."""
    scaled = [operand for operand in walk.operands if operand is not None]
    if len(scaled) != 1:
        raise NotInvariantError(f"read several times by {name_of(walk.node)}")
    return scaled[0]


def name_of(node: Node) -> str:
    """Return the name of a node's operation, such as ``Convolution`` for ``ConvolutionBackward0``.

    A function written in Python keeps its suffix, unless it is torch's own: someone's ``class Mul(Function)`` is not
    known to multiply.
    """
    name: str = node.name()
    if isinstance(node, BackwardCFunction):
        origin = getattr(type(node), "_forward_cls", type(node)).__module__
        if not origin.startswith("torch."):
            return f"{name} of {origin}"
    return name.rstrip("0123456789").removesuffix("Backward")


def shape_of(node: Node, output: int = 0) -> tuple[int, ...]:
    """Return the shape of an output of a node."""
    return tuple(node.variable.shape if hasattr(node, "variable") else node._input_metadata[output].shape)


def bias_axis(size: Sequence[int], shape: Sequence[int]) -> int | None:
    """Return the axis of ``shape`` along which an added tensor of shape ``size`` varies; None if along several."""
    wide = [d - len(size) + len(shape) for d, length in enumerate(size) if length > 1] or [len(shape) - 1]
    return wide[0] if len(wide) == 1 else None
