"""Exponents of the slices of a parameter, before anything is known about them."""

from __future__ import annotations

from math import prod

import numpy as np

from lightning_normgeo.normalization.autograd.graph import Graph, Node
from lightning_normgeo.normalization.autograd.nodes import name_of, shape_of
from lightning_normgeo.symmetries.degrees.degree import Degree, FreeConstant
from lightning_normgeo.symmetries.degrees.nodes import input_shape
from lightning_normgeo.symmetries.equations.exponents import ZERO, Exponents, Ids


def parameter(exponents: Exponents, graph: Graph, leaf: Node) -> Degree:
    """Return the degree of a parameter with new unknowns: one for each index along each axis.

    Element (i, j) of a matrix has the exponent p_i + q_j, that of a row and that of a column; an element of a stack of
    matrices, such as those of attention heads, p_hi + q_hj. In a convolution all positions of the kernel have the same
    exponent, and each group has columns of its own.
    """
    shape = tuple(leaf.variable.shape)
    groups, directly = _convolution(graph, leaf)
    if groups and len(shape) > 1:
        return _kernel(exponents, shape, groups, directly)
    long = [axis for axis, size in enumerate(shape) if size > 1]
    if len(long) < 2:
        return Degree(shape, (exponents.new(shape),))
    if len(long) == 2:
        terms = [exponents.new([size if axis == own else 1 for axis, size in enumerate(shape)]) for own in long]
        return Degree(shape, tuple(terms), FreeConstant(exponents, _first(terms[1], long[1])))
    stack, *others = long
    terms = [exponents.new([size if axis in (stack, own) else 1 for axis, size in enumerate(shape)]) for own in others]
    if len(others) == 2:
        constant = FreeConstant(exponents, _first(terms[1], others[1]), frozenset({stack}))
        return Degree(shape, tuple(terms), constant)
    for term, own in zip(terms[1:], others[1:], strict=True):
        np.moveaxis(term, own, 0)[0] = ZERO
    return Degree(shape, tuple(terms))


def _convolution(graph: Graph, leaf: Node) -> tuple[int, bool]:
    """Return the groups of the convolution whose kernel is made of a parameter, and whether it is the kernel itself.

    The number of groups is 0 if there is no convolution.
    """
    shape = tuple(leaf.variable.shape)
    readers, seen = list(graph.readers[leaf, 0]), {leaf}
    directly = True
    while readers:
        reader, position = readers.pop()
        if name_of(reader) == "Convolution":
            if position == 1 and input_shape(graph, reader, 1) == shape:
                return int(reader._saved_groups), directly and not readers
        elif reader not in seen and prod(shape_of(reader)) == prod(shape):
            seen.add(reader)
            directly = directly and name_of(reader) == "ToCopy"  # autocast puts a cast between a weight and its use
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
