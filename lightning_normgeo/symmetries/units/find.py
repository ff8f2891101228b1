"""Units of the weights in a graph, from the symmetries that scale slices of one layer alone."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_normgeo.normalization.autograd.graph import Graph, Node
from lightning_normgeo.normalization.autograd.nodes import name_of
from lightning_normgeo.normalization.names import bias_of, clean_name, layer_name
from lightning_normgeo.symmetries.solution import Solution
from lightning_normgeo.symmetries.units.cuts import TOLERANCE, Cut, cuts
from lightning_normgeo.symmetries.units.normalizations import Normalizations
from lightning_normgeo.symmetries.units.one_layer import AllLayers, LayerSolutions, solve_layer
from lightning_normgeo.symmetries.units.reasons import EXCHANGED_WITHIN, Reasons
from lightning_normgeo.symmetries.units.weight_units import Kind, WeightUnits

_MAPS = {"Convolution", "Mm", "Addmm", "Linear", "T", "WeightNormInterface", "Embedding"}
"""Nodes that use a weight as a linear map (or prepare it for one), which determines the dimension of its rows."""


class UnitFinder:
    """Finds the units of the weights in one graph.

    Args:
        found: all generators of the graph.
        module: owner of the weights.
    """

    def __init__(self, found: Solution, module: nn.Module) -> None:
        self._found = found
        self._layers = {clean_name(name): layer for name, layer in module.named_modules()}
        self._leaves = {name: node for node, name in found.names.items()}
        self._all = AllLayers(found)
        self._solutions: dict[tuple[str, Cut], LayerSolutions] = {}
        self._normalizations = Normalizations(found)
        self._reasons = Reasons(found)

    def units_of(self, name: str) -> WeightUnits:
        """Return the units of the weight called ``name``, for the cut into slices that gives the most units."""
        leaf, owner = self._leaves[name], self._layers.get(layer_name(name))
        shape = tuple(leaf.variable.shape)
        first = _where_rows_are(self._found.graph, leaf, owner)
        none = WeightUnits(name=name, kind="none", count=first.rows(shape), dim=first.dim, groups=first.groups)
        if self._reasons.forbidden(name):
            return none.without_invariance(self._reasons.of(name))
        best = self._units_along(none, first, owner)
        # Invariance to a factor for each slice includes invariance to a common factor. So a weight that is not
        # invariant as a whole has no invariant slices, along whichever dimension it is cut. The filters of a matrix
        # are vectors, and no cut along leading dimensions is finer. In a linear map the dimension of the rows is known.
        settled = not best.invariant or (best.kind == "filter" and len(shape) < 3)
        if settled or _is_a_plain_map(self._found.graph, leaf, owner):
            return best
        for cut in cuts(shape, first):
            other = self._units_along(none, cut, owner)
            if other.invariant and other.count > best.count:
                best = other
        return best

    def parts_of(self, name: str) -> tuple[WeightUnits, ...]:
        """Return the units of parts of a weight, such as the queries and keys in a packed one, and those of the rest.

        Parts are runs of rows, all or none of which are invariant. Without invariant ones there are no parts.
        """
        leaf = self._leaves[name]
        cut, rows = Cut(), int(leaf.variable.shape[0])
        none = WeightUnits(name=name, kind="none", count=rows)
        if self._reasons.forbidden(name) or _where_rows_are(self._found.graph, leaf, None) != cut:
            return ()
        solutions, owner = self._solved(name, cut), self._layers.get(layer_name(name))
        covered = solutions.covered
        edges = [0, *(np.flatnonzero(covered[1:] != covered[:-1]) + 1).tolist(), rows]
        parts = [replace(none.of_part(*rows), count=rows[1] - rows[0]) for rows in itertools.pairwise(edges)]
        found = [
            self._divided(part, solutions, cut, owner)
            if covered[edges[k]]
            else part.without_invariance(self._reasons.of(name))
            for k, part in enumerate(parts)
        ]
        return tuple(found) if any(one.invariant for one in found) else ()

    def _units_along(self, none: WeightUnits, cut: Cut, owner: nn.Module | None) -> WeightUnits:
        solutions = self._all.alone(none.name, bias_of(none.name), cut)
        if solutions is None or solutions.divided is None:
            solutions = self._solved(none.name, cut)
        if not bool(solutions.covered.all()):
            return none.without_invariance(self._reasons.of(none.name))
        return self._divided(none, solutions, cut, owner)

    def _solved(self, name: str, cut: Cut) -> LayerSolutions:
        """Return the symmetries of one layer alone; those of parts of a weight are read from the same ones."""
        if (name, cut) not in self._solutions:
            bias = self._leaves.get(bias_of(name))
            self._solutions[name, cut] = solve_layer(self._found.propagation, self._leaves[name], bias, cut)
        return self._solutions[name, cut]

    def _divided(self, none: WeightUnits, solutions: LayerSolutions, cut: Cut, owner: nn.Module | None) -> WeightUnits:
        """Return the units of a weight or a part of it, all of whose rows some solution scales."""
        if none.part is not None:
            solutions = solutions.within(slice(*none.part))
        if solutions.divided is None:
            return none.without_invariance(_why_not_divided(solutions))
        alone = solutions.rows(*solutions.divided)
        belongs = solutions.bias.size > 0 and alone.moves(solutions.bias)
        if belongs and not _fits(alone):
            return none.without_invariance("a part of its bias belongs to another unit")
        bias = bias_of(none.parameter) if belongs else None
        found = replace(none, count=alone.count, dim=cut.dim, groups=cut.groups, bias=bias)
        return self._described(found, alone, owner)

    def _described(self, found: WeightUnits, alone: LayerSolutions, owner: nn.Module | None) -> WeightUnits:
        """Return the units with their kind, and the normalizations behind them."""
        absorbed = self._normalizations.behind(alone)
        if not absorbed:
            return found.without_invariance("it has no effect on the loss")
        kind: Kind = "layer" if self._normalizations.of_data(absorbed) else "matrix"
        if found.count == len(alone.weight):
            kind = "filter"
        elif found.count > 1:
            kind = "group"
        text = self._normalizations.text(absorbed, owner)
        scale = self._normalizations.scale(absorbed, alone) if kind == "filter" else None
        return replace(found, kind=kind, scale=scale, normalization=text)


def _why_not_divided(solutions: LayerSolutions) -> str:
    """Return the reason why rows that solutions scale are not divided into units."""
    values = solutions.of(solutions.weight)
    growing, shrinking = ((sign * values > 0).sum(axis=1) for sign in (1, -1))
    if bool((growing * shrinking > 0).all()):
        return EXCHANGED_WITHIN
    return "the rows that share a normalization are not consecutive"


def _fits(alone: LayerSolutions) -> bool:
    """Whether each unit scales its own part of the bias, by the same factor as the weight, and no other part.

    Parts of the bias that no unit scales have no effect.
    """
    size, count = alone.bias.size, alone.count
    if size % count:
        return False
    values = alone.of(alone.bias).tocoo()
    own = values.row == values.col // (size // count)
    return bool((own & (abs(values.data - 1) <= TOLERANCE)).all())


def _where_rows_are(graph: Graph, leaf: Node, owner: nn.Module | None) -> Cut:
    """Return the cut of a weight into the slices of its output channels."""
    readers = [(name_of(reader), reader, position) for reader, position in _readers(graph, leaf)]
    for name, reader, position in readers:
        if name == "WeightNormInterface":
            return Cut(int(reader._saved_dim))  # it normalizes the slices along its own ``dim``, whatever the layer
        # x @ W without a transpose: output channels are the columns of W. nn.Linear computes x @ W.T, and its
        # weight is read by the transpose.
        if (name, position) in (("Mm", 1), ("Addmm", 2)):
            return Cut(1)
    if isinstance(owner, _ConvTransposeNd):
        return Cut(1, owner.groups)
    for name, reader, position in readers:
        if (name, position) == ("Convolution", 1) and reader._saved_transposed:
            return Cut(1, int(reader._saved_groups))
    return Cut()


def _is_a_plain_map(graph: Graph, leaf: Node, owner: nn.Module | None) -> bool:
    """Whether a weight is used directly as a linear map, so that the dimension of its rows is known."""
    return isinstance(owner, _ConvNd) or any(name_of(reader) in _MAPS for reader, _ in _readers(graph, leaf))


def _readers(graph: Graph, leaf: Node) -> list[tuple[Node, int]]:
    """Return the nodes that read a weight, each with the input position; casts are skipped.

    Autocast puts a cast (``ToCopy``) between a weight and the operation that uses it.
    """
    found: list[tuple[Node, int]] = []
    for reader, position in graph.readers[leaf, 0]:
        found += graph.readers[reader, 0] if name_of(reader) == "ToCopy" else [(reader, position)]
    return found
