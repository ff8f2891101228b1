"""One operation of the graph, as the rules see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from lightning_normgeo.normalization.autograd.graph import Edge, Graph, Node
from lightning_normgeo.normalization.autograd.nodes import name_of
from lightning_normgeo.symmetries.degrees import algebra
from lightning_normgeo.symmetries.degrees.degree import Degree
from lightning_normgeo.symmetries.degrees.free_scales import Axes
from lightning_normgeo.symmetries.degrees.nodes import BATCH_NORMS, VIEWS, input_shape
from lightning_normgeo.symmetries.degrees.shifts import Shift
from lightning_normgeo.symmetries.equations.exponents import Exponents, Ids, Mask

_MOVES = VIEWS | {"Expand", "ToCopy", "Clone"}


class Absorption(NamedTuple):
    """A normalization, and the exponents that it removes.

    Attributes:
        node: where it ends: a layer, or a product or quotient with a statistic.
        exponents: degree of each statistic, in an array that broadcasts to all statistics.
        factor: degree of its input is this factor times ``exponents``: −1 where these are of an inverse deviation.
    """

    node: Node
    exponents: Ids
    factor: float = 1.0


class NoRuleError(Exception):
    """Raised where an operation is not understood, so that everything that it reads has to have degree 0."""


@dataclass
class Operation:
    """An autograd node and one of its outputs, with the degrees of its inputs.

    Attributes:
        graph: the graph of the node.
        node: the autograd node.
        output: index of the output whose degree is wanted.
        operands: degrees of the inputs; None for those that depend on no parameter.
        exponents: unknown exponents; rules add equations to them.
        live: elements of each tensor that matter.
        shifts: shifts of each tensor without effect.
        scales: axes of each tensor along which scales have no effect.
        absorbed: normalizations reached so far; rules add to them.
    """

    graph: Graph
    node: Node
    output: int
    operands: Sequence[Degree | None]
    exponents: Exponents
    live: dict[Edge, Mask]
    shifts: dict[Edge, Shift]
    scales: dict[Edge, Axes]
    absorbed: list[Absorption]

    @property
    def name(self) -> str:
        """The name of the operation, such as ``Convolution``."""
        return self.graph.name_of(self.node)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return self.graph.shape_of(self.node, self.output)

    @cached_property
    def ndim(self) -> int:
        """The number of dimensions of the output."""
        return len(self.shape)

    @property
    def constant(self) -> Degree:
        """The degree 0 of all elements of the output."""
        return Degree(self.shape)

    @property
    def where(self) -> Mask:
        """Elements of the output that matter."""
        return self.live[self.node, self.output]

    @property
    def shift(self) -> Shift | None:
        """Shifts of the output that have no effect."""
        return self.shifts.get((self.node, self.output))

    @property
    def free(self) -> Axes:
        """Axes of the output along which scales have no effect."""
        return self.scales.get((self.node, self.output), frozenset())

    def input_shape(self, position: int) -> tuple[int, ...]:
        """Return the shape of an input that some operation or parameter has made.

        Raises:
            NoRuleError: for other inputs.
        """
        shape = input_shape(self.graph, self.node, position)
        if shape is None:
            raise NoRuleError
        return shape

    def input_live(self, position: int) -> Mask:
        """Return the elements of an input that matter, to this operation or another one."""
        return self.live[self.graph.inputs[self.node][position]]

    @property
    def only(self) -> Degree:
        """The degree of the only input that depends on parameters.

        Raises:
            NoRuleError: if there are several.
        """
        (position,) = self.positions if len(self.positions) == 1 else (None,)
        if position is None:
            raise NoRuleError
        return self.operands[position]  # type: ignore[return-value]

    @cached_property
    def positions(self) -> list[int]:
        """The inputs that depend on parameters."""
        return [position for position, operand in enumerate(self.operands) if operand is not None]

    def tidy(self, degree: Degree) -> Degree:
        """Return the degree in the fewest terms."""
        return algebra.tidy(self.exponents, degree)

    def vanish(self, position: int) -> None:
        """Require degree 0 of an input."""
        degree = self.operands[position]
        if degree is not None:
            algebra.make_zero(self.exponents, degree, self.input_live(position))

    def vanish_all(self) -> Degree:
        """Require degree 0 of all inputs, and return the degree 0."""
        for position in self.positions:
            self.vanish(position)
        return self.constant

    def filled(self, degree: Degree) -> Degree:
        """Return the degree of a tensor that is broadcast to the shape of the output."""
        return degree.lifted(self.ndim).over(self.shape, degree.lifted(self.ndim).terms).plain(degree.statistic)

    def over(self, degree: Degree, axes: Sequence[int], where: Mask | None = None) -> Degree:
        """Require that a degree is constant along axes, and return it with size 1 there."""
        return algebra.constant_along(self.exponents, degree, axes, where)

    def absorb(self, degree: Degree, factor: float = 1.0) -> None:
        """Note that this operation removes a degree, or with ``factor`` a multiple of it."""
        if degree.terms:
            self.absorbed.append(Absorption(self.node, algebra.joint(self.exponents, degree), factor))

    def consumers(self) -> list[tuple[Node, int]]:
        """Return the nodes that compute with the output, with the input position; reshapes and copies are skipped."""
        found, stack = [], list(self.graph.readers[self.node, self.output])
        while stack:
            reader, position = stack.pop()
            if self.graph.name_of(reader) in _MOVES:
                stack += self.graph.readers[reader, 0]
            else:
                found.append((reader, position))
        return found


_WORDS = {
    **dict.fromkeys(BATCH_NORMS, "batch normalization"),
    "NativeGroupNorm": "group normalization",
    "NativeLayerNorm": "layer normalization",
    "FusedRmsNorm": "root mean square normalization",
    "WeightNormInterface": "weight normalization",
    **dict.fromkeys(("Embedding", "Index", "IndexSelect"), "a normalization behind a lookup"),
    **dict.fromkeys(
        ("Scatter", "ScatterAdd", "ScatterReduce", "IndexAdd", "IndexCopy", "IndexPut"),
        "writing into a tensor that is not known to be zero",
    ),
    "CheckpointFunction": "a reentrant activation checkpoint",
    "Div": "division by a norm or deviation",
    "Mul": "division by a norm or deviation",
    "Gelu": "GELU",
    "Silu": "SiLU",
    "Softmax": "softmax",
    "LogSoftmax": "softmax",
    "Add": "a sum with something that does not scale",
    "Sub": "a difference from something that does not scale",
    "Cat": "a concatenation with something that does not scale",
}


def words(node: Node) -> str:
    """Return an operation in words."""
    name = name_of(node)
    if name in BATCH_NORMS and not getattr(node, "_saved_training", True):
        return "batch normalization with frozen statistics (evaluation mode)"
    if name.startswith("ScaledDotProduct"):
        return "attention scores"
    return _WORDS.get(name, name)


def letters(count: int) -> str:
    """Return names for leading axes of a tensor."""
    return "ABCDEFGHIJ"[:count]


def with_bias(walk: Operation, result: Degree, bias: Degree | None, axis: int) -> Degree:
    """Return the degree of a result to which a bias is added that lies along one axis of it.

    Args:
        walk: the operation.
        result: degree without the bias.
        bias: degree of the bias; None if it depends on no parameter.
        axis: axis of the result along which it lies.
    """
    shape = tuple(size if k == axis else 1 for k, size in enumerate(walk.shape))
    if bias is not None:
        bias = bias.viewed(shape)
    return added(walk, result, bias, shape)


def added(walk: Operation, result: Degree, other: Degree | None, shape: tuple[int, ...] | None) -> Degree:
    """Return the degree of a sum, unless shifts by the second summand have no effect: of the first one.

    Args:
        walk: the operation.
        result: degree of the first summand.
        other: degree of the second summand; None if it depends on no parameter.
        shape: shape of the second summand; None if it is unknown.
    """
    shift, where = walk.shift, walk.where
    if shift is not None and shape is not None and shift.removes(shape, walk.ndim):
        where = where & ~shift.mask
        if not where.any():
            return walk.filled(result)
    else:
        shift = None
    if other is None:
        algebra.make_zero(walk.exponents, result.lifted(walk.ndim), where)
        return walk.filled(result) if shift is not None else walk.constant
    a, b = result.lifted(walk.ndim), other.lifted(walk.ndim)
    algebra.make_equal(walk.exponents, a, b, where)
    size = [sum(term.size for term in degree.terms) for degree in (a, b)]
    same = shift is None and bool(where.all())
    return walk.filled(b if same and size[1] < size[0] else a).plain(a.statistic and b.statistic)
