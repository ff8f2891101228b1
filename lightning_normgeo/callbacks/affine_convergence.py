"""AffineConvergenceMonitor: do γ and β converge to the σ and μ of the pre-activations (section 2.2, Fig 2)?"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable

import torch
from torch import nn

from lightning_normgeo.callbacks.base import GeometryMonitor
from lightning_normgeo.callbacks.measured import Measured
from lightning_normgeo.callbacks.readings import Reading
from lightning_normgeo.callbacks.sites import Sites
from lightning_normgeo.errors import warn_once
from lightning_normgeo.geometry.batch import scale_gap, shift_gap, squared_gain
from lightning_normgeo.probes.batchnorm import affine_batch_norms


class AffineConvergenceMonitor(GeometryMonitor):
    r"""Logs how far the γ, β of every batch normalization are from the σ, μ of the batch it normalizes.

    σ² is the biased variance and μ the mean of this device's batch in the forward pass of the measured step, γ and β
    are those of the same forward pass. Read off the autograd node: nothing is computed twice.

    ==========================================  =============  ====================================================
    key                                         unit           meaning
    ==========================================  =============  ====================================================
    ``affine/abs_gamma2_minus_sigma2_mean``     activation²    \|γ² - σ²\|, mean over all channels (Fig 2)
    ``affine/abs_beta_minus_mu_mean``           activation     \|β - μ\|, mean over all channels (Fig 2)
    ``affine/gamma2_over_sigma2_mean``          1              γ²/(σ² + ε), the scale-free form of the first
    ``affine/…_median``, ``affine/…_q90``       as above       median and 90 % quantile over all channels
    ==========================================  =============  ====================================================

    For one layer: ``affine/…_mean/{module path}``, and ``affine/…_channel/{module path}`` for one channel as in the
    paper's Fig 2. \|γ² - σ²\| changes with the scale of a weight that has no effect on the function; read it beside
    the scale-free ratio.

    Cost: no pass over data; a few operations on one value per channel.

    Args:
        every_n_steps: measure each n-th optimizer step; the Trainer's ``log_every_n_steps`` if left out.
        layers: globs for the normalization layers that get keys of their own, up to 16; those of the first residual
            block if left out.
        channel_seed: chooses the one channel per layer that is logged by itself.

    A model without such layers is trained as it is, with a warning, so that one list of callbacks serves all models
    of a comparison.
    """

    groups = ("affine",)
    needs_weights = False
    needs_statistics = True

    def __init__(
        self, every_n_steps: int | None = None, layers: str | list[str] | None = None, channel_seed: int = 0
    ) -> None:
        super().__init__(every_n_steps, layers)
        self.channel_seed = channel_seed

    def sites(self, module: nn.Module) -> list[str]:
        """Return the batch normalizations with γ and β."""
        found = list(affine_batch_norms(module))
        if not found:
            warn_once(
                f"AffineConvergenceMonitor observes nothing: {type(module).__name__} has no batch normalization with γ "
                "and β (BatchNorm with affine=True) to compare σ and μ with."
            )
        return found

    def measure(self, measured: Measured) -> Iterable[Reading]:
        """Return the readings of one step."""
        layers = measured.statistics
        if not layers:
            return
        names, found = list(layers), list(layers.values())
        channels = [statistics.scale.numel() for statistics in found]
        columns = ([getattr(s, field) for s in found] for field in ("scale", "shift", "variance", "mean"))
        scale, shift, variance, mean = map(torch.cat, columns)
        eps = torch.cat([scale.new_full((n,), s.eps) for n, s in zip(channels, found, strict=True)])
        values = {
            "abs_gamma2_minus_sigma2": scale_gap(scale, variance),
            "abs_beta_minus_mu": shift_gap(shift, mean),
            "gamma2_over_sigma2": squared_gain(scale, variance, eps),
        }
        first = itertools.accumulate(channels, initial=0)
        picked = [start + self.channel(name, n) for start, name, n in zip(first, names, channels, strict=False)]
        index = torch.tensor(picked).to(scale.device, non_blocking=True)
        sites, watch = Sites(names, channels, scale.device), measured.single_device
        levels = scale.new_tensor([0.5, 0.9])
        for name, by_channel in values.items():
            key = f"affine/{name}"
            yield sites.reading(f"{key}_mean", by_channel, sites.mean, watch=watch)
            median, q90 = by_channel.quantile(levels)
            yield Reading(f"{key}_median", median)
            yield Reading(f"{key}_q90", q90)
            yield Reading(f"{key}_channel", None, by_channel[index], names)

    def channel(self, site: str, channels: int) -> int:
        """Return the channel of a layer that is logged by itself: the same for the same seed, name and width."""
        digest = hashlib.sha256(f"{self.channel_seed}:{site}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % channels
