"""Readings of batch geometry: Σ_X in front of layers, and the outputs of batch normalizations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.callbacks._readings.reductions.layer_segments import LayerSegments
from lightning_normgeo.callbacks._readings.reductions.quantiles import quantiles
from lightning_normgeo.geometry.batches.batch_outputs import COLLAPSED_ABOVE, epsilon_over_variance, radius_reached
from lightning_normgeo.probes.batch_norm.forward_pass import BatchStatistics, epsilons
from lightning_normgeo.probes.layer_inputs.probe import LayerGeometry

GROUP = "batch_geometry"
LEADING = 4
"""Number of leading eigenvalues that have keys."""


def input_readings(inputs: Mapping[str, LayerGeometry]) -> Iterator[Reading]:
    """Yield the readings of Σ_X and of the orthogonality gap.

    A layer with groups has the mean over its groups, which have a Σ_X each. Values that are not known are NaN, and so
    are their aggregates over layers; NaN is not logged.
    """
    names = list(inputs)
    found = [one.inputs for one in inputs.values()]
    spectra = [one.spectrum for one in found]

    def reading(key: str, values: Sequence[Tensor], total: Callable[[Tensor], Tensor] = torch.mean) -> Reading:
        column = torch.stack([value.to(spectra[0].trace) for value in values])
        return Reading(f"{GROUP}/{key}", total(column), column, names, partial=True)

    ranks = [one.rank.mean() for one in found]
    yield reading("rank", ranks)
    yield reading("rank_at_least", [one.rank_at_least.mean() for one in found])
    yield reading("rank_over_bound", [r / one.bound for r, one in zip(ranks, found, strict=True)], torch.amin)
    yield reading("rank_over_inputs", [r / one.width for r, one in zip(ranks, found, strict=True)], torch.amin)
    yield reading("samples_over_inputs", [_scalar(one.samples / one.width) for one in found], torch.amin)
    yield reading("effective_rank", [one.effective_rank.mean() for one in spectra])
    errors = [one.effective_rank_error.square().sum().sqrt() / len(one.trace) for one in spectra]
    yield reading("effective_rank_error", errors, lambda column: column.square().sum().sqrt() / len(column))
    for k in range(LEADING):
        shares = [_share(one.eigenvalues, one.trace, k) for one in spectra]
        yield reading(f"eigenvalue_share_{k + 1}", shares)
    worst = [_residual(one.residuals, one.trace) for one in spectra]
    yield reading("eigenvalue_residual", worst, torch.amax)
    yield reading("kernel_share_mean", [one.kernel_share.mean() for one in found])
    yield reading("kernel_share_max", [one.kernel_share.max() for one in found], torch.amax)
    yield reading("orthogonality_gap", [one.gap for one in inputs.values()])


def output_readings(statistics: Mapping[str, Sequence[BatchStatistics]]) -> Iterator[Reading]:
    """Yield the readings of collapsed channels, ε/s² and radii; a layer that runs several times has several values."""
    passes = [one for found in statistics.values() for one in found]
    widths = [sum(one.scale.numel() for one in found) for found in statistics.values()]
    layers = LayerSegments(list(statistics), widths, passes[0].variance.device)
    variance, eps = torch.cat([one.variance for one in passes]), epsilons(passes)
    ratios, radii = epsilon_over_variance(variance, eps), radius_reached(variance, eps)
    collapsed = (ratios > COLLAPSED_ABOVE).to(ratios)
    yield layers.reading(f"{GROUP}/collapsed_channels", collapsed, layers.sum)
    yield layers.reading(f"{GROUP}/collapsed_share", collapsed, layers.mean)
    median_ratio, median_radius = quantiles(torch.stack([ratios, radii]), 0.5)[0]
    yield Reading(f"{GROUP}/epsilon_over_variance_median", median_ratio)
    yield layers.reading(f"{GROUP}/epsilon_over_variance_max", ratios, layers.maximum)
    yield Reading(f"{GROUP}/radius_reached_median", median_radius)
    smallest = layers.maximum(-radii)
    yield Reading(f"{GROUP}/radius_reached_min", radii.amin(), -smallest, layers.names)


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _share(eigenvalues: Tensor, trace: Tensor, k: int) -> Tensor:
    """Return the k-th eigenvalue over the trace, mean over groups; 0 beyond the last eigenvalue and where Σ = 0."""
    if k >= eigenvalues.shape[1]:
        return torch.zeros_like(trace[0])
    return torch.where(trace > 0, eigenvalues[:, k] / trace, 0.0).mean()


def _residual(residuals: Tensor, trace: Tensor) -> Tensor:
    """Return the largest residual of the leading eigenvalues over the trace."""
    largest = residuals[:, :LEADING].amax(1)
    return torch.where(trace > 0, largest / trace, 0.0).max()
