"""AffineConvergenceMonitor, which compares γ and β with σ and μ of the pre-activations (section 2.2, Fig 2)."""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_normgeo.callbacks._monitors.geometry_monitor import EveryNSteps, GeometryMonitor
from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep, WandbKeys
from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.callbacks._readings.reductions.layer_segments import LayerSegments
from lightning_normgeo.callbacks._readings.reductions.quantiles import quantiles
from lightning_normgeo.errors import warn_once
from lightning_normgeo.geometry.batches.batch_statistics import scale_gap, shift_gap, squared_gain
from lightning_normgeo.probes.batch_norm.forward_pass import BatchStatistics, epsilons
from lightning_normgeo.probes.batch_norm.layers import affine_batch_norms
from lightning_normgeo.utilities.checked_values import whole

_VIEWS = 8
"""Largest number of passes of one layer that get keys of their own: multi-crop training has ten."""


class AffineConvergenceMonitor(GeometryMonitor):
    r"""Logs the distances of γ, β from σ, μ for every batch normalization (section 2.2 and Fig 2 of Sun et al. 2020).

    σ² is the biased variance and μ the mean of the pre-activations, over this device's batch in the forward pass of
    the measured step; γ and β are those of the same forward pass. All are read from the autograd node, so that nothing
    is computed twice.

    Metric keys, units and meanings: the documentation's key table, made from
    :data:`lightning_normgeo.runs.quantities.table.QUANTITIES`.

    A layer that runs several times in a step (two views, micro-batches) is compared with the σ, μ of each pass, and the
    mean is over passes too; so are those of a batch in which several optimizers take steps. Such layers also have keys
    for the pooled statistics of all passes. Passes before the same backward pass, such as two views, also have keys of
    their own (at most 8); micro-batches do not, as each of them has its backward pass.

    For one layer: ``affine/…_mean/{module path}``, and ``affine/…_channel/{module path}`` for one channel as in the
    paper's Fig 2. σ and μ, and so all of these quantities, change with the scale of the preceding weight, which does
    not affect the function.

    Cost: no pass over data; a few operations on one value per channel.

    Args:
        every_n_steps: measure every n-th optimizer step; ``auto`` for less and less often in long trainings (see
            :class:`GeometryMonitor`). Default: the Trainer's ``log_every_n_steps``.
        layers: globs for the normalization layers with metric keys of their own, at most 16; more layers go into one
            table (see :class:`GeometryMonitor`). Default: those of the first residual block.
        channel_seed: seed that selects the one channel per layer with a key of its own, at least 0. Default: 0.
        wandb_keys: metric keys sent to W&B: two dozen ``aggregates`` or ``all`` (see :class:`GeometryMonitor`).
            Default: ``aggregates``.

    A model without batch normalization is trained unchanged, with a warning, so that one list of callbacks can be used
    for all models of a comparison.
    """

    groups = ("affine",)
    needs_weights = False
    needs_statistics = True

    def __init__(
        self,
        every_n_steps: EveryNSteps = None,
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
        """Return the readings of one step, which are those of this process alone: each has a batch of its own."""
        if not measured.statistics:
            return
        for reading in self._readings(measured):
            yield replace(reading, of_this_process=not measured.single_device)

    def _readings(self, measured: MeasuredStep) -> Iterator[Reading]:
        """Yield the readings of a step that has statistics."""
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
        layers, picked = LayerSegments(names, widths, device), LayerSegments(names, runs, device)
        found = quantiles(torch.stack(list(gaps.values())), 0.5, 0.9).unbind(1)
        for (name, values), (median, q90) in zip(gaps.items(), found, strict=True):
            key = f"affine/{name}"
            yield layers.reading(f"{key}_mean", values, layers.mean)
            yield Reading(f"{key}_median", median)
            yield Reading(f"{key}_q90", q90)
            yield Reading(f"{key}_channel", None, picked.mean(values[index]), names)
        yield from _several_passes(measured.statistics)

    def _index(self, places: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the indices of the channels that are logged separately, as a tensor; cached for the same layers."""
        if self._places is None or self._places[0] != (places, device):
            self._places = (places, device), torch.tensor(places, device=device)
        return self._places[1]

    def channel(self, layer: str, channels: int) -> int:
        """Return the channel of a layer that is logged separately: the same for the same seed, name and width."""
        return _drawn(self.channel_seed, layer) % channels


@functools.lru_cache(maxsize=2**12)
def _drawn(seed: int, layer: str) -> int:
    """Return a number drawn for a layer; cached, since it is asked for in each measured step."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{layer}".encode()).digest()[:8], "big")


def _gaps(passes: Sequence[BatchStatistics]) -> dict[str, Tensor]:
    """Return the distances of γ, β from σ, μ by quantity, with one value for each pass and channel."""
    columns = ([getattr(one, field) for one in passes] for field in ("scale", "shift", "variance", "mean"))
    scale, shift, variance, mean = map(torch.cat, columns)
    return {
        "abs_gamma2_minus_sigma2": scale_gap(scale, variance),
        "abs_beta_minus_mu": shift_gap(shift, mean),
        "gamma2_over_sigma2": squared_gain(scale, variance, epsilons(passes)),
    }


def _several_passes(statistics: Mapping[str, Sequence[BatchStatistics]]) -> Iterator[Reading]:
    """Yield the distances for pooled statistics and for each view, over the layers that ran more than once."""
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
    """Return the statistics of all passes of a layer as of one batch: σ² within passes plus that of their means."""
    samples = sum(one.samples for one in passes)
    mean = sum(
        (one.mean * (one.samples / samples) for one in passes[1:]), passes[0].mean * (passes[0].samples / samples)
    )
    within = [(one.variance + (one.mean - mean).square()) * (one.samples / samples) for one in passes]
    return passes[-1]._replace(mean=mean, variance=sum(within[1:], within[0]))
