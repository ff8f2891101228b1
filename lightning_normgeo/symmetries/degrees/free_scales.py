"""Scales of tensors that leave the results of a graph unchanged: those that normalizations remove.

The rows that an embedding picks from a table have exponents of their own, and which row is where depends on the data.
Where a normalization of each picked row follows, this does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lightning_normgeo.normalization.autograd.graph import Edge, Graph, Node
from lightning_normgeo.normalization.autograd.nodes import shape_of
from lightning_normgeo.symmetries.degrees.degree import joint_axes
from lightning_normgeo.symmetries.degrees.nodes import (
    BATCH_NORMS,
    COPIES,
    PERMUTATIONS,
    VIEWS,
    input_shape,
    permutation,
)

Axes = frozenset[int]
"""Axes of a tensor: a factor for each index into all of them has no effect."""
Backward = Callable[[Graph, Node, int, Axes], Axes]


def free_scales(graph: Graph) -> dict[Edge, Axes]:
    """Return for each tensor axes along which scales are known to have no effect; tensors without any are left out.

    Cost: one walk over the graph.
    """
    found: dict[Edge, Axes] = {}
    for node in sorted(graph.outputs, key=graph.order.__getitem__, reverse=True):
        for output in graph.outputs[node]:
            if (node, output) not in graph.results:
                axes = _common(_of_input(graph, reader, at, found) for reader, at in graph.readers[node, output])
                if axes:
                    found[node, output] = axes
    return found


def _common(all_axes: Iterable[Axes]) -> Axes:
    first, *others = all_axes
    return first.intersection(*others)


def _of_input(graph: Graph, reader: Node, position: int, found: dict[Edge, Axes]) -> Axes:
    name = graph.name_of(reader)
    if name in _NORMALIZATIONS:
        return _normalized(reader, name) if position == 0 else frozenset()
    rule, axes = _RULES.get(name), found.get((reader, 0))
    return frozenset() if rule is None or not axes else rule(graph, reader, position, axes)


_NORMALIZATIONS = BATCH_NORMS | {"NativeLayerNorm", "FusedRmsNorm", "NativeGroupNorm"}


def _normalized(node: Node, name: str) -> Axes:
    """Return the axes along which a normalization has statistics of their own."""
    if name in BATCH_NORMS:
        return frozenset({1} if getattr(node, "_saved_training", True) else ())
    if name == "NativeGroupNorm":
        return frozenset({0, 1} if int(node._saved_group) == int(node._saved_C) else {0})
    return frozenset(range(len(shape_of(node)) - len(node._saved_normalized_shape)))


def _same(graph: Graph, node: Node, position: int, axes: Axes) -> Axes:
    return axes if position == 0 else frozenset()


def _by_a_constant(graph: Graph, node: Node, position: int, axes: Axes) -> Axes:
    """Products and quotients with a constant, which is not broadcast over more than the input has."""
    alone = all(source is None for k, (source, _) in enumerate(graph.inputs[node]) if k != position)
    kept = input_shape(graph, node, position) == graph.shape_of(node)
    return axes if position == 0 and alone and kept else frozenset()


def _permute(graph: Graph, node: Node, position: int, axes: Axes) -> Axes:
    order = permutation(node, len(graph.shape_of(node)))
    return frozenset(order[axis] for axis in axes)


def _view(graph: Graph, node: Node, position: int, axes: Axes) -> Axes:
    old, new = graph.shape_of(node), input_shape(graph, node, position) or ()
    found: set[int] = set()
    for before, after in joint_axes(old, new):
        if {axis for axis in before if old[axis] > 1} <= axes:
            found.update(after)
    return frozenset(found)


_RULES: dict[str, Backward] = {
    **dict.fromkeys(COPIES | {"Relu", "LeakyRelu", "Abs", "Neg", "NativeDropout"}, _same),
    **dict.fromkeys(("Mul", "Div"), _by_a_constant),
    **dict.fromkeys(PERMUTATIONS, _permute),
    **dict.fromkeys(VIEWS, _view),
}
