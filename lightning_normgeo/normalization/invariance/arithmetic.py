"""Rules for arithmetic: how degrees of homogeneity add up, and where they cancel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_normgeo.normalization.graph import Node
from lightning_normgeo.normalization.invariance.layout import Scaled, broadcast, plain
from lightning_normgeo.normalization.invariance.walk import (
    NotInvariantError,
    Operands,
    Walk,
    bias_axis,
    dimensions,
    name_of,
    shape_of,
    the_operand,
    without_offset,
)


def homogeneous(walk: Walk) -> Scaled | None:
    """A function of each element with f(αx) = αf(x): ReLU, absolute value, dropout; PReLU with slopes of its own."""
    if walk.operands[0] is None:
        raise NotInvariantError(f"it scales a parameter of {name_of(walk.node)}")
    return without_offset(the_operand(walk))


def power(exponent: float | None) -> Callable[[Walk], Scaled | None]:
    """Return the rule of a power of each element; that of the node for None."""

    def rule(walk: Walk) -> Scaled | None:
        state = without_offset(the_operand(walk))
        by = _exponent(walk.node) if exponent is None else exponent
        if by is None:
            raise NotInvariantError("a power that is computed is taken of it, or with it as the exponent")
        return _of_degree(walk, state, state.degree * by)

    return rule


def reduction(*degrees: float) -> Callable[[Walk], Scaled | None]:
    """Return the rule of a sum, mean, norm or deviation (degree 1) or a variance (degree 2) over some axes.

    Args:
        degrees: one for each output.
    """

    def rule(walk: Walk) -> Scaled | None:
        state = without_offset(the_operand(walk))
        gone = dimensions(getattr(walk.node, "_saved_dim", None), len(state.axes))
        walk.reduce([state.axes[d] for d in gone])
        if len(walk.shape) == len(state.axes):
            axes = [plain(1) if d in gone else axis for d, axis in enumerate(state.axes)]
        else:
            axes = [axis for d, axis in enumerate(state.axes) if d not in gone]
        return replace(state, axes=tuple(axes), degree=state.degree * degrees[walk.output], statistic=True)

    return rule


def add(walk: Walk) -> Scaled | None:
    """A sum: of two that scale alike, or with a bias, or with an epsilon before a root or a division."""
    a, b = _pair(walk)
    if a is not None and b is not None:
        if a.degree != b.degree or a.offset is not None or b.offset is not None:
            raise NotInvariantError("two uses of it that scale in different ways are added up")
        return _joined(walk, a, b, a.degree)
    state = the_operand(walk)
    edges = walk.node.next_functions
    other, output = edges[1 if b is None else 0] if len(edges) > 1 else (None, 0)
    if other is None and state.statistic and _divides(walk.consumers()):
        return state.over(broadcast(state.axes, walk.shape))
    axis = None if other is None else bias_axis(shape_of(other, output), walk.shape)
    if axis is None or state.offset not in (None, axis):
        raise NotInvariantError("its output is added to another tensor before any normalization (a residual sum)")
    return replace(state, axes=broadcast(state.axes, walk.shape), offset=axis)


def multiply(walk: Walk) -> Scaled | None:
    """A product: degrees add up."""
    a, b = _pair(walk)
    if a is not None and b is not None:
        return _of_degree(walk, _joined(walk, without_offset(a), without_offset(b), 1), a.degree + b.degree)
    state = without_offset(the_operand(walk))
    return state.over(broadcast(state.axes, walk.shape))


def divide(walk: Walk) -> Scaled | None:
    """A quotient: the degree of the denominator is taken off."""
    a, b = _pair(walk)
    if a is not None and b is not None and a.statistic and b.statistic:
        raise NotInvariantError("a statistic is divided by another, as n / (1 + n) in a capsule network is")
    if a is not None and b is not None:
        return _of_degree(walk, _joined(walk, without_offset(a), without_offset(b), 1), a.degree - b.degree)
    state = without_offset(the_operand(walk))
    over = state.over(broadcast(state.axes, walk.shape))
    return over if a is not None else replace(over, degree=-over.degree)


def clamp(walk: Walk) -> Scaled | None:
    """Bounded below by zero: a ReLU; what a normalization divides by, by an epsilon."""
    state = without_offset(the_operand(walk))
    low = walk.node._saved_min if len(walk.operands) == 1 else None  # a tensor would be an operand
    epsilon = 1e-4 if state.statistic else 0.0
    if low is None or not 0.0 <= float(low) <= epsilon or getattr(walk.node, "_saved_max", None) is not None:
        raise NotInvariantError("its output is clamped")
    return state


def _pair(walk: Walk) -> Operands:
    """Return both operands; a number is none."""
    return [*walk.operands, None][:2]


def _of_degree(walk: Walk, state: Scaled, degree: float) -> Scaled | None:
    """Return ``state`` with another degree; with degree 0 nothing is left that scales."""
    if abs(degree) > 1e-9:
        return replace(state, degree=degree)
    walk.absorbers.append((walk.node, state))
    return None


def _joined(walk: Walk, a: Scaled, b: Scaled, degree: float) -> Scaled:
    """Return the state of an elementwise function of two tensors that both scale."""
    axes = map(walk.joined, broadcast(a.axes, walk.shape), broadcast(b.axes, walk.shape))
    return Scaled(tuple(axes), degree, None, a.data or b.data, a.statistic and b.statistic)


def _divides(consumers: Sequence[tuple[Node, int]]) -> bool:
    """Whether a number that is added is an epsilon: it goes straight into a root or under a fraction."""
    return all(
        name_of(node) in ("Sqrt", "Rsqrt", "Reciprocal")
        or (name_of(node) == "Div" and position == 1)
        or (name_of(node) == "Pow" and not (_exponent(node) or 1.0) > 0.5)
        for node, position in consumers
    )


def _exponent(node: Node) -> float | None:
    """Return the exponent of a power, or None where it is a tensor."""
    return float(node._saved_exponent) if node.name() == "PowBackward0" else None
