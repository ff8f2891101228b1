"""Rules for operations that move, copy, join or pool values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from lightning_normgeo.normalization.invariance.node_context import (
    BiasNotScaledError,
    NodeContext,
    NotInvariantError,
    dimensions,
    the_operand,
    without_offset,
)
from lightning_normgeo.normalization.invariance.row_layout import (
    Axis,
    Piece,
    ScaleState,
    broadcast,
    fused,
    plain_axis,
    regroup,
)


def copy(walk: NodeContext) -> ScaleState | None:
    """Rule for copies and casts, which keep values and shape."""
    return the_operand(walk)


def pass_through(walk: NodeContext) -> ScaleState | None:
    """Rule for nodes that return all their inputs unchanged."""
    return walk.operands[walk.output]


def checkpoint(walk: NodeContext) -> ScaleState | None:
    """Rule for the outputs of a reentrant activation checkpoint whose inside has been added to the graph."""
    if walk.graph.inside.get(walk.node) is None:
        raise NotInvariantError("it enters a reentrant activation checkpoint, whose inside is not seen")
    return pass_through(walk)


def view(walk: NodeContext) -> ScaleState | None:
    """Rule for a view with another shape."""
    state = the_operand(walk)
    axes = regroup(state.axes, walk.shape)
    if axes is None:
        if any(axis.cut for axis in state.axes) or state.offset is not None:
            raise NotInvariantError(f"reshaped from {state.shape} to {walk.shape} before a normalization")
        walk.merge(state.axes)  # under a common factor for all rows, their positions do not matter
        return state.over([plain_axis(size) for size in walk.shape])
    return replace(state, axes=axes, offset=_moved_offset(state, axes))


def permute(walk: NodeContext) -> ScaleState | None:
    """Rule for a permutation of the axes."""
    state, node = the_operand(walk), walk.node
    order = list(range(len(state.axes)))
    if node.name().startswith("Permute"):
        order = dimensions(node._saved_dims, len(order))
    elif node.name().startswith("Transpose"):
        a, b = dimensions((node._saved_dim0, node._saved_dim1), len(order))
        order[a], order[b] = b, a
    else:
        order.reverse()
    offset = None if state.offset is None else order.index(state.offset)
    return replace(state, axes=tuple(state.axes[d] for d in order), offset=offset)


def expand(walk: NodeContext) -> ScaleState | None:
    """Rule for values repeated along new axes or axes of length 1."""
    state = the_operand(walk)
    shift = len(walk.shape) - len(state.axes)
    offset = None if state.offset is None else state.offset + shift
    return replace(state, axes=broadcast(state.axes, walk.shape), offset=offset)


def spatial(walk: NodeContext) -> ScaleState | None:
    """Rule for pooling, resampling and padding by reflection, which act on the positions of each channel separately."""
    state, name = the_operand(walk), walk.node.name()
    count = next(k for k in (1, 2, 3) if f"{k}D" in name.upper())
    kept = len(state.axes) - count
    # a bias per channel passes through a choice of positions (max, nearest); averages with zero padding change it
    if ("Max" not in name and "Nearest" not in name) or (state.offset or 0) >= kept:
        without_offset(state)
    walk.reduce(state.axes[kept:])
    return state.over([*state.axes[:kept], *map(plain_axis, walk.shape[kept:])])


def cut(walk: NodeContext) -> ScaleState | None:
    """Rule for slices and splits, which return a part of an axis."""
    state = the_operand(walk)
    (axis,) = dimensions(walk.node._saved_dim, len(state.axes))
    old = state.axes[axis]
    if len(walk.shape) < len(state.axes):
        if old.digits or old.cut or state.offset is not None:
            raise NotInvariantError("only some of its outputs are selected")
        return state.over([entry for d, entry in enumerate(state.axes) if d != axis])
    if walk.shape[axis] == old.size:
        return state
    cut_here = (walk.node, walk.output) if old.digits or old.cut else None
    new = Axis(walk.shape[axis], old.pieces, cut_here) if cut_here else plain_axis(walk.shape[axis])
    return state.over([new if d == axis else entry for d, entry in enumerate(state.axes)])


def reorder(walk: NodeContext) -> ScaleState | None:
    """Rule for flips and rolls, which reorder the entries of some axes."""
    state, dims = the_operand(walk), walk.node._saved_dims
    if not dims and any(axis.digits or axis.cut for axis in state.axes):  # torch.roll without dims rolls all flattened
        raise NotInvariantError("its outputs are moved over several axes")
    turned = dimensions(dims, len(state.axes))
    return state.over([_other_order(walk, axis) if d in turned else axis for d, axis in enumerate(state.axes)])


def repeat(walk: NodeContext) -> ScaleState | None:
    """Rule for copies side by side: their number is the most significant digit of a position, with stride 0."""
    state = the_operand(walk)
    shift = len(walk.shape) - len(state.axes)
    axes = []
    for axis, size in zip([plain_axis(1)] * shift + list(state.axes), walk.shape, strict=True):
        copies = (Piece(size // max(1, axis.size), 0), *axis.pieces)
        axes.append(axis if size == axis.size else Axis(size, fused(copies), (walk.node, 0) if axis.cut else None))
    return replace(state, axes=tuple(axes), offset=None if state.offset is None else state.offset + shift)


def windows(walk: NodeContext) -> ScaleState | None:
    """Rule for sliding windows along an axis (``Tensor.unfold``); the position in a window becomes the last axis."""
    state = the_operand(walk)
    (dim,) = dimensions(walk.node._saved_dimension, len(state.axes))
    if state.axes[dim].digits or state.axes[dim].cut or state.offset == dim:
        raise NotInvariantError("windows are taken over its outputs")
    axes = [plain_axis(walk.shape[dim]) if d == dim else axis for d, axis in enumerate(state.axes)]
    return state.over([*axes, plain_axis(walk.shape[-1])])


def stack(walk: NodeContext) -> ScaleState | None:
    """Rule for tensors stacked along a new axis."""
    scaled = [operand for operand in walk.operands if operand is not None]
    (dim,) = dimensions(walk.node._saved_dim, len(walk.shape))
    if any((other.degree, other.offset) != (scaled[0].degree, scaled[0].offset) for other in scaled):
        raise NotInvariantError("stacked with outputs that scale in another way")
    axes = list(scaled[0].axes)
    for other in scaled[1:]:
        axes = [walk.joined(a, b) for a, b in zip(axes, other.axes, strict=True)]
    new = plain_axis(walk.shape[dim])
    axes.insert(dim, new if len(scaled) == len(walk.operands) else new._replace(cut=(walk.node, walk.output)))
    offset = scaled[0].offset
    return replace(scaled[0], axes=tuple(axes), offset=None if offset is None else offset + (offset >= dim))


def concatenate(walk: NodeContext) -> ScaleState | None:
    """Rule for tensors concatenated along one axis."""
    scaled = [operand for operand in walk.operands if operand is not None]
    state = scaled[0]
    if any((other.degree, other.offset) != (state.degree, state.offset) for other in scaled):
        raise NotInvariantError("concatenated with outputs that scale in another way")
    (axis,) = dimensions(walk.node._saved_dim, len(state.axes))
    axes = list(state.axes)
    for d in set(range(len(axes))) - {axis}:
        for other in scaled[1:]:
            axes[d] = walk.joined(axes[d], other.axes[d])
    everything = len(scaled) == len(walk.operands) or (state.offset is None and walk.beside_zeros())
    if everything and not any(other.axes[axis].digits or other.axes[axis].cut for other in scaled):
        axes[axis] = plain_axis(walk.shape[axis])
    else:
        axes[axis] = Axis(walk.shape[axis], axes[axis].pieces, (walk.node, walk.output))
    return state.over(axes)


def _other_order(walk: NodeContext, axis: Axis) -> Axis:
    return axis._replace(cut=(walk.node, walk.output)) if axis.digits or axis.cut else axis


def _moved_offset(state: ScaleState, axes: Sequence[Axis]) -> int | None:
    """Return the axis that contains the axis of the offset after a view; None if there is no offset."""
    if state.offset is None:
        return None
    before = prod(axis.size for axis in state.axes[: state.offset])
    after, size = 1, state.axes[state.offset].size
    for d, axis in enumerate(axes):
        if after <= before and after * axis.size >= before * size and axis.size > 1:
            return d
        after *= axis.size
    raise BiasNotScaledError("a bias is added before it is reshaped")
