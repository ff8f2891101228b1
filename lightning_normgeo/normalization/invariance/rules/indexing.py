"""Rules for indexing: entries picked from a tensor, and entries written or added into another tensor."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from lightning_normgeo.normalization.invariance.node_context import (
    UNKNOWN_CONSTANT,
    BiasNotScaledError,
    NodeContext,
    NotInvariantError,
    dimensions,
    name_of,
    the_operand,
    without_offset,
)
from lightning_normgeo.normalization.invariance.row_layout import Axis, ScaleState, broadcast, picked, plain_axis


def select(walk: NodeContext) -> ScaleState | None:
    """Rule for entries picked along one axis by a vector of indices."""
    state = _first(walk)
    (dim,) = dimensions(walk.node._saved_dim, len(state.axes))
    return _at(walk, state, dim, 1)


def index(walk: NodeContext) -> ScaleState | None:
    """Rule for entries picked by tensors of indices or by a mask, such as ``y[:, i]``."""
    state = _first(walk)
    taken, rank = _indices(walk)
    if len(taken) == 1:
        return _at(walk, state, taken[0], rank)
    if not taken or any(state.axes[d].digits or state.axes[d].cut for d in taken) or state.offset is not None:
        raise NotInvariantError("only some of its outputs are selected, by several indices")
    kept = [axis for d, axis in enumerate(state.axes) if d not in taken]
    neighbors = taken == list(range(taken[0], taken[0] + len(taken)))
    at = taken[0] if neighbors else 0  # torch puts the new axes first if the indexed dimensions are not adjacent
    return state.over([*kept[:at], *map(plain_axis, walk.shape[at : at + rank]), *kept[at:]])


def embedding(walk: NodeContext) -> ScaleState | None:
    """Rule for rows looked up in an embedding table, each as often as its token occurs in the batch."""
    state = without_offset(_first(walk))
    return replace(_at(walk, state, 0, len(walk.shape) - 1), data=True)


def gather(walk: NodeContext) -> ScaleState | None:
    """Rule for entries picked along one axis by indices that differ along the other axes."""
    state = _first(walk)
    (dim,) = dimensions(walk.node._saved_dim, len(state.axes))
    old = state.axes[dim]
    if old.digits or old.cut or state.offset == dim:
        raise NotInvariantError("its outputs are picked by indices that differ from place to place")
    axes = [plain_axis(size) if d == dim else part(walk, state.axes[d], size) for d, size in enumerate(walk.shape)]
    return state.over(axes)


def scatter(walk: NodeContext) -> ScaleState | None:
    """Rule for entries written or added along one axis of a tensor that scales alike or is zero."""
    state = _written(walk)
    (dim,) = dimensions(walk.node._saved_dim, len(state.axes))
    if getattr(walk.node, "_saved_reduce", "sum") not in ("sum", "mean", "amax", "amin"):
        raise NotInvariantError("its outputs are multiplied with each other")
    return _into(walk, state, dim)


def put(walk: NodeContext) -> ScaleState | None:
    """Rule for entries written or added at tensors of indices, as in ``y[i] = x``."""
    base, values = walk.operands
    if values is None and base is not None:
        return _beside_zeros(walk)
    state = _written(walk)
    taken, rank = _indices(walk)
    if len(taken) == rank == 1 and len(state.axes) == len(walk.shape):
        return _into(walk, state, taken[0])
    if any(axis.cut or axis.digits for axis in state.axes) or walk.operands[0] is not None:
        raise NotInvariantError("its outputs are written into another tensor by several indices")
    return state.over([plain_axis(size) for size in walk.shape])


def where(walk: NodeContext) -> ScaleState | None:
    """Rule for a choice between two tensors that scale alike, or of which one is zero.

    The condition counts as a constant: it has no gradient, so that its dependence on the weight does not show.
    """
    a, b = walk.operands
    if a is not None and b is not None:
        return walk.alike(a, b)
    return _beside_zeros(walk)


def masked_fill(walk: NodeContext) -> ScaleState | None:
    """Rule for zeros written by a mask; the mask counts as a constant."""
    return _beside_zeros(walk)


def pad(walk: NodeContext) -> ScaleState | None:
    """Rule for padding with a constant; the graph alone does not show whether the constant is zero."""
    state = without_offset(the_operand(walk))
    axes = []
    for axis, size in zip(state.axes, walk.shape, strict=True):
        rowless = not axis.digits and not axis.cut
        if size == axis.size:
            axes.append(axis)
        elif rowless and walk.beside_zeros():
            axes.append(plain_axis(size))  # zeros scale with every row
        else:
            axes.append(Axis(size, axis.pieces, _here(walk)))
    return state.over(axes)


def part(walk: NodeContext, axis: Axis, size: int) -> Axis:
    """Return an axis of which only ``size`` entries are left, at unknown positions."""
    if size == axis.size:
        return axis
    return Axis(size, axis.pieces, _here(walk)) if axis.digits or axis.cut else plain_axis(size)


def _first(walk: NodeContext) -> ScaleState:
    state = the_operand(walk)
    if walk.operands[0] is None:
        raise NotInvariantError(f"it scales another input of {name_of(walk.node)}")
    return state


def _here(walk: NodeContext) -> tuple[Any, int]:
    return walk.node, walk.output


def _at(walk: NodeContext, state: ScaleState, dim: int, rank: int) -> ScaleState:
    """Replace axis ``dim`` by ``rank`` axes of entries picked from it."""
    old, sizes = state.axes[dim], walk.shape[dim : dim + rank]
    if state.offset == dim and rank != 1:
        raise BiasNotScaledError("a bias is added before its entries are picked")
    new = [plain_axis(size) for size in sizes]
    if old.digits or old.cut:
        if rank == 0:
            raise NotInvariantError("only some of its outputs are selected")
        new = [picked(size, prod(sizes[i + 1 :]), _here(walk)) for i, size in enumerate(sizes)]
        # one axis with the mark of the cut is enough; without it an axis of length 1 can be squeezed away later
        if prod(sizes) > 1:
            new = [axis if axis.size > 1 else plain_axis(1) for axis in new]
    offset = state.offset
    if offset is not None and offset > dim:
        offset += rank - 1
    return replace(state, axes=(*state.axes[:dim], *new, *state.axes[dim + 1 :]), offset=offset)


def _indices(walk: NodeContext) -> tuple[list[int], int]:
    """Return the indexed dimensions, and the number of axes that replace them.

    The indices are read in their raw form, since unpacking them runs the hooks for saved tensors: activation
    checkpointing would compute the forward pass again.
    """
    taken: list[int] = []
    dim, rank = 0, 0
    for saved in walk.node._raw_saved_indices:
        value = saved.data
        if value is None:  # a slice
            dim += 1
            continue
        if not isinstance(value, Tensor):
            raise NotInvariantError("its outputs are picked by indices that are kept elsewhere")
        mask = value.dtype in (torch.bool, torch.uint8)
        wide = value.ndim if mask else 1
        taken += range(dim, dim + wide)
        dim, rank = dim + wide, max(rank, 1 if mask else value.ndim)
    return taken, rank


def _written(walk: NodeContext) -> ScaleState:
    """Return the state of the values that are written; the tensor they are written into scales alike or is zero."""
    base, values, *others = [*walk.operands, None]
    if values is None or any(others):
        raise NotInvariantError("other values are written into its output")
    without_offset(values)
    if base is None:
        if not (walk.beside_zeros() or _into_saved_zeros(walk)):
            raise NotInvariantError(f"it is written into a tensor {UNKNOWN_CONSTANT}")
    elif base.degree != values.degree or base.offset is not None:
        raise NotInvariantError("it is written into a tensor that scales in another way")
    return values


def _into_saved_zeros(walk: NodeContext) -> bool:
    """Whether the tensor that is written into is saved on the node and is zero.

    Cost: on a GPU a synchronization, once for all graphs of the same operations.
    """
    saved = getattr(getattr(walk.node, "_raw_saved_self", None), "data", None)
    constant = walk.node.next_functions[0][0] is None
    return constant and isinstance(saved, Tensor) and not saved.is_meta and not bool(saved.any())


def _into(walk: NodeContext, values: ScaleState, dim: int) -> ScaleState:
    """Move entries to other positions along one axis, where entries of several positions may be added up."""
    walk.reduce([values.axes[dim]])
    axes = [plain_axis(size) if d == dim else _fitting(values.axes[d], size) for d, size in enumerate(walk.shape)]
    written = values.over(axes)
    base = walk.operands[0]
    return written if base is None else walk.alike(base, written)


def _fitting(axis: Axis, size: int) -> Axis:
    if axis.size == size:
        return axis
    if axis.digits or axis.cut:
        raise NotInvariantError("its outputs are written into some places of a larger tensor")
    return plain_axis(size)


def _beside_zeros(walk: NodeContext) -> ScaleState:
    if not walk.beside_zeros():
        raise NotInvariantError(f"its output stands beside a constant {UNKNOWN_CONSTANT}")
    state = without_offset(the_operand(walk))
    return state.over(broadcast(state.axes, walk.shape))
