"""Rules of normalizations and reductions."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lightning_normgeo.normalization.autograd.nodes import dimensions
from lightning_normgeo.symmetries.degrees import algebra
from lightning_normgeo.symmetries.degrees.degree import Degree
from lightning_normgeo.symmetries.degrees.nodes import signed, spatial_axes
from lightning_normgeo.symmetries.rules.context import Operation, added


def batch_norm(walk: Operation) -> Degree:
    """Rule for batch normalization: one degree for each channel, which is removed."""
    if not getattr(walk.node, "_saved_training", True):  # SyncBatchNorm's node exists in training only
        walk.vanish(0)
    elif walk.operands[0] is not None:
        _remove(walk, walk.operands[0], [axis for axis in range(walk.ndim) if axis != 1])
    return _affine(walk, 1)


def group_norm(walk: Operation) -> Degree:
    """Rule for group normalization: one degree for each sample and group of channels, which is removed."""
    degree, groups = walk.operands[0], int(walk.node._saved_group)
    if degree is not None:
        samples, channels, *positions = degree.shape
        shape = (samples, groups, channels // groups, *positions)
        walk.absorb(walk.over(degree.viewed(shape), range(2, len(shape))))
    return _affine(walk, 1)


def layer_norm(walk: Operation) -> Degree:
    """Rule for layer and RMS normalization: one degree for the last dimensions, which is removed."""
    first = walk.ndim - len(walk.node._saved_normalized_shape)
    if walk.operands[0] is not None:
        _remove(walk, walk.operands[0], range(first, walk.ndim))
    return _affine(walk, None)


def weight_norm(walk: Operation) -> Degree:
    """Rule for torch's weight normalization in one node: g·v/‖v‖."""
    v, g = walk.operands
    (kept,) = dimensions(walk.node._saved_dim, walk.ndim)
    if v is not None:
        _remove(walk, v, [axis for axis in range(walk.ndim) if axis != kept])
    return walk.constant if g is None else g.over(walk.shape, g.terms).plain()


def _remove(walk: Operation, degree: Degree, axes: Iterable[int]) -> None:
    live = walk.input_live(0)
    walk.absorb(walk.over(degree, list(axes), None if live.all() else live))


def _affine(walk: Operation, axis: int | None) -> Degree:
    """Return the degree of γ·x + β, where x has degree 0; γ and β lie along ``axis``, or along the last axes."""
    gamma, beta = (_placed(walk, degree, axis) for degree in (*walk.operands, None, None)[1:3])
    result = walk.constant if gamma is None else walk.filled(gamma)
    source = walk.graph.inputs[walk.node][2][0] if len(walk.operands) > 2 else None
    if source is None:
        if walk.name == "FusedRmsNorm" or walk.graph.constants.are_zero(walk.node):
            return result
        return added(walk, result, None, _shape_of_beta(walk, axis))  # there may be a frozen β, which has degree 0
    return walk.tidy(added(walk, result, beta, walk.constant.shape if beta is None else beta.shape))


def _shape_of_beta(walk: Operation, axis: int | None) -> tuple[int, ...]:
    first = walk.ndim - len(walk.node._saved_normalized_shape) if axis is None else 1
    last = walk.ndim if axis is None else 2
    return tuple(size if first <= k < last else 1 for k, size in enumerate(walk.shape))


def _placed(walk: Operation, degree: Degree | None, axis: int | None) -> Degree | None:
    if degree is None:
        return None
    if axis is None:
        return degree.lifted(walk.ndim)
    return degree.viewed([size if k == axis else 1 for k, size in enumerate(walk.shape)])


def reduction(power: float, second: float = 1.0) -> Callable[[Operation], Degree]:
    """Return the rule for a sum, norm or variance over axes, which has ``power`` times the degree of its input.

    Args:
        power: of the first output.
        second: of the second output, such as the mean beside a variance.
    """

    def rule(walk: Operation) -> Degree:
        degree = walk.only
        axes = dimensions(getattr(walk.node, "_saved_dim", None), len(degree.shape))
        kept = len(walk.shape) == len(degree.shape)
        return _over(walk, degree, axes, kept, power if walk.output == 0 else second)

    return rule


def norm(walk: Operation) -> Degree:
    """Rule for a norm over axes; that of order 0 counts the elements that are not zero, whatever their degrees."""
    order = getattr(walk.node, "_saved_ord", getattr(walk.node, "_saved_p", None))
    return walk.constant if order == 0 else reduction(1.0)(walk)


def _over(walk: Operation, degree: Degree, axes: list[int], kept: bool, power: float) -> Degree:
    degree = walk.over(degree, axes)
    if power != 1.0:
        degree = algebra.weighted(walk.exponents, degree, power)
    if not kept:
        terms = [
            term.reshape([size for axis, size in enumerate(term.shape) if axis not in axes]) for term in degree.terms
        ]
        degree = degree.over(walk.shape, terms)
    return walk.tidy(degree.plain(True))


def extremum(walk: Operation) -> Degree:
    """Rule for a maximum, minimum or median over one axis or all."""
    degree = walk.only
    saved = getattr(walk.node, "_saved_dim", None)
    axes = dimensions(saved, len(degree.shape))
    return _over(walk, degree, axes, len(walk.shape) == len(degree.shape), 1.0).plain(True)


def along(walk: Operation) -> Degree:
    """Rule for cumulative sums, sorting and the like: one degree along their axis."""
    degree = walk.only
    axis = signed(walk.node._saved_dim) % len(degree.shape)
    degree = walk.over(degree, [axis])
    return degree.over(walk.shape, degree.terms).plain()


def pooling(walk: Operation) -> Degree:
    """Rule for pooling and interpolation: one degree for all positions of a channel."""
    degree = walk.over(walk.only, spatial_axes(walk.node, walk.ndim))
    return degree.over(walk.shape, degree.terms).plain()
