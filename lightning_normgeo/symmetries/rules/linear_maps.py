"""Rules of linear maps and attention."""

from __future__ import annotations

import numpy as np

from lightning_normgeo.normalization.autograd.nodes import dimensions
from lightning_normgeo.symmetries.degrees import algebra
from lightning_normgeo.symmetries.degrees.degree import Degree, viewed
from lightning_normgeo.symmetries.equations.exponents import Mask
from lightning_normgeo.symmetries.rules.context import NoRuleError, Operation, added, letters, with_bias


def matrix_product(walk: Operation) -> Degree:
    """Rule for a product of matrices, or of stacks of them; ``addmm`` and ``baddbmm`` add the first operand."""
    a, b = walk.operands[-2:]
    stack = letters(walk.ndim - 2)
    if a is None and b is None:
        result = walk.constant
    else:
        a = a or _constant_factor(walk, b, stack, left=True)
        b = b or _constant_factor(walk, a, stack, left=False)
        result = _contracted(walk, (a, f"{stack}ik"), (b, f"{stack}kj"), f"{stack}ij")
    if len(walk.operands) == 3 and float(getattr(walk.node, "_saved_beta", 1)) != 0:
        source, _ = walk.graph.inputs[walk.node][0]
        shape = walk.graph.constants.shape_of_addend(walk.node) if source is None else walk.input_shape(0)
        return added(walk, result, walk.operands[0], shape)
    return result


def _constant_factor(walk: Operation, other: Degree | None, stack: str, left: bool) -> Degree:
    """Return the degree 0 of a factor that depends on no parameter, with the shape that fits the other one."""
    if other is None:
        raise NoRuleError
    rows, columns = walk.shape[-2:]
    common = other.shape[-2] if left else other.shape[-1]
    return Degree((*walk.shape[: len(stack)], *((rows, common) if left else (common, columns))))


def _contracted(walk: Operation, a: tuple[Degree, str], b: tuple[Degree, str], result: str) -> Degree:
    where = walk.where
    return walk.tidy(algebra.contracted(walk.exponents, a, b, result, None if where.all() else where))


def linear(walk: Operation) -> Degree:
    """Rule for ``F.linear`` recorded as one node, with the operands input, weight and bias."""
    x, weight, bias = (*walk.operands, None)[:3]
    front = letters(walk.ndim - 1)
    if weight is None and x is None:
        return with_bias(walk, walk.constant, bias, walk.ndim - 1)
    if weight is None:
        weight = Degree((walk.shape[-1], x.shape[-1]))  # type: ignore[union-attr]
    if x is None:
        x = Degree((*walk.shape[:-1], weight.shape[1]))
    result = _contracted(walk, (x, f"{front}k"), (weight, "jk"), f"{front}j")
    return result if walk.graph.constants.are_zero(walk.node) else with_bias(walk, result, bias, walk.ndim - 1)


def sparse_product(walk: Operation) -> Degree:
    """Rule for the product of a constant sparse matrix, such as the adjacency of a graph, with a dense one."""
    added_term, sparse, dense = walk.operands
    if dense is None or added_term is not None or sparse is not None or walk.node._saved_beta != 0:
        raise NoRuleError
    degree = walk.over(dense, [0])
    return degree.over(walk.shape, degree.terms).plain()


def vector_product(walk: Operation) -> Degree:
    """Rule for a matrix times a vector, and for a product of two vectors."""
    a, b = walk.operands
    if walk.name == "Mv":
        if a is None:
            raise NoRuleError
        b = b or Degree((a.shape[1],))
        return _contracted(walk, (a, "ik"), (b, "k"), "i").plain(True)
    size = (a or b).shape  # type: ignore[union-attr]
    return _contracted(walk, (a or Degree(size), "k"), (b or Degree(size), "k"), "").plain(True)


