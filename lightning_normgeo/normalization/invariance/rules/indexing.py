"""Rules for indices: entries picked from a tensor, and written or added into another."""

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
from lightning_normgeo.normalization.invariance.row_layout import Axis, ScaleState, broadcast, picked, plain


def select(walk: NodeContext) -> ScaleState | None:
    """Entries along one axis, by a vector of indices."""
    state = _first(walk)
    (dim,) = dimensions(walk.node._saved_dim, len(state.axes))
    return _at(walk, state, dim, 1)


def index(walk: NodeContext) -> ScaleState | None:
    """Entries by tensors of indices, or a mask, as ``y[:, i]`` is."""
    state = _first(walk)
    taken, rank = _indices(walk)
    if len(taken) == 1:
        return _at(walk, state, taken[0], rank)
    if not taken or any(state.axes[d].digits or state.axes[d].cut for d in taken) or state.offset is not None:
        raise NotInvariantError("only some of its outputs are selected, by several indices")
    kept = [axis for d, axis in enumerate(state.axes) if d not in taken]
    neighbours = taken == list(range(taken[0], taken[0] + len(taken)))
    at = taken[0] if neighbours else 0  # torch puts the axes of indices apart from each other first
    return state.over([*kept[:at], *map(plain, walk.shape[at : at + rank]), *kept[at:]])


def embedding(walk: NodeContext) -> ScaleState | None:
    """Rows of a table; each entry of the batch is a row, the same row as often as its token occurs."""
    state = without_offset(_first(walk))
    return replace(_at(walk, state, 0, len(walk.shape) - 1), data=True)


def gather(walk: NodeContext) -> ScaleState | None:
    """Entries along one axis, by indices that differ along the others."""
    state = _first(walk)
    (dim,) = dimensions(walk.node._saved_dim, len(state.axes))
    old = state.axes[dim]
    if old.digits or old.cut or state.offset == dim:
        raise NotInvariantError("its outputs are picked by indices that differ from place to place")
    axes = [plain(size) if d == dim else part(walk, state.axes[d], size) for d, size in enumerate(walk.shape)]
    return state.over(axes)


def scatter(walk: NodeContext) -> ScaleState | None:
    """Entries written or added along one axis of another tensor: of one that scales alike, or of zeros."""
    state = _written(walk)
    (dim,) = dimensions(walk.node._saved_dim, len(state.axes))
    if getattr(walk.node, "_saved_reduce", "sum") not in ("sum", "mean", "amax", "amin"):
        raise NotInvariantError("its outputs are multiplied with each other")
    return _into(walk, state, dim)


def put(walk: NodeContext) -> ScaleState | None:
    """Entries written or added at tensors of indices, as ``y[i] = x`` does."""
    base, source = walk.operands
    if source is None and base is not None:
        return _beside_zeros(walk)
    state = _written(walk)
    taken, rank = _indices(walk)
    if len(taken) == rank == 1 and len(state.axes) == len(walk.shape):
        return _into(walk, state, taken[0])
    if any(axis.cut or axis.digits for axis in state.axes) or walk.operands[0] is not None:
        raise NotInvariantError("its outputs are written into another tensor by several indices")
    return state.over([plain(size) for size in walk.shape])


def where(walk: NodeContext) -> ScaleState | None:
    """One of two tensors at each place: both scale alike, or one is zero. The condition counts as a constant."""
    a, b = walk.operands
    if a is not None and b is not None:
        return walk.alike(a, b)
    return _beside_zeros(walk)


def masked_fill(walk: NodeContext) -> ScaleState | None:
    """Zeros written by a mask, which counts as a constant."""
    return _beside_zeros(walk)


def pad(walk: NodeContext) -> ScaleState | None:
    """A frame of zeros, or of another constant: the graph does not tell."""
    state = without_offset(the_operand(walk))
    axes = []
    for axis, size in zip(state.axes, walk.shape, strict=True):
        whole = not axis.digits and not axis.cut and walk.beside_zeros()
        axes.append(axis if size == axis.size else plain(size) if whole else Axis(size, axis.pieces, _here(walk)))
    return state.over(axes)


