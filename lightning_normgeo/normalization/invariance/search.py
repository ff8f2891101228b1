r"""Search for the units of one weight: its rows are followed through the graph until normalizations absorb their scale.

Suppose that row i of the weight W is multiplied by α_i > 0. The search asks how each tensor computed from W changes:
the elements that belong to row i are multiplied by :math:`\alpha_i^k`, with the degree k of homogeneity. The rules of
:mod:`.rules` say how each operation changes the degree and where it moves the rows. A path ends where the degree
becomes 0, at a normalization. If every path ends so, the loss does not depend on α, and the rows are units. Where an
operation mixes rows (a sum over them, or shared statistics), only a common factor can cancel: these rows are *merged*
into one unit.
"""

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
"""Nodes that use a weight as a linear map (or prepare it for one), which determines the dimension of its rows."""


class Search:
    """Finds the units of the weights in one graph.

    Args:
        graph: of a forward pass.
        names: names of the parameters by id.
        layers: modules by module path.
        leaves: nodes of the parameters by name.

    Cost: one walk over the part of the graph behind a weight, for each way to cut the weight into slices.
    """

    def __init__(
        self, graph: Graph, names: dict[int, str], layers: dict[str, nn.Module], leaves: dict[str, Node]
    ) -> None:
        self.graph = graph
        self.names = names
        self.layers = layers
        self.leaves = leaves

    def units_of(self, name: str) -> WeightUnits:
        """Return the units of the weight called ``name``, for the cut into slices that gives the most units."""
        leaf, owner = self.leaves[name], self.layers.get(layer_name(name))
        dim, groups = self._where_rows_are(leaf, owner)
        found = self._units_along(name, owner, Slices(dim, groups))
        # Invariance to a factor for each slice includes invariance to a common factor. So a weight that is not
        # invariant as a whole has no invariant slices, along whichever dimension it is cut. The filters of a matrix
        # are vectors, and no cut along leading dimensions is finer.
        settled = not found.invariant or (found.kind == "filter" and leaf.variable.ndim < 3)
        # A bare parameter, such as one of shape (heads, out, in), does not say which dimensions enumerate its rows:
        # all are tried. In a linear map they are known.
        if settled or self._is_a_plain_map(leaf, owner):
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
            # W x + b is not homogeneous in W, but it is in (W, b): repeat the search with both scaled by α
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
        """Return the dimension of the output channels of a weight, and the groups of a transposed convolution."""
        readers = [(name_of(reader), reader, position) for reader, position in self._readers(leaf)]
        for name, reader, position in readers:
            if name == "WeightNormInterface":
                return int(reader._saved_dim), 1  # it normalizes the slices along its own ``dim``, whatever the layer
            # x @ W without a transpose: output channels are the columns of W. nn.Linear computes x @ W.T, and its
            # weight is read by the transpose.
            if (name, position) in (("Mm", 1), ("Addmm", 2)):
                return 1, 1
        if isinstance(owner, _ConvTransposeNd):
            return 1, owner.groups
        for name, reader, position in readers:
            if (name, position) == ("Convolution", 1) and reader._saved_transposed:
                return 1, int(reader._saved_groups)
        return 0, 1

    def _is_a_plain_map(self, leaf: Node, owner: nn.Module | None) -> bool:
        """Whether a weight is used directly as a linear map, so that the dimension of its rows is known."""
        return isinstance(owner, _ConvNd) or any(name_of(reader) in _MAPS for reader, _ in self._readers(leaf))

    def _readers(self, leaf: Node) -> list[tuple[Node, int]]:
        """Return the nodes that read a weight, each with the input position; casts are skipped.

        Autocast puts a cast (``ToCopy``) between a weight and the operation that uses it.
        """
        found: list[tuple[Node, int]] = []
        for reader, position in self.graph.readers[leaf, 0]:
            found += self.graph.readers[reader, 0] if name_of(reader) == "ToCopy" else [(reader, position)]
        return found

    def _follow(self, start: dict[Node, ScaleState]) -> tuple[set[Piece], list[tuple[Node, ScaleState]]]:
        """Propagate the states in ``start`` through the graph until every path has ended at a normalization.

        Returns:
            The digits over which rows were merged, and the normalizations with the states that went into them.

        Raises:
            NotInvariantError: if a path does not end at a normalization.
        """
        states: dict[tuple[Node, int], ScaleState] = {(node, 0): state for node, state in start.items()}
        merged: set[Piece] = set()
        absorbers: list[tuple[Node, ScaleState]] = []
        queue: list[tuple[int, Node]] = []
        seen: set[Node] = set()
        for node in start:
            self._enqueue(queue, seen, node, 0)
        # In topological order, since a rule needs the states of all inputs of a node at once: y + f(y) scales only if
        # both terms do. The heap yields the node with the smallest index, and readers have larger ones than what they
        # read, so no input of it can still be open. An input without a state does not scale with the weight.
        while queue:
            _, node = heapq.heappop(queue)
            operands = [states.get(edge) for edge in self.graph.inputs[node]]
            for output in self.graph.outputs[node]:
                state = self._apply(NodeContext(self.graph, node, output, operands, merged, absorbers))
                if state is not None:
                    states[node, output] = state
                    self._enqueue(queue, seen, node, output)
        return merged, absorbers

    def _apply(self, walk: NodeContext) -> ScaleState | None:
        """Apply the rule of a node; if it fails and its input has several readers, add their number to the reason."""
        try:
            return apply(walk)
        except BiasNotScaledError:
            raise  # unchanged, as its type makes _units_along try again with the bias
        except NotInvariantError as problem:
            counts = [
                len(self.graph.readers[edge])
                for edge, operand in zip(self.graph.inputs[walk.node], walk.operands, strict=True)
                if operand is not None
            ]
            if max(counts) == 1:
                raise
            raise NotInvariantError(f"one of {max(counts)} consumers: {problem}") from None

    def _enqueue(self, queue: list[tuple[int, Node]], seen: set[Node], node: Node, output: int) -> None:
        # checked for every output that scales: a tensor may be read by a normalization and be part of the loss too
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
        # WeightUnits.rows reshapes a weight to (count, ...), so only runs of consecutive rows can be units
        count = contiguous_units(merged, found.count)
        if count is None:
            return found.without_invariance("the rows that share a normalization are not consecutive")
        # a normalization of the weight itself comes before any data is multiplied by it
        by_weight = not any(state.data for _, state in absorbers)
        kind: Kind = "matrix" if by_weight else "layer"
        if count == found.count:
            kind = "filter"
        elif count > 1:
            kind = "group"
        titles = list(dict.fromkeys(self._title(node, state, owner) for node, state in absorbers))
        text = ", ".join(titles[:2])
        if len(titles) > 2:
            text += f" and {len(titles) - 2} more"
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
        """Return the name of γ if one batch normalization absorbs all rows, each in a channel of its own; else None.

        It serves the correction for ε: a batch normalization with ε is invariant only up to
        ⟨W_i, ∂L/∂W_i⟩ = ε / (σ_i² + ε) · γ_i ∂L/∂γ_i.
        """
        for node, state in absorbers:
            if not state.data or _TITLES.get(name_of(node)) != "batch normalization":
                return None
            # the formula pairs row i with channel i, and holds for pre-activations linear in W
            if state.axes[1] != rows(count) or state.degree != 1:
                return None
        gammas = {node.next_functions[1][0] for node, _ in absorbers}
        gamma = gammas.pop()
        if gammas or gamma is None or not hasattr(gamma, "variable"):
            return None
        # where γ is read elsewhere too, γ.grad is a sum in which the share of this weight is unknown
        alone = len(self.graph.readers[gamma, 0]) == len(absorbers)
        return self.names.get(id(gamma.variable)) if alone else None
