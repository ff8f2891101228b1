"""Normalizations that make units invariant: their names, and the γ behind a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.sparse import csr_array
from torch import nn

from lightning_normgeo.normalization.autograd.graph import Node
from lightning_normgeo.normalization.autograd.nodes import name_of
from lightning_normgeo.normalization.names import layer_name
from lightning_normgeo.normalization.parametrizations import parametrization_title
from lightning_normgeo.symmetries.degrees.nodes import ATTENTIONS, BATCH_NORMS
from lightning_normgeo.symmetries.rules.context import Absorption, words
from lightning_normgeo.symmetries.solution import Solution
from lightning_normgeo.symmetries.units.one_layer import LayerSolutions

_LINEAR_MAPS = ATTENTIONS | {
    "Convolution",
    "SlowConv2D",
    "Mm",
    "Addmm",
    "Bmm",
    "Baddbmm",
    "Linear",
    "Embedding",
    "EmbeddingBag",
    "Index",
    "IndexSelect",
    "SparseAddmm",
}
"""Nodes by which data is multiplied with a weight, or picks rows of it."""
_LAYERS = BATCH_NORMS | {"NativeGroupNorm", "NativeLayerNorm", "FusedRmsNorm"}


class Normalizations:
    """The normalizations in a graph, and which of them remove the scale of which generator.

    Args:
        found: the solution of the graph.
    """

    def __init__(self, found: Solution) -> None:
        self._found = found
        self._of_data = _behind_data(found)
        self._leaves = {name: node for node, name in found.names.items()}

    def behind(self, units: LayerSolutions) -> list[Absorption]:
        """Return the normalizations that remove the scale of some units, in topological order."""
        if units.degrees is not self._found.degrees:
            return [one for one in units.degrees.absorbed if units.moves(one.exponents)]
        touched = np.unique(self._found.normalizations[units.columns].indices)
        return [self._found.degrees.absorbed[k] for k in touched]

    def of_data(self, absorbed: Sequence[Absorption]) -> bool:
        """Whether one of them normalizes data; otherwise all of them normalize a weight itself."""
        return any(one.node in self._of_data for one in absorbed)

    def text(self, absorbed: Sequence[Absorption], owner: nn.Module | None) -> str:
        """Return the normalizations in words.

        Args:
            absorbed: the normalizations.
            owner: layer of the weight.
        """
        titles = list(dict.fromkeys(self._title(one.node, owner) for one in absorbed))
        return ", ".join(titles[:2]) + (f" and {len(titles) - 2} more" if len(titles) > 2 else "")

    def _title(self, node: Node, owner: nn.Module | None) -> str:
        if node not in self._of_data:
            return parametrization_title(owner)
        if name_of(node) not in _LAYERS:
            return "a normalization written out"
        gamma = _gamma(node, self._found.names)
        return words(node) if gamma is None else f"{words(node)} {layer_name(gamma)}"

    def scale(self, absorbed: Sequence[Absorption], units: LayerSolutions) -> str | None:
        """Return the name of γ if one batch normalization removes all scales, each in a channel of its own; else None.

        It serves the correction for ε: a batch normalization with ε is invariant only up to
        ⟨W_i, ∂L/∂W_i⟩ = ε / (σ_i² + ε) · γ_i ∂L/∂γ_i.

        Args:
            absorbed: the normalizations that remove the scales.
            units: the solution of each unit.
        """
        for one in absorbed:
            channels = units.degrees.batch_norms.get(one.node)
            # the formula pairs unit i with channel i, and holds for pre-activations linear in W
            if one.node not in self._of_data or channels is None or not _is_identity(units.of(channels)):
                return None
        gammas = {_gamma(one.node, self._found.names) for one in absorbed}
        gamma = gammas.pop() if len(gammas) == 1 else None
        if gamma is None:
            return None
        # where γ is read elsewhere too, γ.grad is a sum in which the share of this weight is unknown
        return gamma if len(self._found.graph.readers[self._leaves[gamma], 0]) == len(absorbed) else None


def _gamma(node: Node, names: Mapping[Node, str]) -> str | None:
    return names.get(node.next_functions[1][0]) if len(node.next_functions) > 1 else None


def _is_identity(matrix: csr_array) -> bool:
    count = matrix.shape[0]
    matrix.sort_indices()
    return bool(
        matrix.shape == (count, count)
        and matrix.nnz == count
        and np.array_equal(matrix.indices, np.arange(count))
        and np.array_equal(matrix.indptr, np.arange(count + 1))
        and np.allclose(matrix.data, 1.0)
    )


def _behind_data(found: Solution) -> set[Node]:
    """Return the nodes that compute with the result of a linear map, and so with data."""
    graph, result = found.graph, set()
    for node in sorted(graph.order, key=graph.order.__getitem__):
        if name_of(node) in _LINEAR_MAPS or any(source in result for source, _ in graph.inputs[node]):
            result.add(node)
    return result
