"""Guessed units of compiled models, whose autograd graph is opaque, from the order in which layers are registered."""

from __future__ import annotations

import itertools

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_normgeo.normalization.names import by_clean_name, clean_name, layer_name, named_weights
from lightning_normgeo.normalization.parametrizations import parametrization_kind, parametrization_title, rows_dim
from lightning_normgeo.symmetries.units.weight_units import WeightUnits

_CONSTRUCTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def guess_units(module: nn.Module) -> tuple[WeightUnits, ...]:
    """Guess the units of a model's weights without a forward pass.

    The units of a parametrized weight follow from its parametrization. The weight of a linear or convolutional layer
    is taken to be scale invariant, filter by filter, if a batch normalization in training mode with as many channels
    is registered directly behind the layer. This may be wrong: callers have to check that ⟨W, g⟩ = 0.

    Args:
        module: the model.

    Returns:
        One entry per trainable weight, in the order of ``module.named_parameters()``.
    """
    parameters = {id(parameter): name for name, parameter in by_clean_name(module.named_parameters()).items()}
    layers = {clean_name(name): layer for name, layer in module.named_modules()}
    norms = _norms_behind(module)
    found = []
    for name, weight in named_weights(module):
        layer, norm = layers.get(layer_name(name)), norms.get(id(weight))
        dim = 0 if layer is None else rows_dim(layer)
        units = WeightUnits(name=name, kind="none", count=weight.shape[dim], dim=dim)
        kind = parametrization_kind(layer)
        if kind is not None:
            count = 1 if kind == "matrix" else units.count
            units = WeightUnits(name=name, kind=kind, count=count, dim=dim, normalization=parametrization_title(layer))
        elif norm is not None:
            scale = None if norm.weight is None else parameters[id(norm.weight)]
            title = "batch normalization registered behind it"
            units = WeightUnits(name=name, kind="filter", count=units.count, dim=dim, scale=scale, normalization=title)
        else:
            units = units.without_invariance("no batch normalization registered behind it")
        found.append(units)
    return tuple(found)


def _norms_behind(module: nn.Module) -> dict[int, _BatchNorm]:
    """Return the batch normalization registered directly behind each layer that fits it, by the id of its weight."""
    norms = {}
    for parent in module.modules():
        for layer, behind in itertools.pairwise(parent.children()):
            if isinstance(layer, _CONSTRUCTED) and isinstance(behind, _BatchNorm) and behind.training:
                weight = layer._parameters.get("weight")  # not layer.weight, which would run a parametrization
                if weight is not None and weight.shape[0] == behind.num_features:
                    norms[id(weight)] = behind
    return norms
