r"""Normalizations recognized from 8-bit images: undoing the right one gives values on the lattice k/255.

An image that was stored with eight bits has the values :math:`k/255`, :math:`k = 0 \ldots 255`. A data pipeline turns
them into :math:`(k/255 - m)/s`. The right m and s bring every value back to the lattice. With wrong ones the distances
to the lattice are spread evenly, so that n different values are all within :math:`\delta/255` of it with probability
:math:`(2\delta)^n`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_normgeo.robustness.inputs.input_space import channel_dim

LEVELS = 255
_NEAR = 0.1
"""Largest distance of a value from k, in units of 1/255, as caused by a standard deviation with only four digits."""
_FEW = 16
"""Number of different values that a channel needs to decide: by chance that many fit with probability 0.2^16."""
_SHARE = 0.95
"""Fraction of a channel's different values that must fit: a value padded after the normalization does not."""
_SAMPLED = 2**14
"""Number of values of a channel that are looked at."""
_MOST_CHANNELS = 16
"""Largest number of channels with constants of their own; a longer dimension is not one of channels."""


def confirms(images: Tensor, mean: Sequence[float], std: Sequence[float], every_level: bool = True) -> bool | None:
    """Whether images have the values k/255, k = 0 … 255, once a normalization is undone.

    Args:
        images: ``(batch, channels, …)``, as a loader yields them.
        mean: mean of the normalization, one value or one per channel.
        std: standard deviation of the normalization, one value or one per channel.
        every_level: whether to refute the normalization too if only every second, third, … level occurs, as ``std`` is
            then too large by that factor.

    Returns:
        True or False, or None if no channel has enough different values to decide.

    Cost: up to 16,384 values of each channel, on the host.
    """
    found = []
    dim = channel_dim(len(std), images.shape)
    for channel, values in enumerate(_channels(images, dim)):
        levels = LEVELS * (values * std[channel % len(std)] + mean[channel % len(mean)])
        whole = levels.round()
        fit = ((levels - whole).abs() <= _NEAR) & (whole >= 0) & (whole <= LEVELS)
        different = torch.unique(whole[fit])
        if len(different) >= _FEW and int(fit.sum()) >= _SHARE * len(values):
            found.append(not every_level or math.gcd(*(different - different[0]).long().tolist()) == 1)
        elif len(values) >= _FEW:
            found.append(False)
    return all(found) if found else None


def fitted(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Return the mean and standard deviation of a normalization, fitted to the images that went through it.

    Neighboring values are 1/(255 s) apart, which gives s. The mean is known only if black and white both occur, so that
    the smallest and the largest value are 0 and 255.

    Args:
        images: ``(batch, channels, …)``, as a loader yields them.

    Returns:
        Means and standard deviations, one per channel; None if the values of some channel are on no such lattice.
    """
    means, stds = [], []
    dim = 1 if images.shape[1] <= _MOST_CHANNELS or images.shape[-1] > _MOST_CHANNELS else images.ndim - 1
    for values in _channels(images, dim):
        if len(values) < _FEW:
            return None
        low, span = float(values[0]), float(values[-1] - values[0])
        if span <= 0:
            return None
        mean, std = -low * 1 / span, 1 / span  # assuming that the smallest value is black and the largest is white
        levels = LEVELS * (values * std + mean)
        steps = levels.round().diff()
        if float((levels - levels.round()).abs().max()) > _NEAR or math.gcd(*steps.long().tolist()) != 1:
            return None
        means.append(_rounded(mean))
        stds.append(_rounded(std))
    return (tuple(means), tuple(stds)) if means else None


def on_lattice(pixels: Tensor) -> Tensor:
    """Return for each image whether its values are k/255 up to rounding, shape ``(batch,)``."""
    levels = pixels.flatten(1) * LEVELS
    within = (levels >= -0.5) & (levels <= LEVELS + 0.5)
    return (within & ((levels - levels.round()).abs() <= 2e-3)).all(1)


def _channels(images: Tensor, dim: int | None) -> Iterator[Tensor]:
    """Yield the different values of each channel, sorted, as float64 on the host; too many channels count as one."""
    dim = 1 if dim is None else dim
    count = images.shape[dim] if images.ndim > 2 and images.shape[dim] <= _MOST_CHANNELS else 1
    flat = images.detach().movedim(dim, 0).reshape(count, -1)
    stride = max(1, flat.shape[1] // _SAMPLED)
    for row in flat:
        # an even stride could divide the width and sample only some columns; both ends of the range are kept
        sample = torch.cat([row[:: stride | 1], row.amin()[None], row.amax()[None]])
        values = torch.unique(sample[sample.isfinite()].cpu().double())
        if not len(values):
            continue
        apart = values.diff() > 1e-6 * (values[-1] - values[0]).clamp_min(1e-12)
        yield values[torch.cat([torch.ones(1, dtype=torch.bool), apart])]


def _rounded(value: float) -> float:
    """Return a value with five digits, to which fits to different images on different processes agree."""
    return float(f"{value:.5g}")
