"""Scale-invariant units of a model: the slices of its weights whose scale leaves the loss unchanged.

They are found from the autograd graph of one forward pass, which records the operations that really ran, whatever the
Python control flow, functional normalizations and parametrized weights. The rows of a weight are followed through all
positively homogeneous operations (linear maps, ReLU, pooling, reshapes, concatenations) until normalizations cancel
their scale on every path. The kind of normalization determines the unit:

- batch and instance normalization, weight normalization and weight standardization: each output filter is a unit;
- group normalization: the filters of one group jointly; layer normalization: the whole layer jointly;
- spectral normalization: the whole matrix.

The paper states the invariance for every row (Lemma 3), which holds in the first case and not in the others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.autograd.graph import Graph, is_compiled, traced_graph
from lightning_normgeo.normalization.autograd.reentrant_checkpoints import opened
from lightning_normgeo.normalization.invariance.guess import guess_units
from lightning_normgeo.normalization.invariance.search import Search
from lightning_normgeo.normalization.names import by_clean_name, clean_name, named_weights
from lightning_normgeo.normalization.units import Units, WeightUnits
from lightning_normgeo.normalization.user_inputs import as_example, check_module

REENTRANT = "inside a reentrant activation checkpoint"
"""Reason reported for a weight without units that is used in a checkpoint that could not be examined."""


def scale_invariant_units(module: nn.Module, example_batch: Any) -> Units:
    """Return the scale-invariant units of each weight, and the reason for each result.

    The module runs one forward pass in its current mode. Buffers, ``.grad`` and random number generators are left as
    they were. In evaluation mode batch normalization is an affine map and causes no invariance; call
    ``module.train()`` first to get the units of training.

    Args:
        module: any module whose outputs contain the tensors that the loss is computed from.
        example_batch: its input, of at least two samples; a tuple holds positional and a dict keyword arguments.
            Numpy arrays and lists of numbers become tensors with the device and dtype of the module.

    Returns:
        One entry for each parameter with rows (at least two dimensions), also for those without invariance.

    Raises:
        ConfigurationError: for a compiled module, and for a batch that the module does not accept.

    Cost: one forward pass, and one walk over its graph for each weight.
    """
    check_module("scale_invariant_units(module, example_batch)", module)
    if is_compiled(module):
        raise ConfigurationError("scale_invariant_units cannot look into a compiled model. Give it the model itself.")
    found = {units.name: units for units in _units_in(traced_graph(module, as_example(module, example_batch)), module)}
    weights = []
    for name, parameter in named_weights(module, frozen=True):
        why = "no output depends on it" if parameter.requires_grad else "frozen: it has no gradient"
        other = WeightUnits(name=name, kind="none", count=parameter.shape[0], reason=why)
        weights.append(found.get(name, other))
    return Units(tuple(weights))


def find_units(module: nn.Module, graph: Graph) -> tuple[tuple[WeightUnits, ...], bool]:
    """Return the units of the weights in a graph, and whether they are a guess.

    They are read from the graph as by :func:`units_from_graph`. They are guessed by :func:`guess_units` if
    torch.compile has hidden part of the graph, or if the graph holds unsharded parameters whose names are unknown.

    Args:
        module: the model.
        graph: of one of its forward passes, before the backward pass.

    Returns:
        One entry per trainable weight in the graph, and whether :func:`guess_units` made them.
    """
    opaque = graph.compiled or graph.anonymous
    return (guess_units(module), True) if opaque else (_units_in(graph, module), False)


def units_from_graph(module: nn.Module, loss: Tensor) -> tuple[WeightUnits, ...]:
    """Find the units of every trainable weight of ``module`` that ``loss`` depends on.

    Args:
        module: owner of the weights.
        loss: a scalar whose autograd graph has not been freed by a backward pass.

    Returns:
        One entry per weight, in the order of ``module.named_parameters()``.

    Cost: one walk over the graph in Python for each weight. No tensor is read, except that the functions inside
    reentrant activation checkpoints run forward once more.
    """
    return _units_in(Graph(loss), module)


def _units_in(graph: Graph, module: nn.Module) -> tuple[WeightUnits, ...]:
    # not for sharded models: running a checkpointed function again gathers its parameters, and a process that does so
    # while the others do not would wait for them forever
    if graph.unsharded is None:
        graph = opened(graph, module)
    names = {id(parameter): name for name, parameter in by_clean_name(module.named_parameters()).items()}
    names |= graph.unsharded or {}
    layers = {clean_name(name): layer for name, layer in module.named_modules()}
    leaves = {names[id(leaf.variable)]: leaf for leaf in graph.leaves if id(leaf.variable) in names}
    search = Search(graph, names, layers, leaves)
    found = [(name, weight) for name, weight in named_weights(module) if name in leaves or graph.hides_reentrant]
    return tuple(search.units_of(name) if name in leaves else _hidden(name, weight) for name, weight in found)


def _hidden(name: str, weight: Tensor) -> WeightUnits:
    return WeightUnits(name=name, kind="none", count=weight.shape[0], reason=REENTRANT)
