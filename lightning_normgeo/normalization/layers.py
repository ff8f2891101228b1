"""Normalization layers over the data, built from short names for any number of spatial dimensions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_normgeo.errors import ConfigurationError

GROUPS = 32
"""Default number of groups of a group normalization, where the channels allow it (Wu & He 2018)."""
FEWEST_VALUES = 8
"""Fewest values per sample that a group has by default; two values normalized jointly keep only their signs."""
LITTLE_LEFT = {
    1: "a normalization of one value returns zero",
    2: "a normalization of two values keeps only their signs",
}
"""The result of normalizing one or two values, for error messages: too little is left to learn from."""
_BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE_NORMS = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}


@dataclass(frozen=True)
class LayerSettings:
    """Settings of one normalization layer over the data.

    Attributes:
        channels: number of channels C of inputs ``(N, C, ...)``.
        dims: number of spatial dimensions of the input, 0 to 3; torch has the same layers for 0 and 1.
        eps: ε, added to the variance; not negative.
        momentum: weight of a new batch in the running statistics, 0 to 1; None for a cumulative average.
        affine: whether the layer has γ and β.
        groups: number of groups of ``gn``. Default (None): :func:`default_groups`.
        positions: number of spatial positions of the input; None where unknown.
    """

    channels: int
    dims: int = 2
    eps: float = 1e-5
    momentum: float | None = 0.1
    affine: bool = True
    groups: int | None = None
    positions: int | None = None


def default_groups(channels: int, positions: int | None = None) -> int:
    """Return the default number of groups: the largest divisor of the channels, up to 32, with large enough groups.

    A group has at least two channels and, where the number of positions is known, at least :data:`FEWEST_VALUES`
    values per sample: 64 channels behind a linear layer make 8 groups. Where no divisor allows this, the default is 1.
    """
    enough = FEWEST_VALUES if positions is not None else 0
    fits = [
        groups
        for groups in range(1, min(GROUPS, channels // 2) + 1)
        if channels % groups == 0 and channels // groups * (positions or 1) >= enough
    ]
    return max(fits, default=1)


def data_layer(kind: str, settings: LayerSettings) -> nn.Module:
    """Return a new normalization layer.

    Args:
        kind: ``bn``, ``in``, ``gn``, ``ln`` (over all channels and positions jointly) or ``mbn``.
        settings: of the layer.

    Raises:
        ConfigurationError: for groups that do not divide the channels, or that hold only one or two values.
    """
    channels, dims, eps, affine = settings.channels, max(1, settings.dims), settings.eps, settings.affine
    if kind == "bn":
        return _BATCH_NORMS[dims](channels, eps=eps, momentum=settings.momentum, affine=affine)
    if kind == "in":
        return _INSTANCE_NORMS[dims](channels, eps=eps, affine=affine)
    if kind == "mbn":
        return MeanOnlyBatchNorm(channels, momentum=settings.momentum)
    usual = default_groups(channels, settings.positions)
    groups = usual if settings.groups is None else settings.groups
    groups = 1 if kind == "ln" else groups
    if groups < 1 or channels % groups:
        nearest = max((g for g in range(1, groups) if channels % g == 0), default=1)
        raise ConfigurationError(
            f"groups={groups} does not divide {channels} channels. Choose a divisor, such as {nearest}, or leave it "
            "out."
        )
    values = channels // groups * (settings.positions or FEWEST_VALUES)
    if values in LITTLE_LEFT and groups > 1:
        raise ConfigurationError(
            f"groups={groups} of {channels} channels with {settings.positions} positions each have {values} values, "
            f"and {LITTLE_LEFT[values]}. Choose at most {usual}, or leave it out."
        )
    return nn.GroupNorm(groups, channels, eps=eps, affine=affine)


class MeanOnlyBatchNorm(nn.Module):
    r"""Mean-only batch normalization (Salimans & Kingma 2016, section 4): :math:`y - \mu + \beta`.

    It is meant to follow a layer with weight normalization, which already fixes the scale of y. Inputs have shape
    ``(N, C, ...)``. In evaluation mode the running mean is used as μ.

    Args:
        num_features: number of channels C.
        momentum: weight of a new batch in the running mean, 0 to 1; None for a cumulative average, as in torch.
    """

    running_mean: Tensor
    num_batches_tracked: Tensor

    def __init__(self, num_features: int, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.num_features = num_features
        self.momentum = momentum
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def extra_repr(self) -> str:
        """Return the settings for ``print(model)``."""
        return f"{self.num_features}, momentum={self.momentum}"

    def forward(self, y: Tensor) -> Tensor:
        """Return y - μ + β, of the shape of y."""
        if not self.training:
            return y - _broadcast(self.running_mean - self.bias, y)
        mean = y.mean([d for d in range(y.ndim) if d != 1])
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
            self.running_mean += momentum * (mean - self.running_mean)
        return y - _broadcast(mean - self.bias, y)


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    """View one value per channel so that it fits ``(N, C, ...)``."""
    return values.view([1, -1] + [1] * (like.ndim - 2))
