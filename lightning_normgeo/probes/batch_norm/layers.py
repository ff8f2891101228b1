"""Batch normalizations of a model that have γ and β, by module path."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_normgeo.geometry.rows import main_device
from lightning_normgeo.normalization.names import clean_name


def affine_batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the batch normalizations in ``module`` that have γ and β, by module path."""
    return {
        clean_name(name): layer
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm)
        and not isinstance(layer, nn.modules.instancenorm._InstanceNorm)
        and layer.affine
    }


def readable_batch_norms(module: nn.Module) -> dict[str, _BatchNorm]:
    """Return the :func:`affine_batch_norms` on the device of most of the module, which are read together."""
    device = main_device(module.parameters())
    found = affine_batch_norms(module)
    return {name: layer for name, layer in found.items() if main_device(layer.parameters()) == device}
