"""Rules of operations that copy elements: views, permutations, cuts, concatenations, padding."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_normgeo.normalization.autograd.nodes import dimensions
from lightning_normgeo.symmetries.degrees import algebra
from lightning_normgeo.symmetries.degrees.degree import Degree
from lightning_normgeo.symmetries.degrees.nodes import cuts, permutation, signed
from lightning_normgeo.symmetries.equations.exponents import ZERO, Ids
from lightning_normgeo.symmetries.rules.context import NoRuleError, Operation


def copy(walk: Operation) -> Degree:
    """Rule for copies and casts."""
    return walk.only


def pass_through(walk: Operation) -> Degree:
    """Rule for functions that return their inputs unchanged."""
    degree = walk.operands[walk.output]
    return walk.constant if degree is None else degree


def checkpoint(walk: Operation) -> Degree:
    """Rule for the outputs of a reentrant activation checkpoint whose inside has been added to the graph."""
    if walk.graph.inside.get(walk.node) is None:
        raise NoRuleError
    return pass_through(walk)


def view(walk: Operation) -> Degree:
    """Rule for a change of the shape."""
    degree = walk.only.viewed(walk.shape)
    # a term that was spread over merged axes, such as samples and heads, may depend on fewer after they are split again
    spread = any(sum(size > 1 for size in term.shape) > 1 for term in degree.terms)
    return walk.tidy(degree) if spread else degree


def permute(walk: Operation) -> Degree:
    """Rule for an exchange of axes."""
    return walk.only.permuted(permutation(walk.node, walk.ndim))


def expand(walk: Operation) -> Degree:
    """Rule for copies along axes of size 1."""
    degree = walk.only.lifted(walk.ndim)
    return degree.over(walk.shape, degree.terms)


def repeat(walk: Operation) -> Degree:
    """Rule for a tensor that is put next to itself."""
    times = [int(count) for count in walk.node._saved_repeats]
    degree = walk.only.lifted(len(times))
    terms = [
        np.tile(term, [count if term.shape[axis] > 1 else 1 for axis, count in enumerate(times)])
        for term in degree.terms
    ]
    return degree.over(walk.shape, terms).plain()


def cut(walk: Operation) -> Degree:
    """Rule for parts of a tensor along an axis."""
    degree = walk.only
    axis, parts = cuts(walk.node, degree.shape)
    indices, keep = parts[walk.output]
    return degree.taken(axis, indices, keep)


def flip(walk: Operation) -> Degree:
    """Rule for a reversed order."""
    degree = walk.only
    axes = tuple(dimensions(walk.node._saved_dims, walk.ndim))
    return degree.over(walk.shape, [np.flip(term, axes) for term in degree.terms]).plain()


def rotate(walk: Operation) -> Degree:
    """Rule for a rotation by 90 degrees."""
    degree, axes = walk.only, dimensions(walk.node._saved_dims, walk.ndim)
    terms = [np.rot90(term, signed(walk.node._saved_k), (axes[0], axes[1])) for term in degree.terms]
    return degree.over(walk.shape, terms).plain()


def roll(walk: Operation) -> Degree:
    """Rule for a cyclic shift."""
    degree, shifts = walk.only, [signed(shift) for shift in walk.node._saved_shifts]
    axes = [d - 2**64 if d >= 2**63 else d for d in walk.node._saved_dims]
    if not axes:
        raise NoRuleError
    return degree.over(walk.shape, [np.roll(term, shifts, axes) for term in degree.terms]).plain()


def concatenate(walk: Operation) -> Degree:
    """Rule for tensors put next to each other, along an axis or a new one."""
    (axis,) = dimensions(walk.node._saved_dim, walk.ndim)
    new = walk.name == "Stack"
    parts = []
    for position, degree in enumerate(walk.operands):
        if degree is None:
            parts.append(_of_a_constant(walk, position, axis, new))
        else:
            term = algebra.joint(walk.exponents, degree)
            parts.append((np.expand_dims(term, axis), 1) if new else (term, degree.shape[axis]))
    shape = np.broadcast_shapes(*[(*term.shape[:axis], 1, *term.shape[axis + 1 :]) for term, _ in parts])
    pieces = [np.broadcast_to(term, (*shape[:axis], length, *shape[axis + 1 :])) for term, length in parts]
    return walk.tidy(Degree(walk.shape, (np.concatenate(pieces, axis),)))


def _of_a_constant(walk: Operation, position: int, axis: int, new: bool) -> tuple[Ids, int]:
    """Return the degree and length of a part that depends on no parameter: any degree if it is zero, else 0."""
    if new:
        length = 1
    else:
        constants = [k for k, degree in enumerate(walk.operands) if degree is None]
        if len(constants) > 1:
            raise NoRuleError
        others = sum(degree.shape[axis] for degree in walk.operands if degree is not None)
        length = walk.shape[axis] - others
    if walk.graph.constants.are_zero(walk.node):
        like = next(degree for degree in walk.operands if degree is not None)
        term = algebra.joint(walk.exponents, like)
        return (np.expand_dims(term, axis) if new else term.take([0], axis)), length
    return np.zeros((1,) * walk.ndim, np.int64), length


def pad(walk: Operation) -> Degree:
    """Rule for a frame of a constant around a tensor: zeros have any degree, other constants degree 0."""
    degree = walk.only
    widths = [signed(width) for width in walk.node._saved_pad]
    around = {walk.ndim - 1 - k: (widths[2 * k], widths[2 * k + 1]) for k in range(len(widths) // 2)}
    around = {axis: sizes for axis, sizes in around.items() if any(sizes)}
    grown = any(size > 0 for sizes in around.values() for size in sizes)
    if grown and not walk.graph.constants.are_zero(walk.node):
        whole = algebra.joint(walk.exponents, degree.plain())
        wide = [size if axis in around else whole.shape[axis] for axis, size in enumerate(degree.shape)]
        framed = _framed(np.broadcast_to(whole, wide), around, {"constant_values": ZERO})
        return walk.tidy(Degree(walk.shape, (framed,)))
    return degree.over(walk.shape, [_framed(term, around, {"mode": "edge"}) for term in degree.terms]).plain()


def _framed(term: Ids, around: dict[int, tuple[int, int]], by: dict[str, Any]) -> Ids:
    """Return a term with a frame along the axes on which it varies; negative widths cut."""
    for axis, (low, high) in around.items():
        if term.shape[axis] > 1:
            width = [(max(low, 0), max(high, 0)) if d == axis else (0, 0) for d in range(term.ndim)]
            term = np.pad(term, width, **by)
            term = term.take(range(max(-low, 0), term.shape[axis] - max(-high, 0)), axis)
    return term
