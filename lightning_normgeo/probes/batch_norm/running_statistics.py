"""Statistics of one forward pass of a batch normalization, derived from the change of its running statistics."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lightning_normgeo.probes.batch_norm.forward_pass import widened

_PRECISION = 1e-3
"""Largest error of statistics that are derived from running ones: of σ² + ε relative to itself, of μ relative to its
square root."""


class Running(NamedTuple):
    """Copies of running statistics in float64: mean, unbiased variance and number of batches."""

    mean: Tensor
    variance: Tensor
    batches: Tensor


def keeps_running(layer: _BatchNorm) -> bool:
    """Whether a layer has running statistics to read; those of a lazy layer have no values before its first batch."""
    return layer.track_running_stats and layer.running_mean is not None and not is_lazy(layer.running_mean)


def copied_running(layer: _BatchNorm) -> Running:
    """Return copies of the running statistics of a layer that :func:`keeps_running`."""
    assert layer.running_mean is not None  # noqa: S101
    assert layer.running_var is not None  # noqa: S101
    assert layer.num_batches_tracked is not None  # noqa: S101
    return Running(*map(widened, (layer.running_mean, layer.running_var, layer.num_batches_tracked)))


def statistics_of_change(layer: _BatchNorm, before: Running, samples: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of a layer's batch from the change of its running statistics.

    The running mean moves as r⁺ = (1 - m) r + m μ, with momentum m; the running variance likewise, unbiased.

    Args:
        layer: after one forward pass.
        before: its running statistics before the pass.
        samples: number of values per channel.

    Returns:
        μ and σ², each ``(channels,)``: NaN where rounding allows an error of more than 1e-3, and everywhere if there
        was not exactly one update.
    """
    assert layer.running_mean is not None  # noqa: S101
    after = copied_running(layer)
    momentum = layer.momentum if layer.momentum is not None else 1 / after.batches
    unbiased = (after.variance - (1 - momentum) * before.variance) / momentum
    biased = (unbiased * (samples - 1) / samples).clamp_min(0)
    # Running statistics are rounded: an error of one unit in the last place is divided by m. NaN is left out by the
    # loggers; a branch would have to wait for the device.
    unit = torch.finfo(layer.running_mean.dtype).eps / momentum
    scale = biased + layer.eps
    exact = (unit * torch.maximum(before.variance, after.variance) <= _PRECISION * scale) & (
        unit * torch.maximum(before.mean.abs(), after.mean.abs()) <= _PRECISION * scale.sqrt()
    )
    known = torch.where((after.batches - before.batches == 1) & exact, 1.0, torch.nan)
    return known * (after.mean - (1 - momentum) * before.mean) / momentum, known * biased
