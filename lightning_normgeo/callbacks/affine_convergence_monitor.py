"""AffineConvergenceMonitor: do γ and β converge to the σ and μ of the pre-activations (section 2.2, Fig 2)?"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.callbacks._monitors.geometry_monitor import GeometryMonitor
from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep
from lightning_normgeo.callbacks._readings.layer_segments import LayerSegments
from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.callbacks._readings.wandb_keys import WandbKeys
from lightning_normgeo.errors import warn_once
from lightning_normgeo.geometry.batch_statistics import scale_gap, shift_gap, squared_gain
from lightning_normgeo.probes.batch_norm.forward_pass import BatchStatistics, epsilons
from lightning_normgeo.probes.batch_norm.probe import affine_batch_norms
from lightning_normgeo.utilities.checked_values import whole

_VIEWS = 8
"""How many runs of one layer get keys of their own: multi-crop training has ten."""


class AffineConvergenceMonitor(GeometryMonitor):
    r"""Logs how far the γ, β of every batch normalization are from the σ, μ of the batch it normalizes.

    σ² is the biased variance and μ the mean of this device's batch in the forward pass of the measured step, γ and β
    are those of the same forward pass. Read off the autograd node: nothing is computed twice.

    Metric keys, units and meanings: the README's key table, made from
    :data:`lightning_normgeo.runs.quantities.QUANTITIES`.

    A layer that runs several times in a step (two views, micro-batches) is compared with the σ, μ of each pass, and the
    mean goes over passes too; only then there are the keys for passes pooled and for views apart (up to 8).

    For one layer: ``affine/…_mean/{module path}``, and ``affine/…_channel/{module path}`` for one channel as in the
    paper's Fig 2. \|γ² - σ²\| changes with the scale of a weight that has no effect on the function; read it beside
    the scale-free ratio.

    Cost: no pass over data; a few operations on one value per channel.

    Args:
        every_n_steps: measure each n-th optimizer step; the Trainer's ``log_every_n_steps`` if left out.
        layers: globs for the normalization layers that get keys of their own, up to 16; those of the first residual
            block if left out.
        channel_seed: chooses the one channel per layer that is logged by itself.
        wandb_keys: whether W&B gets two dozen ``aggregates`` or ``all`` keys (see :class:`GeometryMonitor`).

    A model without such layers is trained as it is, with a warning, so that one list of callbacks serves all models
    of a comparison.
    """

    groups = ("affine",)
    needs_weights = False
    needs_statistics = True

    def __init__(
        self,
        every_n_steps: int | None = None,
        layers: str | list[str] | None = None,
        channel_seed: int = 0,
        wandb_keys: WandbKeys = "aggregates",
    ) -> None:
        super().__init__(every_n_steps, layers, wandb_keys)
        self.channel_seed = whole("channel_seed", channel_seed, 0)
        self._places: tuple[Any, Tensor] | None = None

    def observable_layers(self, module: nn.Module) -> list[str]:
        """Return the batch normalizations with γ and β."""
        found = list(affine_batch_norms(module))
        if not found:
            warn_once(
                f"AffineConvergenceMonitor observes nothing: {type(module).__name__} has no batch normalization with γ "
                "and β (BatchNorm with affine=True) to compare σ and μ with."
            )
        return found

    def measure(self, measured: MeasuredStep) -> Iterable[Reading]:
        """Return the readings of one step."""
        if not measured.statistics:
            return
        passes = [(name, one) for name, found in measured.statistics.items() for one in found]
        names = list(measured.statistics)
        gaps = _gaps([one for _, one in passes])
        channels = [one.scale.numel() for _, one in passes]
        runs = [len(found) for found in measured.statistics.values()]
        widths = [sum(one.scale.numel() for one in found) for found in measured.statistics.values()]
        device = passes[0][1].scale.device
        first = itertools.accumulate(channels, initial=0)
        index = self._index(
            tuple(start + self.channel(name, n) for start, (name, _), n in zip(first, passes, channels, strict=False)),
            device,
        )
        layers, picked, watch = (
            LayerSegments(names, widths, device),
            LayerSegments(names, runs, device),
            measured.single_device,
        )
        for name, values in gaps.items():
            key = f"affine/{name}"
            yield layers.reading(f"{key}_mean", values, layers.mean, watch=watch)
            yield Reading(f"{key}_median", values.quantile(0.5))
            yield Reading(f"{key}_q90", values.quantile(0.9))
            yield Reading(f"{key}_channel", None, picked.mean(values[index]), names)
        yield from _several_passes(measured.statistics)

    def _index(self, places: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the places of the channels that are logged by themselves; built once for the same layers."""
        if self._places is None or self._places[0] != (places, device):
            self._places = (places, device), torch.tensor(places, device=device)
        return self._places[1]

    def channel(self, layer: str, channels: int) -> int:
        """Return the channel of a layer that is logged by itself: the same for the same seed, name and width."""
        digest = hashlib.sha256(f"{self.channel_seed}:{layer}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % channels


def _gaps(passes: Sequence[BatchStatistics]) -> dict[str, Tensor]:
    """Return how far γ, β are from σ, μ: one value for each pass and channel."""
    columns = ([getattr(one, field) for one in passes] for field in ("scale", "shift", "variance", "mean"))
    scale, shift, variance, mean = map(torch.cat, columns)
    return {
        "abs_gamma2_minus_sigma2": scale_gap(scale, variance),
        "abs_beta_minus_mu": shift_gap(shift, mean),
        "gamma2_over_sigma2": squared_gain(scale, variance, epsilons(passes)),
    }


def _several_passes(statistics: Mapping[str, Sequence[BatchStatistics]]) -> Iterator[Reading]:
    """Return the same from pooled statistics, and for each view apart, where a layer ran more than once."""
    several = {name: found for name, found in statistics.items() if len(found) > 1}
    if not several:
        return
    pooled = [_pooled(found) for found in several.values()]
    layers = LayerSegments(list(several), [one.scale.numel() for one in pooled], pooled[0].scale.device)
    for name, values in _gaps(pooled).items():
        yield layers.reading(f"affine/{name}_pooled_mean", values, layers.mean)
    views = max(one.place for found in several.values() for one in found) + 1
    for place in range(min(views, _VIEWS) if views > 1 else 0):
        those = [one for found in several.values() for one in found if one.place == place]
        for name, values in _gaps(those).items():
            yield Reading(f"affine/{name}_mean_view{place + 1}", values.mean())


def _pooled(passes: Sequence[BatchStatistics]) -> BatchStatistics:
    """Return the statistics of all passes of a layer as of one batch: σ² within them and between their means."""
    samples = sum(one.samples for one in passes)
    mean = sum(
        (one.mean * (one.samples / samples) for one in passes[1:]), passes[0].mean * (passes[0].samples / samples)
    )
    within = [(one.variance + (one.mean - mean).square()) * (one.samples / samples) for one in passes]
    return replace(passes[-1], mean=mean, variance=sum(within[1:], within[0]))
