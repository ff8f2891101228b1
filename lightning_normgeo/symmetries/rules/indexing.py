"""Rules of operations that pick elements by indices, or write them into another tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_normgeo.normalization.autograd.nodes import dimensions, is_leaf
from lightning_normgeo.symmetries.degrees import algebra
from lightning_normgeo.symmetries.degrees.degree import Degree
from lightning_normgeo.symmetries.degrees.nodes import signed
from lightning_normgeo.symmetries.rules.context import NoRuleError, Operation

_MASKS = (torch.bool, torch.uint8)
_LINEAR = ("sum", "mean", "amax", "amin")


def index_select(walk: Operation) -> Degree:
    """Rule for entries picked along one axis by a vector of indices."""
    (axis,) = dimensions(walk.node._saved_dim, walk.ndim)
    degree = _picked(walk, [axis], [axis])
    return degree.over(walk.shape, degree.terms).plain()


def index(walk: Operation) -> Degree:
    """Rule for entries picked by tensors of indices or masks."""
    taken, rank = _indices(walk)
    neighbors = taken == list(range(taken[0], taken[0] + len(taken)))
    place = taken[0] if neighbors else 0  # torch puts new axes first if the indexed ones are not adjacent
    degree = _picked(walk, taken, range(place, place + rank))
    terms = []
    for term in degree.terms:
        kept = [size for axis, size in enumerate(term.shape) if axis not in taken]
        terms.append(term.reshape(kept[:place] + [1] * rank + kept[place:]))
    return degree.over(walk.shape, terms).plain()


def _picked(walk: Operation, taken: Sequence[int], new: Iterable[int]) -> Degree:
    """Return the degree of entries picked along axes, which does not depend on the entry.

    Which entry is where depends on the data, so that all have to have the same degree, unless their scale has no
    effect.

    Args:
        walk: the operation.
        taken: axes of the input along which entries are picked.
        new: axes of the output along which they lie.
    """
    degree = walk.only
    free = {axis for axis in new if walk.shape[axis] > 1} <= walk.free
    terms = [term for term in degree.terms if any(term.shape[axis] > 1 for axis in taken)]
    apart = all(size == 1 for term in terms for axis, size in enumerate(term.shape) if axis not in taken)
    if not (free and apart):
        return walk.over(degree, taken)
    degree = degree.plain()
    walk.absorb(degree.over(degree.shape, terms))
    shape = [1 if axis in taken else size for axis, size in enumerate(degree.shape)]
    return degree.over(shape, [term for term in degree.terms if not any(term is one for one in terms)])


def _indices(walk: Operation) -> tuple[list[int], int]:
    """Return the indexed axes, and the number of axes that replace them.

    The indices are read in their raw form, since unpacking them runs the hooks for saved tensors: activation
    checkpointing would compute the forward pass again.
    """
    taken: list[int] = []
    axis, rank = 0, 0
    for saved in walk.node._raw_saved_indices:
        value = saved.data
        if value is None:  # a slice
            axis += 1
            continue
        if not isinstance(value, Tensor):
            raise NoRuleError
        mask = value.dtype in _MASKS
        wide = value.ndim if mask else 1
        taken += range(axis, axis + wide)
        axis, rank = axis + wide, max(rank, 1 if mask else value.ndim)
    return taken, rank


def gather(walk: Operation) -> Degree:
    """Rule for entries picked along one axis by indices that differ along the other axes."""
    degree = walk.only
    (axis,) = dimensions(walk.node._saved_dim, len(degree.shape))
    degree = walk.over(degree, [axis])
    for other, size in enumerate(walk.shape):
        if other != axis and size < degree.shape[other]:
            degree = degree.taken(other, range(size))
    return degree.over(walk.shape, degree.terms).plain()


def written(walk: Operation) -> Degree:
    """Rule for entries written or added along one axis of a tensor that is zero or has the same degree."""
    if getattr(walk.node, "_saved_reduce", "sum") not in _LINEAR:
        raise NoRuleError
    (axis,) = dimensions(walk.node._saved_dim, walk.ndim)
    return _into(walk, [axis])


def put(walk: Operation) -> Degree:
    """Rule for entries written or added at tensors of indices, as in ``y[i] = x``."""
    taken, rank = _indices(walk)
    return _into(walk, taken if len(taken) == rank == 1 else range(walk.ndim))


def _into(walk: Operation, axes: Sequence[int]) -> Degree:
    """Return the degree of a tensor into which values are written at some indices into axes."""
    base, values = (*walk.operands, None)[:2]
    zeros = walk.graph.constants.are_zero(walk.node)
    if values is None:
        return base.plain() if base is not None and zeros else walk.vanish_all()
    apart = [
        axis for axis, size in enumerate(values.shape) if len(values.shape) != walk.ndim or size != walk.shape[axis]
    ]
    values = walk.over(values, sorted({*apart, *(axis for axis in axes if axis < len(values.shape))}))
    if base is None:
        return walk.filled(values) if zeros else walk.vanish_all()
    algebra.make_equal(walk.exponents, base, values, walk.where)
    return walk.filled(base).plain()


def embedding(walk: Operation) -> Degree:
    """Rule for rows looked up in a table."""
    if walk.node._saved_scale_grad_by_freq or not _without_padding(walk):
        return walk.vanish_all()  # the gradient that autograd computes is not that of the loss
    degree = _picked(walk, [0], range(walk.ndim - 1))
    front = (1,) * (walk.ndim - 1)
    return degree.over(walk.shape, [term.reshape(*front, term.shape[1]) for term in degree.terms]).plain()


def _without_padding(walk: Operation) -> bool:
    """Whether a table has no row that counts as a constant, or one that is and stays zero."""
    row = signed(walk.node._saved_padding_idx)
    if row < 0:
        return True
    table, output = walk.graph.inputs[walk.node][0]
    alone = all(reader.name() == walk.node.name() for reader, _ in walk.graph.readers[table, output])
    return alone and is_leaf(table) and not bool(table.variable[row].any())


def bags(walk: Operation) -> Degree:
    """Rule for sums, means or maxima of looked-up rows (``EmbeddingBag``): one degree for all rows of a column.

    Raises:
        NoRuleError: if the weights of the sum depend on parameters.
    """
    degree = walk.over(walk.only, [0])
    if walk.operands[0] is None:
        raise NoRuleError
    return degree.over(walk.shape, degree.terms).plain()
