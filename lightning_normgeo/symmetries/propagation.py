"""Degrees of all tensors of a graph, and the equations that follow from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np

from lightning_normgeo.normalization.autograd.graph import Edge, Graph, Node
from lightning_normgeo.normalization.invariance.node_context import name_of, shape_of
from lightning_normgeo.symmetries.degrees.algebra import joint, make_zero
from lightning_normgeo.symmetries.degrees.degree import Degree
from lightning_normgeo.symmetries.degrees.liveness import live_elements
from lightning_normgeo.symmetries.degrees.nodes import BATCH_NORMS
from lightning_normgeo.symmetries.degrees.shifts import Shift, shifts_without_effect
from lightning_normgeo.symmetries.equations.exponents import ZERO, Exponents, Ids, Mask
from lightning_normgeo.symmetries.rules.by_node_name import degree_of
from lightning_normgeo.symmetries.rules.context import NoRuleError, Operation
from lightning_normgeo.symmetries.rules.parameters import parameter


@dataclass
class Degrees:
    """Degrees of the parameters of a graph in terms of unknown exponents.

    Attributes:
        exponents: the unknowns, with all equations that the operations of the graph require.
        parameters: degree of each parameter, by its node.
        shifts: shifts of each tensor that have no effect.
        live: elements of each tensor that matter.
        unknown: operations that are not understood, with their number.
        absorbed: normalizations in words, with the exponents that they remove.
        batch_norms: exponent of each channel of the input of each batch normalization, by its node.
    """

    exponents: Exponents
    parameters: dict[Node, Degree]
    shifts: dict[Edge, Shift]
    live: dict[Edge, Mask]
    unknown: Counter[str] = field(default_factory=Counter)
    absorbed: list[tuple[str, Ids]] = field(default_factory=list)
    batch_norms: dict[Node, Ids] = field(default_factory=dict)


def degrees(graph: Graph, parameters: Collection[Node]) -> Degrees:
    """Return the degrees of the parameters of a graph.

    Args:
        graph: of a forward pass.
        parameters: nodes of the parameters that a symmetry may scale; other tensors with a gradient, such as an input,
            have degree 0.

    The results of the graph have degree 0. Where an operation is not understood, all that it reads and its result have
    degree 0, so that a symmetry may be missed, but none is claimed that does not exist.

    Cost: three walks over the graph; each operation costs some operations of numpy on its channels.
    """
    live, shifts = live_elements(graph), shifts_without_effect(graph)
    found = Degrees(Exponents(), {}, shifts, live)
    by_edge: dict[Edge, Degree] = {}
    for node in sorted(graph.order, key=graph.order.__getitem__):
        if hasattr(node, "variable") and node not in parameters:
            by_edge[node, 0] = Degree(shape_of(node))
            continue
        if hasattr(node, "variable"):
            by_edge[node, 0] = found.parameters[node] = parameter(found.exponents, graph, node)
            continue
        operands = [by_edge.get(edge) for edge in graph.inputs[node]]
        found.exponents.cause = node
        for output in graph.outputs.get(node, ()):
            walk = Operation(graph, node, output, operands, found.exponents, live, shifts, found.absorbed)
            try:
                by_edge[node, output] = degree_of(walk)
            except NoRuleError:
                found.unknown[name_of(node)] += 1
                by_edge[node, output] = walk.vanish_all()
            if output == 0 and walk.name in BATCH_NORMS:
                found.batch_norms[node] = _by_channel(walk)
    found.exponents.cause = None
    for edge in graph.results:
        make_zero(found.exponents, by_edge[edge])
    for degree in found.parameters.values():
        degree.plain()
    return found


def _by_channel(walk: Operation) -> Ids:
    """Return the exponent of each channel of the input of a batch normalization, whose rule has made it constant."""
    degree, channels = walk.operands[0], walk.shape[1]
    if degree is None:
        return np.full(channels, ZERO)
    live = walk.input_live(0)
    axes = [axis for axis in range(walk.ndim) if axis != 1]
    whole = walk.over(degree, axes, None if live.all() else live)
    return np.broadcast_to(joint(walk.exponents, whole).reshape(-1), channels)
