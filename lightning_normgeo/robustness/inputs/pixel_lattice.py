r"""Eight-bit images betray their normalization: undone, it leaves values on the lattice k/255.

An image that was stored with eight bits has the values :math:`k/255`, :math:`k = 0 \ldots 255`. A data pipeline makes
:math:`(k/255 - m)/s` of them. The right m and s bring every value back to the lattice; wrong ones leave fractions that
are spread evenly, so n different values fall within δ of it with probability :math:`(2\delta)^n`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_normgeo.robustness.inputs.input_space import channel_dim

LEVELS = 255
_NEAR = 0.1
"""How far from k a value may be, in units of 1/255: what four digits of a standard deviation cost."""
_FEW = 16
"""Different values that a channel must have to say anything: chance is 0.2^16."""
_SHARE = 0.95
"""Of a channel's different values that must fit: padding that was added afterwards is one that does not."""
_SAMPLED = 2**14
_MOST_CHANNELS = 16
"""A dimension with more is none of channels that have constants of their own."""


def confirms(images: Tensor, mean: Sequence[float], std: Sequence[float], every_level: bool = True) -> bool | None:
    """Whether the values of images are k/255 once a normalization is undone.

    Also refuted are levels outside 0 … 255.

    Args:
        images: ``(batch, channels, …)``, as a loader yields them.
        mean: of the normalization, one value or one per channel.
        std: likewise.
        every_level: whether lattices are refuted of which only every second, third, … level occurs: the deviation is
            too large by that factor then.

    Returns:
        None where no channel has enough different values to tell.

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
    """Mean and standard deviation of the normalization that images have been through, as far as they tell.

    The distance of neighbouring values is 1/(255 s). The mean can be told only where black and white both occur.

    Returns:
        One value per channel each; None where some channel has no such lattice, or not both of its ends.
    """
    means, stds = [], []
    dim = 1 if images.shape[1] <= _MOST_CHANNELS or images.shape[-1] > _MOST_CHANNELS else images.ndim - 1
    for values in _channels(images, dim):
        if len(values) < _FEW:
            return None
        low, span = float(values[0]), float(values[-1] - values[0])
        if span <= 0:
            return None
        mean, std = -low * 1 / span, 1 / span  # as if the ends were black and white
        levels = LEVELS * (values * std + mean)
        steps = levels.round().diff()
        if float((levels - levels.round()).abs().max()) > _NEAR or math.gcd(*steps.long().tolist()) != 1:
            return None
        means.append(_rounded(mean))
        stds.append(_rounded(std))
    return (tuple(means), tuple(stds)) if means else None


def on_lattice(pixels: Tensor) -> Tensor:
    """Which images have no value farther than rounding from k/255, shape ``(batch,)``."""
    levels = pixels.flatten(1) * LEVELS
    within = (levels >= -0.5) & (levels <= LEVELS + 0.5)
    return (within & ((levels - levels.round()).abs() <= 2e-3)).all(1)


def _channels(images: Tensor, dim: int | None) -> Iterator[Tensor]:
    """The different values of each channel, in order, as float64 on the host; of all at once if channels are many."""
    dim = 1 if dim is None else dim
    count = images.shape[dim] if images.ndim > 2 and images.shape[dim] <= _MOST_CHANNELS else 1
    flat = images.detach().movedim(dim, 0).reshape(count, -1)
    stride = max(1, flat.shape[1] // _SAMPLED)
    for row in flat:
        # an odd stride meets every column of an image; both ends of the range are kept
        sample = torch.cat([row[:: stride | 1], row.amin()[None], row.amax()[None]])
        values = torch.unique(sample[sample.isfinite()].cpu().double())
        if not len(values):
            continue
        apart = values.diff() > 1e-6 * (values[-1] - values[0]).clamp_min(1e-12)
        yield values[torch.cat([torch.ones(1, dtype=torch.bool), apart])]


def _rounded(value: float) -> float:
    """To five digits, which processes with other images agree on."""
    return float(f"{value:.5g}")