def part(walk: NodeContext, axis: Axis, size: int) -> Axis:
    """Return an axis of which only the first or some other ``size`` entries are left."""
    if size == axis.size:
        return axis
    return Axis(size, axis.pieces, _here(walk)) if axis.digits or axis.cut else plain(size)


def _first(walk: NodeContext) -> ScaleState:
    state = the_operand(walk)
    if walk.operands[0] is None:
        raise NotInvariantError(f"it scales another input of {name_of(walk.node)}")
    return state


def _here(walk: NodeContext) -> tuple[Any, int]:
    return walk.node, walk.output


def _at(walk: NodeContext, state: ScaleState, dim: int, rank: int) -> ScaleState:
    """Put ``rank`` axes of picked entries in the place of one axis."""
    old, sizes = state.axes[dim], walk.shape[dim : dim + rank]
    if state.offset == dim and rank != 1:
        raise BiasNotScaledError("a bias is added before its entries are picked")
    new = [plain(size) for size in sizes]
    if old.digits or old.cut:
        if rank == 0:
            raise NotInvariantError("only some of its outputs are selected")
        new = [picked(size, prod(sizes[i + 1 :]), _here(walk)) for i, size in enumerate(sizes)]
        if prod(sizes) > 1:  # axes of one entry need not say so too, and can be squeezed away
            new = [axis if axis.size > 1 else plain(1) for axis in new]
    offset = state.offset
    if offset is not None and offset > dim:
        offset += rank - 1
    return replace(state, axes=(*state.axes[:dim], *new, *state.axes[dim + 1 :]), offset=offset)


def _indices(walk: NodeContext) -> tuple[list[int], int]:
    """Return the indexed dimensions, and how many axes take their place.

    The indices are not unpacked, which would run the hooks of whoever keeps them elsewhere.
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
    """Return the state of what is written; what it is written into scales alike or is zero."""
    base, source, *others = [*walk.operands, None]
    if source is None or any(others):
        raise NotInvariantError("other values are written into its output")
    without_offset(source)
    if base is None:
        if not (walk.beside_zeros() or _into_saved_zeros(walk)):
            raise NotInvariantError(f"it is written into a tensor {UNKNOWN_CONSTANT}")
    elif base.degree != source.degree or base.offset is not None:
        raise NotInvariantError("it is written into a tensor that scales in another way")
    return source


def _into_saved_zeros(walk: NodeContext) -> bool:
    """Whether what is scattered into is kept and is zero: read once, for the first graph of its kind."""
    saved = getattr(getattr(walk.node, "_raw_saved_self", None), "data", None)
    constant = walk.node.next_functions[0][0] is None
    return constant and isinstance(saved, Tensor) and not saved.is_meta and not bool(saved.any())


def _into(walk: NodeContext, source: ScaleState, dim: int) -> ScaleState:
    """Put entries at other places of one axis, where entries of several places may come together."""
    walk.reduce([source.axes[dim]])
    axes = [plain(size) if d == dim else _fitting(source.axes[d], size) for d, size in enumerate(walk.shape)]
    written = source.over(axes)
    base = walk.operands[0]
    return written if base is None else walk.alike(base, written)


def _fitting(axis: Axis, size: int) -> Axis:
    if axis.size == size:
        return axis
    if axis.digits or axis.cut:
        raise NotInvariantError("its outputs are written into some places of a larger tensor")
    return plain(size)


def _beside_zeros(walk: NodeContext) -> ScaleState:
    if not walk.beside_zeros():
        raise NotInvariantError(f"its output stands beside a constant {UNKNOWN_CONSTANT}")
    state = without_offset(the_operand(walk))
    return state.over(broadcast(state.axes, walk.shape))
