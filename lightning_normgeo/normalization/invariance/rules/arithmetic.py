"""Rules for arithmetic, in which degrees of homogeneity add up or cancel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lightning_normgeo.normalization.autograd.graph import Node
from lightning_normgeo.normalization.invariance.node_context import (
    NodeContext,
    NotInvariantError,
    Operands,
    bias_axis,
    dimensions,
    name_of,
    shape_of,
    the_operand,
    without_offset,
)
from lightning_normgeo.normalization.invariance.row_layout import ScaleState, broadcast, plain_axis


def homogeneous(walk: NodeContext) -> ScaleState | None:
    """Rule for elementwise functions with f(αx) = αf(x): ReLU, absolute value, dropout, PReLU as a function of x."""
    if walk.operands[0] is None:
        raise NotInvariantError(f"it scales a parameter of {name_of(walk.node)}")
    return without_offset(the_operand(walk))


def power(exponent: float | None) -> Callable[[NodeContext], ScaleState | None]:
    """Return the rule for an elementwise power.

    Args:
        exponent: of the power; None for the one saved on the node.
    """

    def rule(walk: NodeContext) -> ScaleState | None:
        state = without_offset(the_operand(walk))
        by = _exponent(walk.node) if exponent is None else exponent
        if by is None:
            raise NotInvariantError("a power that is computed is taken of it, or with it as the exponent")
        return _of_degree(walk, state, state.degree * by)

    return rule


def reduction(*degrees: float) -> Callable[[NodeContext], ScaleState | None]:
    """Return the rule for a reduction over some axes: degree 1 for a sum, mean, norm or deviation, 2 for a variance.

    Args:
        degrees: degree of homogeneity of each output.
    """

    def rule(walk: NodeContext) -> ScaleState | None:
        state = without_offset(the_operand(walk))
        gone = dimensions(getattr(walk.node, "_saved_dim", None), len(state.axes))
        walk.reduce([state.axes[d] for d in gone])
        if len(walk.shape) == len(state.axes):
            axes = [plain_axis(1) if d in gone else axis for d, axis in enumerate(state.axes)]
        else:
            axes = [axis for d, axis in enumerate(state.axes) if d not in gone]
        return replace(state, axes=tuple(axes), degree=state.degree * degrees[walk.output], statistic=True)

    return rule


def along(walk: NodeContext) -> ScaleState | None:
    """Rule for sorting, ranking and cumulative sums along one axis, homogeneous in all entries of the axis jointly."""
    state = without_offset(the_operand(walk))
    (dim,) = dimensions(walk.node._saved_dim, len(state.axes))
    walk.reduce([state.axes[dim]])
    new = [plain_axis(walk.shape[dim])] if len(walk.shape) == len(state.axes) else []
    return state.over([*state.axes[:dim], *new, *state.axes[dim + 1 :]])


def add(walk: NodeContext) -> ScaleState | None:
    """Rule for a sum of two tensors that scale alike, of one and a bias, or of a statistic and an epsilon."""
    a, b = _pair(walk)
    if a is not None and b is not None:
        return walk.alike(a, b)
    state, edges = the_operand(walk), walk.node.next_functions
    other, output = edges[1 if b is None else 0] if len(edges) > 1 else (None, 0)
    # The ε in sqrt(σ² + ε) breaks homogeneity, but only by ε/σ², as in torch's own normalization nodes: it is ignored.
    if other is None and state.statistic and _divides(walk.consumers()):
        return state.over(broadcast(state.axes, walk.shape))
    return _with_bias(walk, state, other, output)


def add_product(sign: int) -> Callable[[NodeContext], ScaleState | None]:
    """Return the rule for the sum of a tensor and the product or quotient of two others.

    Args:
        sign: 1 for a product, -1 for a quotient.
    """

    def rule(walk: NodeContext) -> ScaleState | None:
        base, a, b = walk.operands
        product = _product(walk, a, b, sign)
        if base is not None and product is not None:
            return walk.alike(base, product)
        if base is not None:
            raise NotInvariantError("a product is added to its output before any normalization (a residual sum)")
        return None if product is None else _with_bias(walk, product, *walk.node.next_functions[0])

    return rule


def together(walk: NodeContext) -> ScaleState | None:
    """Rule for elementwise functions that are homogeneous in two tensors jointly: a maximum, an interpolation."""
    a, b, *weights = walk.operands
    if any(weights):
        raise NotInvariantError(f"it scales a parameter of {name_of(walk.node)}")
    if a is not None and b is not None:
        return walk.alike(a, b)
    if not walk.beside_zeros():
        raise NotInvariantError("compared or mixed with another tensor")
    state = without_offset(the_operand(walk))
    return state.over(broadcast(state.axes, walk.shape))


def multiply(walk: NodeContext) -> ScaleState | None:
    """Rule for an elementwise product, in which degrees add up."""
    a, b = _pair(walk)
    return _product(walk, a, b, 1)


def divide(walk: NodeContext) -> ScaleState | None:
    """Rule for an elementwise quotient, in which the degree of the denominator is subtracted."""
    a, b = _pair(walk)
    # ``add`` takes any number in a denominator for an ε, but in n / (1 + n) the 1 is none
    if a is not None and b is not None and a.statistic and b.statistic:
        raise NotInvariantError("a statistic is divided by another, as n / (1 + n) in a capsule network is")
    return _product(walk, a, b, -1)


def clamp(walk: NodeContext) -> ScaleState | None:
    """Rule for a bound of zero below (a ReLU) or above, or of an epsilon below a statistic that is divided by."""
    state = without_offset(the_operand(walk))
    low = high = None
    if len(walk.operands) == 1:  # bounds that are tensors are further operands, and no numbers
        low, high = (getattr(walk.node, f"_saved_{bound}", None) for bound in ("min", "max"))
    epsilon = 1e-4 if state.statistic else 0.0
    below = low is not None and high is None and 0.0 <= float(low) <= epsilon
    above = low is None and high is not None and float(high) == 0.0
    if not (below or above):
        raise NotInvariantError("its output is clamped")
    return state


def _pair(walk: NodeContext) -> Operands:
    """Return both operands; autograd records no input for a number, which is None here."""
    return [*walk.operands, None][:2]


def _of_degree(walk: NodeContext, state: ScaleState, degree: float) -> ScaleState | None:
    """Return ``state`` with another degree; degree 0 cancels the scale and ends the path, as a normalization does."""
    if abs(degree) > 1e-9:  # exponents such as 1/3 are rounded
        return replace(state, degree=degree)
    walk.absorbers.append((walk.node, state))
    return None


def _product(walk: NodeContext, a: ScaleState | None, b: ScaleState | None, sign: int) -> ScaleState | None:
    """Return the state of a · b for sign 1, of a / b for sign -1; None if it does not scale."""
    if a is not None and b is not None:
        both = walk.combined(without_offset(a), without_offset(b), 1)
        return _of_degree(walk, both, a.degree + sign * b.degree)
    one = a if a is not None else b
    if one is None:
        return None
    over = without_offset(one).over(broadcast(one.axes, walk.shape))
    return over if a is not None else replace(over, degree=sign * over.degree)


def _with_bias(walk: NodeContext, state: ScaleState, other: Node | None, output: int) -> ScaleState:
    """Return the state after adding a tensor that does not scale, such as a bias; it may vary along one axis only."""
    axis = None if other is None else bias_axis(shape_of(other, output), walk.shape)
    if axis is None or state.offset not in (None, axis):
        raise NotInvariantError("its output is added to another tensor before any normalization (a residual sum)")
    return replace(state, axes=broadcast(state.axes, walk.shape), offset=axis)


def _divides(consumers: Sequence[tuple[Node, int]]) -> bool:
    """Whether a number added to a statistic is an epsilon: all readers of the sum take its root or divide by it."""
    return all(
        name_of(node) in ("Sqrt", "Rsqrt", "Reciprocal")
        or (name_of(node) == "Div" and position == 1)
        or (name_of(node) == "Pow" and not (_exponent(node) or 1.0) > 0.5)
        for node, position in consumers
    )


def _exponent(node: Node) -> float | None:
    """Return the exponent of a power; None if it is a tensor."""
    return float(node._saved_exponent) if node.name() == "PowBackward0" else None
