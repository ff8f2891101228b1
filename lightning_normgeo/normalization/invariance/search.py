"""The search for the units of one weight: its rows are followed through the graph until normalizations absorb them."""

from __future__ import annotations

import heapq
from dataclasses import replace

from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_normgeo.normalization.autograd.graph import Graph, Node
from lightning_normgeo.normalization.invariance.node_context import (
    BiasNotScaledError,
    NodeContext,
    NotInvariantError,
    name_of,
)
from lightning_normgeo.normalization.invariance.row_layout import Piece, ScaleState, contiguous_units, rows
from lightning_normgeo.normalization.invariance.rules.by_node_name import apply
from lightning_normgeo.normalization.invariance.slices import Slices, other_slices
from lightning_normgeo.normalization.names import bias_of, layer_name
from lightning_normgeo.normalization.parametrizations import parametrization_title
from lightning_normgeo.normalization.units import Kind, WeightUnits

_TITLES = {
    "NativeBatchNorm": "batch normalization",
    "CudnnBatchNorm": "batch normalization",
    "MiopenBatchNorm": "batch normalization",
    "SyncBatchNorm": "batch normalization",
    "NativeGroupNorm": "group normalization",
    "NativeLayerNorm": "layer normalization",
    "FusedRmsNorm": "root mean square normalization",
}


_MAPS = {"Convolution", "Mm", "Addmm", "Linear", "T", "WeightNormInterface", "Embedding"}
"""Nodes that read a weight the way its layer is meant."""


