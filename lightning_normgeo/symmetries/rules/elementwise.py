"""Rules of elementwise operations: functions, sums, products and powers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_normgeo.normalization.autograd.graph import Node
from lightning_normgeo.normalization.autograd.nodes import dimensions, name_of
from lightning_normgeo.symmetries.degrees import algebra
from lightning_normgeo.symmetries.degrees.degree import Degree
from lightning_normgeo.symmetries.rules.context import NoRuleError, Operation, added

_LARGEST_EPSILON = 1e-3


def not_homogeneous(walk: Operation) -> Degree:
    """Rule for functions that keep no scale, such as GELU, and for losses: every input has degree 0."""
    return walk.vanish_all()


def homogeneous(walk: Operation) -> Degree:
    """Rule for functions with f(a·x) = a·f(x) for a > 0, such as ReLU."""
    return walk.only.over(walk.shape, walk.only.terms)


def prelu(walk: Operation) -> Degree:
    """Rule for PReLU, homogeneous in its input but not in its slope, whose sign decides as well."""
    walk.vanish(1)
    return walk.constant if walk.operands[0] is None else walk.operands[0].plain()


def gated(walk: Operation) -> Degree:
    """Rule for GLU: homogeneous in the first half of an axis; the second half, behind a sigmoid, has degree 0."""
    degree = walk.only
    (axis,) = dimensions(walk.node._saved_dim, walk.ndim)
    half = walk.shape[axis]
    algebra.make_zero(walk.exponents, degree.taken(axis, range(half, 2 * half)), walk.where)
    return degree.taken(axis, range(half)).plain()


def total(walk: Operation) -> Degree:
    """Rule for a sum or difference."""
    if len(walk.positions) == 2:
        first, second = (walk.operands[position] for position in walk.positions)
        shift = walk.shift
        shapes = [walk.input_shape(position) for position in walk.positions]
        if shift is not None and shift.removes(shapes[0], walk.ndim) and not shift.removes(shapes[1], walk.ndim):
            first, second, shapes = second, first, shapes[::-1]
        return added(walk, first, second, shapes[1])  # type: ignore[arg-type]
    degree = walk.only
    if degree.statistic and _divides(walk.consumers()) and walk.graph.constants.are_tiny(walk.node):
        return walk.filled(degree)  # the ε of a variance or norm
    return added(walk, degree, None, walk.graph.constants.shape_of_addend(walk.node))


def _divides(consumers: Sequence[tuple[Node, int]]) -> bool:
    """Whether a number added to a statistic is an ε: all readers of the sum take its root or divide by it."""
    return all(
        name_of(node) in ("Sqrt", "Rsqrt", "Reciprocal")
        or (name_of(node) == "Div" and position == 1)
        or (node.name() == "PowBackward0" and float(node._saved_exponent) <= 0.5)
        for node, position in consumers
    )


def product(walk: Operation) -> Degree:
    """Rule for a product: degrees add up."""
    parts = [(degree, 1.0) for degree in walk.operands if degree is not None]
    if len(parts) == 1:
        return walk.filled(parts[0][0])
    statistics = [degree for degree, _ in parts if degree.statistic]
    if len(statistics) == 1:
        walk.absorb(statistics[0], -1.0)
    return algebra.combined(walk.exponents, parts, walk.shape).plain(len(statistics) == len(parts))


def sign(walk: Operation) -> Degree:
    """Rule for signs, which no positive factor changes, whatever the degree of each element."""
    return walk.constant


def with_sign_of(walk: Operation) -> Degree:
    """Rule for magnitudes with the signs of another tensor, whose degree does not matter."""
    magnitude = walk.operands[0]
    return walk.constant if magnitude is None else walk.filled(magnitude.plain())


def quotient(walk: Operation) -> Degree:
    """Rule for a quotient: the degree of the divisor is subtracted."""
    if getattr(walk.node, "_saved_rounding_mode", None) is not None:
        return walk.vanish_all()
    top, bottom = (*walk.operands, None)[:2]
    if bottom is None:
        return product(walk)
    parts = [(bottom, -1.0)] + ([(top, 1.0)] if top is not None else [])
    statistic = bottom.statistic and (top is None or top.statistic)
    if bottom.statistic and not statistic:
        walk.absorb(bottom)
    return algebra.combined(walk.exponents, parts, walk.shape).plain(statistic)


def added_product(sign: float) -> Callable[[Operation], Degree]:
    """Return the rule for the sum of a tensor and the product (sign 1) or quotient (sign −1) of two others."""

    def rule(walk: Operation) -> Degree:
        base, a, b = walk.operands
        parts = [(degree, factor) for degree, factor in ((a, 1.0), (b, sign)) if degree is not None]
        whole = algebra.combined(walk.exponents, parts, walk.shape) if parts else walk.constant
        known = walk.graph.inputs[walk.node][0][0] is not None
        return added(walk, whole, base, walk.input_shape(0) if known else None)

    return rule


def interpolation(walk: Operation) -> Degree:
    """Rule for a + w·(b − a), where the weight w has degree 0."""
    if len(walk.operands) > 2:
        walk.vanish(2)
    a, b = walk.operands[:2]
    if a is None or b is None:
        return walk.vanish_all()
    algebra.make_equal(walk.exponents, a, b, walk.where)
    return walk.filled(a)


def power(exponent: float | None) -> Callable[[Operation], Degree]:
    """Return the rule for a power; None for the exponent that the node has saved."""

    def rule(walk: Operation) -> Degree:
        if exponent is None and walk.node.name() != "PowBackward0":
            raise NoRuleError  # a tensor of exponents
        value = float(walk.node._saved_exponent) if exponent is None else exponent
        return walk.tidy(algebra.weighted(walk.exponents, walk.only, value))

    return rule


def together(walk: Operation) -> Degree:
    """Rule for functions that are homogeneous in two tensors together, such as a maximum."""
    if len(walk.positions) == 2:
        a, b = (walk.operands[position] for position in walk.positions)
        algebra.make_equal(walk.exponents, a, b, walk.where)  # type: ignore[arg-type]
        return walk.filled(a)  # type: ignore[arg-type]
    if not walk.graph.constants.are_zero(walk.node):
        return walk.vanish_all()
    return walk.filled(walk.only)


def beside_constant(walk: Operation) -> Degree:
    """Rule for a tensor some elements of which are replaced by a constant: homogeneous only if that is zero."""
    return walk.only.plain() if walk.graph.constants.are_zero(walk.node) else walk.vanish_all()


def clamp(walk: Operation) -> Degree:
    """Rule for a bound: at zero it is a ReLU of x or −x, and a tiny one below a norm is an ε."""
    lower, upper = getattr(walk.node, "_saved_min", None), getattr(walk.node, "_saved_max", None)
    if len(walk.positions) > 1 or (lower is None) == (upper is None):
        return walk.vanish_all()
    degree, bound = walk.only, upper if lower is None else lower
    epsilon = (
        lower is not None and degree.statistic and isinstance(bound, int | float) and 0 <= bound <= _LARGEST_EPSILON
    )
    return degree if epsilon or (isinstance(bound, int | float) and bound == 0) else walk.vanish_all()