def convolution(walk: Operation) -> Degree:
    """Rule for a convolution: a product of matrices for each group, with one degree at all positions."""
    x, weight, bias = (*walk.operands, None)[:3]
    node = walk.node
    transposed, groups = bool(node._saved_transposed), int(node._saved_groups)
    positions = range(2, walk.ndim)
    if x is None and weight is None:
        return with_bias(walk, walk.constant, bias, 1)
    if weight is None:
        weight = _frozen_kernel(walk, x, transposed, groups)  # type: ignore[arg-type]
    weight = walk.over(weight, positions)
    out, inputs = weight.shape[:2]
    channels = out if transposed else inputs * groups
    x = Degree((walk.shape[0], channels, *(1 for _ in positions))) if x is None else walk.over(x, positions)
    by_group = walk.tidy(_grouped(weight, groups, transposed))
    shape = (x.shape[0], groups, channels // groups)
    terms = [viewed(term.reshape(term.shape[:2]), (x.shape[0], channels), shape) for term in x.terms]
    source = Degree(shape, tuple(terms), x.constant if groups == 1 else x.plain().constant)
    result = _contracted_in_groups(walk, source, by_group)
    if sum(node._saved_bias_sym_sizes_opt or ()) > 0:
        return with_bias(walk, result, bias, 1)
    return result


def _frozen_kernel(walk: Operation, x: Degree, transposed: bool, groups: int) -> Degree:
    outputs, inputs = walk.shape[1], x.shape[1]
    channels = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    return Degree((*channels, *(1 for _ in range(2, walk.ndim))))


def _grouped(weight: Degree, groups: int, transposed: bool) -> Degree:
    """Return the degrees of a kernel as (group, output, input)."""
    a, b = weight.shape[:2]
    split, order = (groups, a // groups, b), ((0, 2, 1) if transposed else (0, 1, 2))
    terms = [viewed(term.reshape(term.shape[:2]), (a, b), split).transpose(order) for term in weight.terms]
    constant = weight.constant
    if constant is not None:
        constant = constant.along(frozenset({0} if constant.axes else ()))
    return Degree(tuple(split[k] for k in order), tuple(terms), constant)


def _contracted_in_groups(walk: Operation, x: Degree, weight: Degree) -> Degree:
    result = algebra.contracted(walk.exponents, (x, "ngk"), (weight, "gjk"), "ngj")
    ones = (1,) * (walk.ndim - 2)
    shape = (x.shape[0], walk.shape[1])
    terms = [
        viewed(term, (x.shape[0], *weight.shape[:2]), shape).reshape(*_size(term, shape), *ones)
        for term in result.terms
    ]
    return walk.tidy(Degree(walk.shape, tuple(terms)))


def _size(term: np.ndarray, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the size of a term (sample, group, channel) after group and channel have become one axis."""
    return (term.shape[0], shape[1] if max(term.shape[1:]) > 1 else 1)


def fourier(walk: Operation) -> Degree:
    """Rule for Fourier transforms: one degree along the axes that are transformed."""
    degree = walk.over(walk.only, dimensions(walk.node._saved_dim, walk.ndim))
    return degree.over(walk.shape, degree.terms).plain()


def attention(walk: Operation) -> Degree:
    """Rule for attention recorded as one node: scores have degree 0, and the result that of the values."""
    if walk.output != 0:
        return walk.constant
    query, key, value = (
        degree if degree is None else _over_tokens(walk, k) for k, degree in enumerate(walk.operands[:3])
    )
    for position in range(3, len(walk.operands)):
        walk.vanish(position)
    heads = walk.shape[1] if walk.ndim == 4 else 1
    key, value = (_repeated(degree, heads) for degree in (key, value))
    terms = [(term, 1.0) for degree in (query, key) if degree is not None for term in degree.terms]
    if len(terms) == 1:
        walk.exponents.vanish(terms[0][0])
    elif terms:
        walk.exponents.add_to_zero(terms)
    return walk.constant if value is None else value.over(walk.shape, value.terms).plain()


def _over_tokens(walk: Operation, position: int) -> Degree:
    degree = walk.operands[position]
    live: Mask = walk.input_live(position)
    return walk.over(degree, [walk.ndim - 2], None if live.all() else live)  # type: ignore[arg-type]


def _repeated(degree: Degree | None, heads: int) -> Degree | None:
    """Return the degree of keys or values that several heads of queries share."""
    if degree is None or len(degree.shape) != 4 or degree.shape[1] in (1, heads):
        return degree
    groups = np.repeat(np.arange(degree.shape[1]), heads // degree.shape[1])
    return degree.taken(1, groups).plain()
