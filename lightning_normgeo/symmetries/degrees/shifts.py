"""Shifts of tensors that leave the results of a graph unchanged: what centering and softmax do not see.

A bias in front of a batch normalization has no effect, nor has the bias of the keys of an attention. Such a bias need
not scale with the weight beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np

from lightning_normgeo.normalization.autograd.graph import Edge, Graph, Node
from lightning_normgeo.normalization.autograd.nodes import dimensions, name_of
from lightning_normgeo.symmetries.degrees.degree import joint_axes, viewed
from lightning_normgeo.symmetries.degrees.liveness import any_along, reduced, shrunk
from lightning_normgeo.symmetries.degrees.nodes import (
    ATTENTIONS,
    BATCH_NORMS,
    COPIES,
    CUTS,
    PERMUTATIONS,
    POOLINGS,
    SOFTMAX,
    VIEWS,
    concatenation,
    cuts,
    input_shape,
    permutation,
    spatial_axes,
)
from lightning_normgeo.symmetries.equations.exponents import Mask


@dataclass(frozen=True)
class Shift:
    """A set of shifts of a tensor without effect: all that are constant along ``axes`` and zero outside of ``mask``.

    Attributes:
        axes: axes along which the shift has to be constant.
        mask: elements that may be shifted, broadcastable to the tensor.
        of_scores: whether nothing but softmax ignores them, which also ignores elements of −∞.
    """

    axes: frozenset[int]
    mask: Mask
    of_scores: bool = False

    def removes(self, shape: tuple[int, ...], ndim: int) -> bool:
        """Whether a tensor of this shape, added with broadcasting, is constant along the axes."""
        front = ndim - len(shape)
        return all(axis < front or shape[axis - front] == 1 for axis in self.axes)


Backward = Callable[[Graph, Node, int, Shift], "Shift | None"]


def shifts_without_effect(graph: Graph) -> dict[Edge, Shift]:
    """Return for each tensor the shifts that are known to have no effect; tensors without any are left out.

    Cost: one walk over the graph.
    """
    found: dict[Edge, Shift] = {}
    for node in sorted(graph.outputs, key=graph.order.__getitem__, reverse=True):
        for output in graph.outputs[node]:
            if (node, output) in graph.results:
                continue
            shift = _common(
                _of_input(graph, reader, position, found) for reader, position in graph.readers[node, output]
            )
            if shift is not None:
                found[node, output] = shift
    return found


def _common(shifts: Iterable[Shift | None]) -> Shift | None:
    """Return the shifts that all readers ignore."""
    axes: frozenset[int] = frozenset()
    mask, of_scores = None, True
    for shift in shifts:
        if shift is None:
            return None
        axes, mask = axes | shift.axes, shift.mask if mask is None else mask & shift.mask
        of_scores &= shift.of_scores
    return Shift(axes, shrunk(mask), of_scores) if mask is not None and mask.any() else None


def _of_input(graph: Graph, reader: Node, position: int, found: dict[Edge, Shift]) -> Shift | None:
    shape = input_shape(graph, reader, position) or ()
    name = graph.name_of(reader)
    if name in _CENTERING and position == _CENTERING[name]:
        axes = _centered(reader, name, len(shape))
        return None if axes is None else Shift(frozenset(axes), np.ones((1,) * len(shape), bool), name in _SOFTMAX)
    if name in CUTS:
        return _cut(graph, reader, shape, found)
    shift, rule = found.get((reader, 0)), _RULES.get(name)
    if shift is None or rule is None or len(graph.outputs.get(reader, ())) > 1:
        return None
    return rule(graph, reader, position, shift)


_CENTERING = {
    **dict.fromkeys(BATCH_NORMS, 0),
    **dict.fromkeys(("NativeLayerNorm", "NativeGroupNorm", *SOFTMAX), 0),
    **dict.fromkeys(ATTENTIONS, 1),
}
"""The input of which each of these operations ignores shifts."""
_SOFTMAX = ("Softmax", "SafeSoftmax")


def _centered(node: Node, name: str, ndim: int) -> list[int] | None:
    """Return the axes along which an operation ignores constants."""
    if name in BATCH_NORMS:
        return [axis for axis in range(ndim) if axis != 1] if getattr(node, "_saved_training", True) else None
    if name == "NativeLayerNorm":
        return list(range(ndim - len(node._saved_normalized_shape), ndim))
    if name == "NativeGroupNorm":  # one channel in each group: a constant for each channel
        return list(range(2 if int(node._saved_group) == int(node._saved_C) else 1, ndim))
    if name in SOFTMAX:
        return dimensions(node._saved_dim, ndim)
    return [ndim - 2]  # keys: all scores of a query change alike


def _cut(graph: Graph, reader: Node, shape: tuple[int, ...], found: dict[Edge, Shift]) -> Shift | None:
    """Shifts of a tensor of which parts are read; what is not read may be shifted at will."""
    axis, parts = cuts(reader, shape)
    axes: set[int] = set()
    pieces = [np.ones((1,) * (len(shape) - 1), bool)] * shape[axis]
    for output in graph.outputs.get(reader, ()):
        shift, (indices, keep) = found.get((reader, output)), parts[output]
        for k, index in enumerate(indices):
            if shift is None:
                pieces[index] = np.zeros((1,) * (len(shape) - 1), bool)
            else:
                part = shift.mask.take(min(k, shift.mask.shape[axis] - 1), axis) if keep else shift.mask
                pieces[index] = pieces[index] & part
        if shift is not None:
            axes |= {own if keep or own < axis else own + 1 for own in shift.axes}
    mask = shrunk(np.stack(np.broadcast_arrays(*pieces), axis))
    return Shift(frozenset(axes), mask) if mask.any() else None  # of parts with other scores, so not only of scores


def _same(graph: Graph, node: Node, position: int, shift: Shift) -> Shift | None:
    return shift


_BY_A_NUMBER = ("MulBackward1", "DivBackward1")
"""Products and quotients with a number that torch records as such, as in the fused attention with dropout."""


def _by_a_constant(graph: Graph, node: Node, position: int, shift: Shift) -> Shift | None:
    """Products with a number, and masks of −∞ in front of a softmax."""
    masks = name_of(node) not in ("Mul", "Div")
    by_number = node.name() in _BY_A_NUMBER
    known = by_number or ((shift.of_scores or not masks) and graph.constants.let_shifts_through(node))
    return _added(graph, node, position, shift) if known else None


def _added(graph: Graph, node: Node, position: int, shift: Shift) -> Shift | None:
    """Sums, and copies along axes: shifts of an input that is broadcast."""
    shape = input_shape(graph, node, position) or ()
    front = shift.mask.ndim - len(shape)
    axes = frozenset(axis - front for axis in shift.axes if axis >= front and shape[axis - front] > 1)
    return replace(shift, axes=axes, mask=_whole(shift.mask, shape))


def _whole(mask: Mask, shape: tuple[int, ...]) -> Mask:
    """Return the elements of a tensor of which all copies may be shifted."""
    return ~reduced(~mask, shape)


def _permute(graph: Graph, node: Node, position: int, shift: Shift) -> Shift | None:
    order = permutation(node, shift.mask.ndim)
    axes = frozenset(order[axis] for axis in shift.axes)
    return replace(shift, axes=axes, mask=shift.mask.transpose(np.argsort(order)))


def _view(graph: Graph, node: Node, position: int, shift: Shift) -> Shift | None:
    old, new = graph.shape_of(node), input_shape(graph, node, position) or ()
    axes: set[int] = set()
    for before, after in joint_axes(old, new):
        if shift.axes & {axis for axis in before if old[axis] > 1}:
            axes |= {axis for axis in after if new[axis] > 1}  # constant along more axes: fewer shifts
    mask = shrunk(viewed(shift.mask, old, new))  # type: ignore[arg-type]
    return replace(shift, axes=frozenset(axes), mask=mask)


def _concatenated(graph: Graph, node: Node, position: int, shift: Shift) -> Shift | None:
    place, shape = concatenation(graph, node, position), input_shape(graph, node, position) or ()
    if place is None or place[0] in shift.axes:
        return None
    axis, start = place
    mask = shift.mask
    if mask.shape[axis] > 1:
        mask = mask.take(range(start, start + shape[axis]), axis)
    return replace(shift, mask=mask)


def _product(graph: Graph, node: Node, position: int, shift: Shift) -> Shift | None:
    """Matrix products: a shift of the left factor that is constant over its rows is so in the result."""
    if name_of(node) in ("Addmm", "Baddbmm"):
        if position == 0:
            return _added(graph, node, position, shift)
        position -= 1
    ndim = shift.mask.ndim
    rows = ndim - 2 if position == 0 else ndim - 1
    if not shift.axes <= {rows} or not shift.mask.all():
        return None
    return Shift(shift.axes, np.ones((1,) * ndim, bool))


def _linear(graph: Graph, node: Node, position: int, shift: Shift) -> Shift | None:
    return _added(graph, node, position, shift) if position == 2 else None


def _bias_of_layer_norm(graph: Graph, node: Node, position: int, shift: Shift) -> Shift | None:
    return _added(graph, node, position, shift) if position == 2 else None


def _bias_of_channels(graph: Graph, node: Node, position: int, shift: Shift) -> Shift | None:
    if position != 2:
        return None
    others = [axis for axis in range(shift.mask.ndim) if axis != 1]
    mask = ~any_along(~shift.mask, others).reshape(-1)
    return Shift(frozenset({0} if 1 in shift.axes else ()), mask)


def _pooled(graph: Graph, node: Node, position: int, shift: Shift) -> Shift | None:
    """Maxima, means and interpolations of pixels: what is the same at all of them stays so."""
    pixels = spatial_axes(node, shift.mask.ndim)
    apart = not set(pixels) <= shift.axes or any(shift.mask.shape[axis] > 1 for axis in pixels)
    zeros = name_of(node).startswith("AvgPool") and (any(node._saved_padding) or node._saved_divisor_override)
    return None if apart or zeros else shift


_RULES: dict[str, Backward] = {
    **dict.fromkeys(COPIES | {"Neg"}, _same),
    **dict.fromkeys(("Mul", "Div", "MaskedFill", "Where"), _by_a_constant),
    **dict.fromkeys(("Add", "Sub", "Expand"), _added),
    **dict.fromkeys(PERMUTATIONS, _permute),
    **dict.fromkeys(VIEWS, _view),
    "Cat": _concatenated,
    **dict.fromkeys(POOLINGS, _pooled),
    **dict.fromkeys(("Mm", "Addmm", "Bmm", "Baddbmm"), _product),
    "Linear": _linear,
    "NativeLayerNorm": _bias_of_layer_norm,
    **dict.fromkeys(BATCH_NORMS | {"Convolution", "NativeGroupNorm"}, _bias_of_channels),
}
