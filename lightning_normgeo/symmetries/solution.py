"""Solution of the equations of one graph, from which symmetries and units are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array, diags_array
from torch import nn

from lightning_normgeo.normalization.autograd.graph import Graph, Node
from lightning_normgeo.normalization.autograd.reentrant_checkpoints import opened
from lightning_normgeo.normalization.names import by_clean_name
from lightning_normgeo.symmetries.equations.exponents import Ids, Mask
from lightning_normgeo.symmetries.equations.nullspace import solution
from lightning_normgeo.symmetries.equations.signs import with_few_signs
from lightning_normgeo.symmetries.families import Family, families
from lightning_normgeo.symmetries.propagation import RESULTS, Degrees, Propagation
from lightning_normgeo.symmetries.rules.context import words
from lightning_normgeo.symmetries.slices import Slices, generators, parameter_slices, row_scale, without_effect


@dataclass(frozen=True)
class Solution:
    """All generators of one graph, in terms of its unknown exponents and of the slices of its parameters.

    Attributes:
        propagation: of degrees through the graph.
        names: name of each parameter by its node.
        degrees: degrees of the parameters, with what the operations of the graph require.
        slices: slices of the parameters.
        unknowns: unknown exponent of each slice.
        basis: generators of shape (generators, unknowns).
        exponents: the same generators of shape (generators, slices); 1 is the smallest exponent of each.
        dead: slices that the results do not depend on.
    """

    propagation: Propagation
    names: dict[Node, str]
    degrees: Degrees
    slices: Sequence[Slices]
    unknowns: Ids
    basis: csr_array
    exponents: csr_array
    dead: Mask

    @property
    def graph(self) -> Graph:
        """The graph."""
        return self.propagation.graph

    @cached_property
    def families(self) -> list[Family]:
        """The generators in families."""
        causes = [words(one.node) for one in self.degrees.absorbed]
        return families(self.exponents, self.slices, self.dead, causes, self.basis, self.normalizations)

    @cached_property
    def normalizations(self) -> csr_array:
        """The normalizations that remove each unknown, as a matrix of shape (unknowns, normalizations).

        From it those of one generator are read without a look at all the others of a deep network.
        """
        absorbed = self.degrees.absorbed
        unknowns = np.concatenate([np.zeros(0, np.int64), *(one.exponents.ravel() for one in absorbed)])
        owner = np.repeat(np.arange(len(absorbed)), [one.exponents.size for one in absorbed])
        shape = (self.basis.shape[1], len(absorbed))
        return csr_array((np.ones(len(unknowns)), (unknowns, owner)), shape=shape)

    @cached_property
    def reasons(self) -> dict[str, str]:
        """For each parameter that is in no generator the operation that was first to forbid one, in words."""
        used = np.zeros(self.exponents.shape[1], bool)
        used[self.exponents.indices] = True
        free = {own.parameter for own in self.slices if used[own.start : own.stop].any()}
        return {name: self._reason(node) for node, name in self.names.items() if name not in free}

    def _reason(self, node: Node) -> str:
        causes = (self.degrees.exponents.cause_of_zero(term) for term in self.degrees.parameters[node].terms)
        cause = next((cause for cause in causes if cause is not None), None)
        return "it reaches the loss" if cause in (None, RESULTS) else words(cause)


def solve(graph: Graph, module: nn.Module) -> Solution:
    """Return all generators that follow from the operations of a graph.

    Args:
        graph: of a forward pass of the module, before the backward pass.
        module: owner of the parameters.
    """
    # not for sharded models: running a checkpointed function again gathers its parameters, and a process that does so
    # while the others do not would wait for them forever
    if graph.unsharded is None:
        graph = opened(graph, module)
    names = _names(graph, module)
    propagation = Propagation(graph)
    found = propagation.from_all(names)
    basis = solution(found.exponents)
    slices, unknowns = parameter_slices(found, names)
    basis = with_few_signs(basis, unknowns)
    exponents = generators(basis, unknowns)
    basis = basis[np.flatnonzero(np.diff(basis[:, unknowns].tocsr().indptr) > 0)]
    scale = row_scale(exponents, basis[:, unknowns])
    dead = without_effect(propagation, names, slices)
    return Solution(propagation, names, found, slices, unknowns, (diags_array(scale) @ basis).tocsr(), exponents, dead)


def _names(graph: Graph, module: nn.Module) -> dict[Node, str]:
    """Return the names of the parameters in a graph, in the order of the module; others are unnamed and left out."""
    nodes = {id(leaf.variable): leaf for leaf in graph.leaves}
    own = {id(parameter): name for name, parameter in by_clean_name(module.named_parameters()).items()}
    own |= graph.unsharded or {}
    return {nodes[key]: name for key, name in own.items() if key in nodes}
