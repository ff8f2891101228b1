"""Scale-invariant units of a model: which slices of which weights the loss does not feel the length of.

Found from the autograd graph of one forward pass, so any Python control flow, functional normalization and
parametrized weight is seen as it ran. The rows of a weight are followed through all that is positively homogeneous
(linear maps, ReLU, pooling, reshapes, concatenations) until normalizations absorb their scale on every path:

- batch and instance normalization, weight normalization and weight standardization: each output filter is a unit;
- group normalization: the filters of one group jointly; layer normalization: the whole layer jointly;
- spectral normalization: the whole matrix.

The paper's "every row" (Lemma 3) is right for the first and wrong for the others.
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
"""Why a weight has no units that one such checkpoint hides."""


def scale_invariant_units(module: nn.Module, example_batch: Any) -> Units:
    """Return for each weight the slices that the loss is invariant to the scale of, and why.

    One forward pass in the mode the module is in; nothing of it stays: buffers, ``.grad`` and random numbers are as
    before. In evaluation mode batch normalization is an affine map and makes nothing invariant; call
    ``module.train()`` to see the units of training.

    Args:
        module: any module whose outputs contain tensors that the loss is computed from.
        example_batch: its input, of two samples at least; a tuple holds positional and a dict keyword arguments.
            Arrays of numpy, and lists of numbers, become tensors as the module takes them.

    Returns:
        One entry for each parameter with rows (two or more dimensions), also for those without invariance.

    Raises:
        ConfigurationError: for a compiled module, and a batch that the module cannot take.
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
    """Return the units behind the results of ``graph``, and whether they are a guess.

    Read from the graph as by :func:`units_from_graph`, or guessed by :func:`guess_units` where torch.compile made
    part of the graph opaque, or the names of what stands in for the parameters are not known.
    """
    opaque = graph.compiled or graph.anonymous
    return (guess_units(module), True) if opaque else (_units_in(graph, module), False)


def units_from_graph(module: nn.Module, loss: Tensor) -> tuple[WeightUnits, ...]:
    """Find the units of every trainable weight of ``module`` that ``loss`` depends on.

    Args:
        module: owner of the weights.
        loss: a scalar whose autograd graph is still alive.

    Returns:
        One entry per weight, in the order of ``module.named_parameters()``.

    Cost: one walk over the graph in Python; no tensor is touched, but for reentrant activation checkpoints, which run
    forward once more.
    """
    return _units_in(Graph(loss), module)


def _units_in(graph: Graph, module: nn.Module) -> tuple[WeightUnits, ...]:
    if graph.unsharded is None:  # to run divided modules out of turn would have processes wait for each other
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