class Search:
    """Follows one weight after the other through a graph."""

    def __init__(
        self, graph: Graph, names: dict[int, str], layers: dict[str, nn.Module], leaves: dict[str, Node]
    ) -> None:
        self.graph = graph
        self.names = names
        self.layers = layers
        self.leaves = leaves

    def units_of(self, name: str) -> WeightUnits:
        """Return the units of the weight called ``name``: of several ways to cut it into slices the finest."""
        leaf, owner = self.leaves[name], self.layers.get(layer_name(name))
        dim, groups = self._where_rows_are(leaf, owner)
        found = self._units_along(name, owner, Slices(dim, groups))
        # where the whole weight is not invariant no slices are
        fine = not found.invariant or (found.kind == "filter" and leaf.variable.ndim < 3)
        if fine or self._is_a_plain_map(leaf, owner):
            return found
        for slices in other_slices(leaf.variable, dim):
            other = self._units_along(name, owner, slices)
            if other.invariant and other.count > found.count:
                found = other
        return found

    def _units_along(self, name: str, owner: nn.Module | None, slices: Slices) -> WeightUnits:
        leaf = self.leaves[name]
        count = slices.count(leaf.variable)
        found = WeightUnits(name=name, kind="none", count=count, dim=slices.dim, groups=slices.groups)
        start = {leaf: slices.state(leaf.variable)}
        try:
            return self._invariant(found, *self._follow(start), owner)
        except BiasNotScaledError as problem:
            bias = self.leaves.get(bias_of(name))
            if bias is None or bias.variable.shape != (found.count,):
                return found.without_invariance(str(problem))
            try:
                merged, absorbers = self._follow({**start, bias: ScaleState((rows(found.count),))})
                return self._invariant(found, merged, absorbers, owner, bias_of(name))
            except NotInvariantError as second:
                return found.without_invariance(str(second))
        except NotInvariantError as problem:
            return found.without_invariance(str(problem))

    def _where_rows_are(self, leaf: Node, owner: nn.Module | None) -> tuple[int, int]:
        """Return the dimension of output channels, and the groups of a transposed convolution.

        Of a matrix that is multiplied from the right it is the last; weight normalization has a dimension of its own.
        """
        readers = [(name_of(reader), reader, position) for reader, position in self._readers(leaf)]
        for name, reader, position in readers:
            if name == "WeightNormInterface":
                return int(reader._saved_dim), 1
            if (name, position) in (("Mm", 1), ("Addmm", 2)):
                return 1, 1
        if isinstance(owner, _ConvTransposeNd):
            return 1, owner.groups
        for name, reader, position in readers:
            if (name, position) == ("Convolution", 1) and reader._saved_transposed:
                return 1, int(reader._saved_groups)
        return 0, 1

    def _is_a_plain_map(self, leaf: Node, owner: nn.Module | None) -> bool:
        """Whether the first thing done with a weight is the linear map it is for: its rows are known then."""
        return isinstance(owner, _ConvNd) or any(name_of(reader) in _MAPS for reader, _ in self._readers(leaf))

    def _readers(self, leaf: Node) -> list[tuple[Node, int]]:
        """Return what reads a weight, seen through the casts of autocast."""
        found: list[tuple[Node, int]] = []
        for reader, position in self.graph.readers[leaf, 0]:
            found += self.graph.readers[reader, 0] if name_of(reader) == "ToCopy" else [(reader, position)]
        return found

    def _follow(self, start: dict[Node, ScaleState]) -> tuple[set[Piece], list[tuple[Node, ScaleState]]]:
        """Propagate ``start`` until every path has ended at a normalization.

        Raises:
            NotInvariantError: where one does not.
        """
        states: dict[tuple[Node, int], ScaleState] = {(node, 0): state for node, state in start.items()}
        merged: set[Piece] = set()
        absorbers: list[tuple[Node, ScaleState]] = []
        queue: list[tuple[int, Node]] = []
        seen: set[Node] = set()
        for node in start:
            self._enqueue(queue, seen, node, 0)
        while queue:
            _, node = heapq.heappop(queue)
            operands = [states.get(edge) for edge in self.graph.sources[node]]
            for output in self.graph.outputs[node]:
                state = self._apply(NodeContext(self.graph, node, output, operands, merged, absorbers))
                if state is not None:
                    states[node, output] = state
                    self._enqueue(queue, seen, node, output)
        return merged, absorbers

    def _apply(self, walk: NodeContext) -> ScaleState | None:
        """Apply the rule of a node; a reason not to go on says so where the node is one of several consumers."""
        try:
            return apply(walk)
        except BiasNotScaledError:
            raise
        except NotInvariantError as problem:
            counts = [
                len(self.graph.readers[edge])
                for edge, operand in zip(self.graph.sources[walk.node], walk.operands, strict=True)
                if operand is not None
            ]
            if max(counts) == 1:
                raise
            raise NotInvariantError(f"one of {max(counts)} consumers: {problem}") from None

    def _enqueue(self, queue: list[tuple[int, Node]], seen: set[Node], node: Node, output: int) -> None:
        if (node, output) in self.graph.results:
            raise NotInvariantError("it reaches the loss without a normalization")
        for reader, _ in self.graph.readers[node, output]:
            if reader not in seen:
                seen.add(reader)
                heapq.heappush(queue, (self.graph.order[reader], reader))

    def _invariant(
        self,
        found: WeightUnits,
        merged: set[Piece],
        absorbers: list[tuple[Node, ScaleState]],
        owner: nn.Module | None,
        bias: str | None = None,
    ) -> WeightUnits:
        count = contiguous_units(merged, found.count)
        if count is None:
            return found.without_invariance("the rows that share a normalization do not follow each other")
        by_weight = not any(state.data for _, state in absorbers)
        kind: Kind = "matrix" if by_weight else "layer"
        kind = "filter" if count == found.count else "group" if count > 1 else kind
        titles = dict.fromkeys(self._title(node, state, owner) for node, state in absorbers)
        text = ", ".join(list(titles)[:2]) + (f" and {len(titles) - 2} more" if len(titles) > 2 else "")
        scale = self._scale(found.count, absorbers) if kind == "filter" else None
        return replace(found, kind=kind, count=count, bias=bias, scale=scale, normalization=text)

    def _title(self, node: Node, state: ScaleState, owner: nn.Module | None) -> str:
        if not state.data:
            return parametrization_title(owner)
        title = _TITLES.get(name_of(node), "a normalization written out")
        gamma = node.next_functions[1][0] if len(node.next_functions) > 1 else None
        name = self.names.get(id(getattr(gamma, "variable", None)))
        return title if name is None or name_of(node) not in _TITLES else f"{title} {layer_name(name)}"

    def _scale(self, count: int, absorbers: list[tuple[Node, ScaleState]]) -> str | None:
        """Return the name of γ where one batch normalization absorbs each row in its own channel, in all its runs."""
        for node, state in absorbers:
            if not state.data or _TITLES.get(name_of(node)) != "batch normalization":
                return None
            if state.axes[1] != rows(count) or state.degree != 1:
                return None
        gammas = {node.next_functions[1][0] for node, _ in absorbers}
        gamma = gammas.pop()
        if gammas or gamma is None or not hasattr(gamma, "variable"):
            return None
        alone = len(self.graph.readers[gamma, 0]) == len(absorbers)  # else γ.grad holds more than this weight's part
        return self.names.get(id(gamma.variable)) if alone else None
