"""Scale-invariant units of a model: the slices of its weights whose scale leaves the loss unchanged.

They are found from the autograd graph of one forward pass, which records the operations that really ran, whatever the
Python control flow, functional normalizations and parametrized weights. They are the scale symmetries that scale slices
of one layer alone. The kind of normalization determines the unit:

- batch and instance normalization, weight normalization and weight standardization: each output filter is a unit;
- group normalization: the filters of one group jointly; layer normalization: the whole layer jointly;
- spectral normalization: the whole matrix.

The paper states the invariance for every row (Lemma 3), which holds in the first case and not in the others.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_normgeo.normalization.autograd.compiled_modules import check_not_compiled
from lightning_normgeo.normalization.autograd.graph import Graph
from lightning_normgeo.normalization.autograd.tracing import traced_graph
from lightning_normgeo.normalization.names import named_weights
from lightning_normgeo.normalization.user_inputs import as_example, check_module
from lightning_normgeo.symmetries.search import symmetries_of
from lightning_normgeo.symmetries.solution import Solution, solve
from lightning_normgeo.symmetries.symmetries import Symmetries
from lightning_normgeo.symmetries.units.find import UnitFinder
from lightning_normgeo.symmetries.units.guess import guess_units
from lightning_normgeo.symmetries.units.joint import joint_units
from lightning_normgeo.symmetries.units.weight_units import Units, WeightUnits

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

    Cost: one forward pass, a walk over its graph for all weights, and for each weight a walk over the operations
    between it and its normalization.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> convolution, last = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(288, 4)
        >>> network = nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), last)
        >>> images = torch.rand(4, 3, 8, 8)
        >>> units = scale_invariant_units(network, images)
        >>> units["0"].kind, units["4"].kind
        ('filter', 'none')
    """
    check_module("scale_invariant_units(module, example_batch)", module)
    check_not_compiled("scale_invariant_units", module)
    found = {
        units.name: units
        for units in units_of(solve(traced_graph(module, as_example(module, example_batch)), module), module)
    }
    weights = []
    for name, parameter in named_weights(module, frozen=True):
        why = "no output depends on it" if parameter.requires_grad else "frozen: it has no gradient"
        other = WeightUnits(name=name, kind="none", count=parameter.shape[0], reason=why)
        weights.append(found.get(name, other))
    return Units(tuple(weights))


def search(module: nn.Module, graph: Graph, joint: bool = True) -> tuple[Symmetries | None, tuple[WeightUnits, ...]]:
    """Return the scale symmetries in a graph, and the units of its weights, single and joint.

    There are no symmetries, and units are guessed by :func:`guess_units`, if torch.compile has hidden part of the graph
    or if it holds unsharded parameters whose names are unknown.

    Args:
        module: the model.
        graph: of one of its forward passes, before the backward pass.
        joint: whether to look for units of several layers, and of parts of weights, which take the place of the single
            units of their weights.
    """
    if graph.compiled or graph.anonymous:
        return None, guess_units(module)
    found = solve(graph, module)
    finder = UnitFinder(found, module)
    single = _single(finder, found, module)
    if not joint:
        return symmetries_of(found), single
    several = joint_units(found, single)
    taken = {name for own in several for name in (own.name, *own.others)}
    parts = {own.name: finder.parts_of(own.name) for own in single if not own.invariant and own.name not in taken}
    rest = [part for own in single if own.name not in taken for part in parts.get(own.name) or (own,)]
    return symmetries_of(found), (*rest, *several)


def units_from_graph(module: nn.Module, loss: Tensor) -> tuple[WeightUnits, ...]:
    """Find the units of every trainable weight of ``module`` that ``loss`` depends on.

    Args:
        module: owner of the weights.
        loss: a scalar whose autograd graph has not been freed by a backward pass.

    Returns:
        One entry per weight, in the order of ``module.named_parameters()``.

    The graph does not contain the values of constants: a weight in front of a normalization that is written out with an
    ε has no units here, other than with :func:`scale_invariant_units`.

    Cost: one walk over the graph in Python for each weight. No tensor is read, except that the functions inside
    reentrant activation checkpoints run forward once more.
    """
    return units_of(solve(Graph(loss), module), module)


def units_of(found: Solution, module: nn.Module) -> tuple[WeightUnits, ...]:
    """Return the units of every trainable weight of ``module`` that is in a graph, from its solution."""
    return _single(UnitFinder(found, module), found, module)


def _single(finder: UnitFinder, found: Solution, module: nn.Module) -> tuple[WeightUnits, ...]:
    names = set(found.names.values())
    hides = found.graph.hides_reentrant
    weights = [(name, weight) for name, weight in named_weights(module) if name in names or hides]
    return tuple(finder.units_of(name) if name in names else _hidden(name, weight) for name, weight in weights)


def _hidden(name: str, weight: Tensor) -> WeightUnits:
    return WeightUnits(name=name, kind="none", count=weight.shape[0], reason=REENTRANT)
