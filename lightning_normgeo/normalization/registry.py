"""The normalizations by name: one table from which models, the command line, tests and documentation are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lightning_normgeo.errors import ConfigurationError, closest


@dataclass(frozen=True)
class Normalization:
    """One choice of normalization.

    Attributes:
        title: its name in words.
        layer: makes the layer for a number of channels, as torchvision's ``norm_layer``.
    """

    title: str
    layer: Callable[[int], nn.Module]


def _identity(channels: int) -> nn.Module:
    del channels
    return nn.Identity()


NORMS: dict[str, Normalization] = {
    "bn": Normalization("batch normalization", nn.BatchNorm2d),
    "none": Normalization("no normalization", _identity),
}


def find_norm(name: str) -> Normalization:
    """Return the entry of :data:`NORMS` called ``name``.

    Raises:
        ConfigurationError: for an unknown name, with the nearest known ones.
    """
    if name not in NORMS:
        raise ConfigurationError(f"norm={name!r} is unknown; choose one of: {closest(name, NORMS)}.")
    return NORMS[name]
