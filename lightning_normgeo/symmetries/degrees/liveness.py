"""Elements of each tensor that the results of a graph can depend on.

A vision transformer reads one token in the end; nothing of the other tokens behind the last attention matters, so that
no equation holds for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from lightning_normgeo.normalization.autograd.graph import Edge, Graph, Node
from lightning_normgeo.normalization.autograd.nodes import dimensions, name_of
from lightning_normgeo.symmetries.degrees.degree import viewed
from lightning_normgeo.symmetries.degrees.nodes import (
    ATTENTIONS,
    BATCH_NORMS,
    COPIES,
    CUTS,
    PERMUTATIONS,
    SOFTMAX,
    VIEWS,
    concatenation,
    cuts,
    input_shape,
    permutation,
)
from lightning_normgeo.symmetries.equations.exponents import Mask

Backward = Callable[[Graph, Node, int, Mask], Mask]
"""Rule of an operation: from the elements of its output that matter to those of one of its inputs."""


def live_elements(graph: Graph) -> dict[Edge, Mask]:
    """Return for each tensor a mask of the elements that the results depend on, of size 1 along axes without change.

    An element may be counted although it does not matter, never the other way round.

    Cost: one walk over the graph.
    """
    found: dict[Edge, Mask] = {}
    for node in sorted(graph.outputs, key=graph.order.__getitem__, reverse=True):
        for output in graph.outputs[node]:
            masks = [_of_input(graph, reader, position, found) for reader, position in graph.readers[node, output]]
            if (node, output) in graph.results or not masks:
                masks.append(_all(len(graph.shape_of(node, output))))
            found[node, output] = shrunk(np.logical_or.reduce(np.broadcast_arrays(*masks)))
    return found


def _of_input(graph: Graph, reader: Node, position: int, found: dict[Edge, Mask]) -> Mask:
    shape = input_shape(graph, reader, position) or ()
    name = graph.name_of(reader)
    if name in CUTS:
        return _cut(graph, reader, shape, found)
    output = found.get((reader, 0))
    if output is None or output.all() or len(graph.outputs.get(reader, ())) > 1:
        return _all(len(shape))
    rule = _RULES.get(name)
    return _all(len(shape)) if rule is None else shrunk(rule(graph, reader, position, output))


def _all(ndim: int) -> Mask:
    return np.ones((1,) * ndim, bool)


def shrunk(mask: Mask) -> Mask:
    """Return a mask with size 1 along axes on which it does not change."""
    for axis in range(mask.ndim):
        if mask.shape[axis] > 1:
            first = mask.take([0], axis)
            if np.array_equal(np.broadcast_to(first, mask.shape), mask):
                mask = first
    return mask


def _cut(graph: Graph, reader: Node, shape: tuple[int, ...], found: dict[Edge, Mask]) -> Mask:
    """Elements of a tensor of which parts are read."""
    axis, parts = cuts(reader, shape)
    pieces = [np.zeros((1,) * (len(shape) - 1), bool)] * shape[axis]
    for output in graph.outputs.get(reader, ()):
        mask, (indices, keep) = found[reader, output], parts[output]
        for k, index in enumerate(indices):
            part = mask.take(min(k, mask.shape[axis] - 1), axis) if keep else mask
            pieces[index] = pieces[index] | part
    return shrunk(np.stack(np.broadcast_arrays(*pieces), axis))


def _same(graph: Graph, node: Node, position: int, output: Mask) -> Mask:
    """Elementwise operations, whose inputs are broadcast."""
    return reduced(output, input_shape(graph, node, position) or ())


def any_along(mask: Mask, axes: Iterable[int]) -> Mask:
    """Return whether any element along some axes matters, with size 1 along these."""
    return np.asarray(mask.any(axis=tuple(axes), keepdims=True))


def reduced(mask: Mask, shape: tuple[int, ...]) -> Mask:
    """Return a mask of a tensor that was broadcast: whether any of its copies matters."""
    front = mask.ndim - len(shape)
    mask = any_along(mask, range(front)).reshape(mask.shape[front:])
    return any_along(mask, [axis for axis, size in enumerate(shape) if size == 1 and mask.shape[axis] > 1])


def _view(graph: Graph, node: Node, position: int, output: Mask) -> Mask:
    return viewed(output, graph.shape_of(node), input_shape(graph, node, position) or ())  # type: ignore[arg-type,return-value]


def _permute(graph: Graph, node: Node, position: int, output: Mask) -> Mask:
    return output.transpose(np.argsort(permutation(node, output.ndim)))


def _concatenate(graph: Graph, node: Node, position: int, output: Mask) -> Mask:
    shape, place = input_shape(graph, node, position) or (), concatenation(graph, node, position)
    if place is None:
        return _all(len(shape))
    axis, start = place
    return output if output.shape[axis] == 1 else output.take(range(start, start + shape[axis]), axis)


def _normalize(graph: Graph, node: Node, position: int, output: Mask) -> Mask:
    """Normalizations and softmax: an element matters if any that shares its statistics does."""
    shape = input_shape(graph, node, position) or ()
    if len(shape) != output.ndim:
        return _all(len(shape))
    name, ndim = name_of(node), output.ndim
    if name in BATCH_NORMS:
        axes = [axis for axis in range(ndim) if axis != 1]
    elif name == "NativeGroupNorm":
        axes = list(range(1, ndim))
    elif name in SOFTMAX:
        axes = dimensions(node._saved_dim, ndim)
    else:
        axes = list(range(ndim - len(node._saved_normalized_shape), ndim))
    return any_along(output, axes)


def _product(graph: Graph, node: Node, position: int, output: Mask) -> Mask:
    """Matrix products: row i of the left factor matters if row i of the result does."""
    shape = input_shape(graph, node, position) or ()
    if name_of(node) in ("Addmm", "Baddbmm"):
        position -= 1
    if position < 0:
        return reduced(output, shape)
    return any_along(output, [-1 if position == 0 else -2])


def _linear(graph: Graph, node: Node, position: int, output: Mask) -> Mask:
    if position == 0:
        return any_along(output, [-1])
    return _all(len(input_shape(graph, node, position) or ()))


def _attention(graph: Graph, node: Node, position: int, output: Mask) -> Mask:
    ndim = len(input_shape(graph, node, position) or ())
    if position == 0 and ndim == output.ndim:
        return any_along(output, [-1])
    return _all(ndim)


_ELEMENTWISE = (
    "Add Sub Rsub Mul Div Relu LeakyRelu Abs Neg Gelu Silu Sigmoid Tanh NativeDropout MaskedFill Where Hardswish "
    "Hardsigmoid Softplus Elu Mish Expand"
)
_RULES: dict[str, Backward] = {
    **dict.fromkeys(COPIES, _same),
    **dict.fromkeys(_ELEMENTWISE.split(), _same),
    **dict.fromkeys(VIEWS, _view),
    **dict.fromkeys(PERMUTATIONS, _permute),
    "Cat": _concatenate,
    **dict.fromkeys(BATCH_NORMS, _normalize),
    **dict.fromkeys(["NativeGroupNorm", "NativeLayerNorm", "FusedRmsNorm", *SOFTMAX], _normalize),
    **dict.fromkeys(("Mm", "Addmm", "Bmm", "Baddbmm"), _product),
    "Linear": _linear,
    **dict.fromkeys(ATTENTIONS, _attention),
}
"""Only operations with one output that is read; in all others, every element counts."""
