"""Search for all scale symmetries of a network, from the autograd graph of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.sparse import csr_array
from torch import Tensor, nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.autograd.graph import Graph, Node, is_compiled, traced_graph
from lightning_normgeo.normalization.autograd.reentrant_checkpoints import opened
from lightning_normgeo.normalization.invariance.node_context import name_of
from lightning_normgeo.normalization.names import by_clean_name
from lightning_normgeo.normalization.user_inputs import as_example, check_module
from lightning_normgeo.symmetries.batch_norms import BatchNormNodes, input_exponents, row_scale, widths_of
from lightning_normgeo.symmetries.equations.nullspace import solution
from lightning_normgeo.symmetries.equations.signs import with_few_signs
from lightning_normgeo.symmetries.families import families
from lightning_normgeo.symmetries.propagation import Degrees, degrees
from lightning_normgeo.symmetries.rules.context import words
from lightning_normgeo.symmetries.slices import Slices, generators, parameter_slices, without_effect
from lightning_normgeo.symmetries.symmetries import Symmetries


def scale_symmetries(module: nn.Module, example_batch: Any, loss: Callable[[Any], Tensor] | None = None) -> Symmetries:
    """Return a basis of all scale symmetries of a network that follow from its operations.

    Each operation of one forward pass gives linear equations between the exponents of the slices of all parameters:
    a sum needs equal exponents, a product adds them up, a normalization removes one that is constant over what it
    averages, and a function that keeps no scale needs 0. Their solutions are the symmetries. An operation that is not
    understood needs 0, so that a symmetry can be missed, but none is claimed that does not exist. The ε of
    normalizations is taken as zero.

    The module runs in its current mode. Buffers, ``.grad`` and random number generators are left as they were. In
    evaluation mode batch normalization is an affine map; call ``module.train()`` first to get the symmetries of
    training.

    Args:
        module: any module whose outputs contain the tensors that the loss is computed from.
        example_batch: its input, of at least two samples; a tuple holds positional and a dict keyword arguments.
        loss: function of the module's outputs. Default: any loss, which may depend on every output in any way.

    Raises:
        ConfigurationError: for a compiled module, and for a batch that the module does not accept.

    Cost: one forward pass, and about as long for the search as a forward pass of a few samples on a CPU: 0.4 to 1 s for
    networks of 100 layers. No tensor is read.
    """
    check_module("scale_symmetries(module, example_batch)", module)
    if is_compiled(module):
        raise ConfigurationError("scale_symmetries cannot look into a compiled model. Give it the model itself.")
    with BatchNormNodes(module) as batch_norms:
        graph = traced_graph(module, as_example(module, example_batch), loss)
    return symmetries_in(graph, module, batch_norms.nodes)


def symmetries_in(graph: Graph, module: nn.Module, batch_norms: Mapping[str, Node | None] | None = None) -> Symmetries:
    """Return the scale symmetries that a graph shows.

    Args:
        graph: of a forward pass of the module, before the backward pass.
        module: owner of the parameters.
        batch_norms: node of each batch normalization with running statistics, by module path. Default: not known.
    """
    if graph.unsharded is None:
        graph = opened(graph, module)
    names = _names(graph, module)
    found = degrees(graph, names)
    basis = solution(found.exponents)
    slices, unknowns = parameter_slices(found, names)
    basis = with_few_signs(basis, unknowns)
    matrix = generators(basis, unknowns)
    kept = np.flatnonzero(np.diff(basis[:, unknowns].tocsr().indptr) > 0)
    dead = without_effect(found, names, slices)
    basis = basis[kept].tocsr()
    groups = families(matrix, slices, dead, found.absorbed, basis)
    reasons, statistics = _reasons(found, names, slices, matrix), None
    if batch_norms is not None:
        scale = row_scale(matrix, basis[:, unknowns])
        statistics = input_exponents(batch_norms, found.batch_norms, widths_of(module), basis, scale)
    return Symmetries(tuple(groups), tuple(slices), matrix, dict(found.unknown), reasons, statistics)


def _names(graph: Graph, module: nn.Module) -> dict[Node, str]:
    """Return the names of the parameters in a graph, in the order of the module; others are unnamed and left out."""
    nodes = {id(leaf.variable): leaf for leaf in graph.leaves}
    own = {id(parameter): name for name, parameter in by_clean_name(module.named_parameters()).items()}
    own |= graph.unsharded or {}
    return {nodes[key]: name for key, name in own.items() if key in nodes}


def _reasons(found: Degrees, names: dict[Node, str], slices: list[Slices], matrix: csr_array) -> dict[str, str]:
    """Return for each parameter that is in no symmetry the operation that was first to forbid one, in words."""
    used = np.zeros(matrix.shape[1], bool)
    used[matrix.indices] = True
    free = {own.parameter for own in slices if used[own.start : own.stop].any()}
    reasons = {}
    for node, name in names.items():
        if name not in free:
            causes = (found.exponents.cause_of_zero(term) for term in found.parameters[node].terms)
            cause = next((cause for cause in causes if cause is not None), None)
            reasons[name] = "it reaches the loss" if cause is None else words(name_of(cause))
    return reasons
