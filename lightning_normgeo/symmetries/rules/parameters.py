"""Exponents of the slices of a parameter, before anything is known about them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod

import numpy as np

from lightning_normgeo.normalization.autograd.graph import Graph, Node
from lightning_normgeo.normalization.autograd.nodes import dimensions
from lightning_normgeo.symmetries.degrees.degree import Degree, FreeConstant, joint_axes
from lightning_normgeo.symmetries.degrees.nodes import COPIES, PERMUTATIONS, VIEWS, input_shape, permutation
from lightning_normgeo.symmetries.equations.exponents import ZERO, Exponents, Ids

_NEW = -1  # an axis of size 1 that the parameter does not have


def kernel_sources(graph: Graph) -> set[Node]:
    """Return the nodes that kernels of convolutions are made of by operations that keep the number of elements.

    Cost: one walk over the graph, and one over the operations between parameters and kernels.
    """
    found: set[Node] = set()
    for convolution in graph.order:
        if graph.name_of(convolution) != "Convolution":
            continue
        size = prod(input_shape(graph, convolution, 1) or ())
        above = [graph.inputs[convolution][1][0]]
        while above:
            node = above.pop()
            if node is not None and node not in found and prod(graph.shape_of(node)) == size:
                found.add(node)
                above += [source for source, _ in graph.inputs[node]]
    return found


def parameter(exponents: Exponents, graph: Graph, leaf: Node, kernels: Collection[Node]) -> Degree:
    """Return the degree of a parameter with new unknowns: one for each index along each axis.

    Element (i, j) of a matrix has the exponent p_i + q_j, that of a row and that of a column; an element of a stack of
    matrices, such as those of attention heads, p_hi + q_hj. In a convolution all positions of the kernel have the same
    exponent, and each group has columns of its own. The direction of a weight normalization has one exponent for each
    vector that is normalized.

    Args:
        exponents: the unknowns.
        graph: with the parameter.
        leaf: its node.
        kernels: the nodes that kernels of convolutions are made of, :func:`kernel_sources`.
    """
    shape = tuple(leaf.variable.shape)
    kept = _normalized_along(graph, leaf)
    if kept is not None:
        return Degree(shape, (exponents.new([size if axis == kept else 1 for axis, size in enumerate(shape)]),))
    groups, directly = _convolution(graph, leaf) if leaf in kernels else (0, False)
    if groups and len(shape) > 1:
        return _kernel(exponents, shape, groups, directly)
    long = [axis for axis, size in enumerate(shape) if size > 1]
    if len(long) < 2:
        return Degree(shape, (exponents.new(shape),))
    if len(long) == 2:
        terms = [exponents.new([size if axis == own else 1 for axis, size in enumerate(shape)]) for own in long]
        return Degree(shape, tuple(terms), FreeConstant(exponents, _first(terms[1], long[1])))
    stack = _stack_axis(graph, leaf, long)
    others = [axis for axis in long if axis != stack]
    terms = [exponents.new([size if axis in (stack, own) else 1 for axis, size in enumerate(shape)]) for own in others]
    if len(others) == 2:
        constant = FreeConstant(exponents, _first(terms[1], others[1]), frozenset({stack}))
        return Degree(shape, tuple(terms), constant)
    for term, own in zip(terms[1:], others[1:], strict=True):
        np.moveaxis(term, own, 0)[0] = ZERO
    return Degree(shape, tuple(terms))


def _normalized_along(graph: Graph, leaf: Node) -> int | None:
    """Return the axis that numbers the vectors of a weight normalization, where nothing else reads a parameter."""
    found = set()
    for reader, position in graph.readers[leaf, 0]:
        if graph.name_of(reader) != "WeightNormInterface" or position != 0:
            return None
        found |= set(dimensions(reader._saved_dim, leaf.variable.ndim))
    return found.pop() if len(found) == 1 else None


def _stack_axis(graph: Graph, leaf: Node, long: Sequence[int]) -> int:
    """Return the axis that numbers the matrices of a stack.

    It is the first one, as in a stack of heads (head, input, size), unless others are joined: a product with a weight
    (input, head, size) joins head and size, so that all pairs of these need exponents of their own.
    """
    joined = _joined_axes(graph, leaf)
    return min(joined) if joined and long[0] not in joined else long[0]


def _joined_axes(graph: Graph, leaf: Node) -> list[int]:
    """Return the axes of a parameter that become one axis on the way to the operation that computes with it."""
    node, axes = leaf, list(range(leaf.variable.ndim))
    while readers := graph.readers[node, 0]:
        (reader, _), old = readers[0], graph.shape_of(node)
        name = graph.name_of(reader)
        if name in VIEWS:
            moved: list[int] = []
            for before, after in joint_axes(old, graph.shape_of(reader)):
                own = sorted({axes[axis] for axis in before if old[axis] > 1})
                if len(own) > 1:
                    return own
                moved += (own or [_NEW]) * len(after)
            axes = moved
        elif name in PERMUTATIONS:
            axes = [axes[axis] for axis in permutation(reader, len(axes))]
        elif name not in COPIES:
            break
        node = reader
    return []


def _convolution(graph: Graph, leaf: Node) -> tuple[int, bool]:
    """Return the groups of the convolution whose kernel is made of a parameter, and whether it is the kernel itself.

    The number of groups is 0 if there is no convolution.
    """
    shape = tuple(leaf.variable.shape)
    readers, seen = list(graph.readers[leaf, 0]), {leaf}
    directly = True
    while readers:
        reader, position = readers.pop()
        if graph.name_of(reader) == "Convolution":
            if position == 1 and input_shape(graph, reader, 1) == shape:
                return int(reader._saved_groups), directly and not readers
        elif reader not in seen and prod(graph.shape_of(reader)) == prod(shape):
            seen.add(reader)
            # autocast puts a cast between a weight and its use
            directly = directly and graph.name_of(reader) == "ToCopy"
            readers += graph.readers[reader, 0]
    return 0, False


def _first(term: Ids, axis: int) -> Ids:
    """Return the unknowns of the first index along an axis."""
    return term.take(0, axis).reshape(-1)


def _kernel(exponents: Exponents, shape: tuple[int, ...], groups: int, directly: bool) -> Degree:
    out, inputs, *positions = shape
    ones = (1,) * len(positions)
    terms = [exponents.new((out, 1, *ones))]
    if inputs == 1:
        return Degree(shape, tuple(terms))
    columns: Ids = exponents.new((groups, inputs))
    constant = FreeConstant(exponents, columns[:, 0].copy(), frozenset({0} if groups > 1 else ()))
    if not directly:
        columns[:, 0] = ZERO  # p + c and q − c are the same, for each group
    columns = columns if groups == 1 else np.repeat(columns, out // groups, axis=0)
    terms.append(columns.reshape(-1, inputs, *ones))
    return Degree(shape, tuple(terms), constant if directly else None)
