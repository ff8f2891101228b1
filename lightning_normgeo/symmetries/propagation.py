"""Degrees of all tensors of a graph, and the equations that follow from them."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from lightning_normgeo.normalization.autograd.graph import Edge, Graph, Node
from lightning_normgeo.normalization.autograd.nodes import is_leaf, name_of
from lightning_normgeo.symmetries.degrees.algebra import joint, make_zero, tidy
from lightning_normgeo.symmetries.degrees.degree import Degree
from lightning_normgeo.symmetries.degrees.free_scales import free_scales
from lightning_normgeo.symmetries.degrees.liveness import live_elements
from lightning_normgeo.symmetries.degrees.nodes import BATCH_NORMS
from lightning_normgeo.symmetries.degrees.shifts import shifts_without_effect
from lightning_normgeo.symmetries.equations.exponents import ZERO, Exponents, Ids
from lightning_normgeo.symmetries.rules.by_node_name import degree_of
from lightning_normgeo.symmetries.rules.context import Absorption, NoRuleError, Operation
from lightning_normgeo.symmetries.rules.parameters import kernel_sources, parameter

RESULTS = "results"
"""The cause of equations that the results of a graph require."""


@dataclass
class Degrees:
    """Degrees of parameters of a graph in terms of unknown exponents.

    Attributes:
        exponents: the unknowns, with all equations that the operations of the graph require.
        parameters: degree of each parameter, by its node.
        unknown: operations that are not understood, with their number.
        absorbed: normalizations, in topological order.
        batch_norms: exponent of each channel of the input of each batch normalization, by its node.
    """

    exponents: Exponents
    parameters: dict[Node, Degree] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)
    absorbed: list[Absorption] = field(default_factory=list)
    batch_norms: dict[Node, Ids] = field(default_factory=dict)


class Propagation:
    """Propagates degrees from parameters through a graph.

    The results of the graph have degree 0. Where an operation is not understood, all that it reads and its result have
    degree 0, so that a symmetry may be missed, but none is claimed that does not exist.

    Args:
        graph: of a forward pass.

    Attributes:
        live: elements of each tensor that matter.
        shifts: shifts of each tensor that have no effect.
        scales: axes of each tensor along which scales have no effect.

    Cost: three walks over the graph, and one more for each call; an operation costs some operations of numpy on its
    channels.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.live, self.shifts, self.scales = live_elements(graph), shifts_without_effect(graph), free_scales(graph)

    def from_all(self, parameters: Collection[Node]) -> Degrees:
        """Return the degrees of all parameters that a symmetry may scale, with unknowns for all of their slices.

        Args:
            parameters: their nodes. Other tensors with a gradient, such as an input, have degree 0.
        """
        found, by_edge = Degrees(Exponents()), dict[Edge, Degree]()
        kernels = kernel_sources(self.graph)
        for node in sorted(self.graph.order, key=self.graph.order.__getitem__):
            if node in parameters:
                by_edge[node, 0] = found.parameters[node] = parameter(found.exponents, self.graph, node, kernels)
            elif is_leaf(node):
                by_edge[node, 0] = Degree(self.graph.shape_of(node))
            else:
                operands = [by_edge.get(edge) for edge in self.graph.inputs[node]]
                for output in self.graph.outputs.get(node, ()):
                    by_edge[node, output] = self._visit(node, output, operands, found)
        self._finish(found, by_edge)
        return found

    def from_some(self, start: Mapping[Node, Degree], exponents: Exponents) -> Degrees:
        """Return the given degrees with all equations that they have to satisfy if nothing else is scaled.

        Args:
            start: degrees of some parameters by their nodes.
            exponents: the unknowns of these degrees; it receives the equations.
        """
        found = Degrees(exponents, dict(start))
        by_edge: dict[Edge, Degree] = {(node, 0): degree for node, degree in start.items()}
        queue: list[tuple[int, Node]] = []
        seen: set[Node] = set()
        for edge in by_edge:
            self._enqueue(queue, seen, edge)
        # the heap yields the node with the smallest index, and readers have larger ones than what they read
        while queue:
            _, node = heapq.heappop(queue)
            operands = [by_edge.get(edge) or self._unscaled(edge) for edge in self.graph.inputs[node]]
            for output in self.graph.outputs.get(node, ()):
                degree = tidy(exponents, self._visit(node, output, operands, found))
                if degree.terms:
                    by_edge[node, output] = degree
                    self._enqueue(queue, seen, (node, output))
        self._finish(found, by_edge)
        return found

    def _enqueue(self, queue: list[tuple[int, Node]], seen: set[Node], edge: Edge) -> None:
        for reader, _ in self.graph.readers[edge]:
            if reader not in seen:
                seen.add(reader)
                heapq.heappush(queue, (self.graph.order[reader], reader))

    def _visit(self, node: Node, output: int, operands: list[Degree | None], found: Degrees) -> Degree:
        found.exponents.cause = node
        walk = Operation(
            self.graph, node, output, operands, found.exponents, self.live, self.shifts, self.scales, found.absorbed
        )
        try:
            degree = degree_of(walk)
        except NoRuleError:
            found.unknown[name_of(node)] += 1
            degree = walk.vanish_all()
        if output == 0 and walk.name in BATCH_NORMS:
            found.batch_norms[node] = _by_channel(walk)
        return degree

    def _unscaled(self, edge: Edge) -> Degree | None:
        """Return the degree of a tensor that does not scale; None for one that no recorded operation has made."""
        return None if edge[0] is None else Degree(self.graph.shape_of(*edge))

    def _finish(self, found: Degrees, by_edge: Mapping[Edge, Degree]) -> None:
        found.exponents.cause = RESULTS
        for edge in self.graph.results:
            if edge in by_edge:
                make_zero(found.exponents, by_edge[edge])
        found.exponents.cause = None
        for degree in found.parameters.values():
            degree.plain()


def _by_channel(walk: Operation) -> Ids:
    """Return the exponent of each channel of the input of a batch normalization, whose rule has made it constant."""
    degree, channels = walk.operands[0], walk.shape[1]
    if degree is None:
        return np.full(channels, ZERO)
    live = walk.input_live(0)
    axes = [axis for axis in range(walk.ndim) if axis != 1]
    whole = walk.over(degree, axes, None if live.all() else live)
    return np.broadcast_to(joint(walk.exponents, whole).reshape(-1), channels)
