"""AffineConvergenceMonitor: do γ and β converge to the σ and μ of the pre-activations (section 2.2, Fig 2)?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from lightning_normgeo.callbacks.base import GeometryMonitor
from lightning_normgeo.callbacks.readings import Reading
from lightning_normgeo.callbacks.session import Measured
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
        layers: globs for the normalization layers that get keys of their own; those of the first residual block
            if left out.
        channel_seed: chooses the one channel per layer that is logged by itself.

    A model without such layers is trained as it is, with a warning, so that one list of callbacks serves all models
    of a comparison.
    """

    groups = ("affine",)
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
        values = {
            "abs_gamma2_minus_sigma2": {n: scale_gap(s.scale, s.variance) for n, s in layers.items()},
            "abs_beta_minus_mu": {n: shift_gap(s.shift, s.mean) for n, s in layers.items()},
            "gamma2_over_sigma2": {n: squared_gain(s.scale, s.variance, s.eps) for n, s in layers.items()},
        }
        watch = measured.single_device
        for name, by_layer in values.items():
            yield from self._summaries(f"affine/{name}", by_layer, watch)

    def channel(self, site: str, channels: int) -> int:
        """Return the channel of a layer that is logged by itself: the same for the same seed, name and width."""
        digest = hashlib.sha256(f"{self.channel_seed}:{site}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % channels

    def _summaries(self, key: str, by_layer: dict[str, Tensor], watch: bool) -> Iterator[Reading]:
        everything = torch.cat(list(by_layer.values()))
        names = list(by_layer)
        means = torch.stack([values.mean() for values in by_layer.values()])
        picked = torch.stack([values[self.channel(name, values.numel())] for name, values in by_layer.items()])
        yield Reading(f"{key}_mean", everything.mean(), means, names, watch)
        yield Reading(f"{key}_median", everything.quantile(0.5))
        yield Reading(f"{key}_q90", everything.quantile(0.9))
        yield Reading(f"{key}_channel", None, picked, names)
