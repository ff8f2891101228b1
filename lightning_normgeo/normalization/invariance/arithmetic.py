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
    dimensions,
    the_operand,
    without_offset,
)


def homogeneous(walk: Walk) -> Scaled | None:
    """A function of each element with f(αx) = αf(x): ReLU, absolute value, dropout."""
    return without_offset(the_operand(walk))


def power(exponent: float | None) -> Callable[[Walk], Scaled | None]:
    """Return the rule of a power of each element; that of the node for None."""

    def rule(walk: Walk) -> Scaled | None:
        state = without_offset(the_operand(walk))
        by = float(walk.node._saved_exponent) if exponent is None else exponent
        return _of_degree(walk, state, state.degree * by)

    return rule


def reduction(degree: float) -> Callable[[Walk], Scaled | None]:
    """Return the rule of a sum, mean, norm or deviation (degree 1) or a variance (degree 2) over some axes."""

    def rule(walk: Walk) -> Scaled | None:
        state = without_offset(the_operand(walk))
        gone = dimensions(getattr(walk.node, "_saved_dim", None), len(state.axes))
        walk.reduce([state.axes[d] for d in gone])
        if len(walk.shape) == len(state.axes):
            axes = [plain(1) if d in gone else axis for d, axis in enumerate(state.axes)]
        else:
            axes = [axis for d, axis in enumerate(state.axes) if d not in gone]
        return replace(state, axes=tuple(axes), degree=state.degree * degree)

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
    other = edges[1 if b is None else 0][0] if len(edges) > 1 else None
    if other is None and (not state.data or _is_epsilon(walk)):
        return state.over(broadcast(state.axes, walk.shape))
    axis = _bias_axis(other, walk.shape)
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
    if a is not None and b is not None:
        return _of_degree(walk, _joined(walk, without_offset(a), without_offset(b), 1), a.degree - b.degree)
    state = without_offset(the_operand(walk))
    over = state.over(broadcast(state.axes, walk.shape))
    return over if a is not None else replace(over, degree=-over.degree)


def clamp(walk: Walk) -> Scaled | None:
    """Bounded below by (nearly) zero: a ReLU, or an epsilon."""
    if not float(getattr(walk.node, "_saved_min", None) or 0.0) <= 1e-4 or getattr(walk.node, "_saved_max", None):
        raise NotInvariantError("its output is clamped")
    return without_offset(the_operand(walk))


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
    axes = []
    for left, right in zip(broadcast(a.axes, walk.shape), broadcast(b.axes, walk.shape), strict=True):
        if left.partial != right.partial:
            raise NotInvariantError("combined with other outputs")
        unlike = set(left.digits) ^ set(right.digits)
        walk.merge(sorted(unlike))
        axes.append(left if left.digits else right)
    return Scaled(tuple(axes), degree, None, a.data or b.data)


def _is_epsilon(walk: Walk) -> bool:
    """Whether what is added goes straight into a root or under a fraction."""
    roots = ("Sqrt", "Rsqrt", "Reciprocal", "Pow")
    return all(name.startswith(roots) or (name.startswith("Div") and at == 1) for name, at in walk.readers)


def _bias_axis(node: Node, shape: Sequence[int]) -> int | None:
    """Return the axis along which a parameter that is added varies, or None if it is no bias of one axis."""
    size: tuple[int, ...] | None = None
    while node is not None:
        if hasattr(node, "variable"):
            size = size or tuple(node.variable.shape)
            break
        if not node.name().startswith(("ToCopy", "View", "Unsqueeze", "Reshape", "Expand")):
            return None
        size = size or tuple(node._input_metadata[0].shape)
        node = node.next_functions[0][0]
    if node is None or size is None:
        return None
    wide = [d - len(size) + len(shape) for d, length in enumerate(size) if length > 1]
    return wide[0] if len(wide) == 1 else None
