r"""The part of ⟨W, g⟩ caused by the ε of batch normalizations, summed over all passes that contribute to a gradient.

For one pass :math:`\langle W, g\rangle = \varepsilon/(\sigma^2 + \varepsilon)\,\gamma\,\partial L/\partial\gamma`. Over
several passes, micro-batches or processes both sides add up, provided that ∂L/∂γ is known for each pass separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.callbacks._readings.layer_segments import LayerSegments
from lightning_normgeo.geometry.columns import repeated
from lightning_normgeo.geometry.orthogonality import batch_norm_epsilon_inner
from lightning_normgeo.probes.batch_norm.forward_pass import BatchStatistics, epsilons
from lightning_normgeo.probes.weight_step import WeightStep

_PROPORTIONAL = 1e-4
"""Relative distance up to which two gradients of γ count as proportional: float32 sums differ by 1e-6."""


class GammaSums(NamedTuple):
    """Sums over the passes of one batch normalization, each ``(channels,)``."""

    gradient: Tensor
    """Σ ∂L/∂γ."""
    inner: Tensor
    """Σ ε/(σ² + ε) γ ∂L/∂γ."""


def gamma_sums(
    statistics: Mapping[str, Sequence[BatchStatistics]], channels: Mapping[str, int], device: torch.device
) -> dict[str, GammaSums]:
    """Return the sums over passes, by layer; zeros for a layer that no backward pass went through.

    Args:
        statistics: batch statistics of each pass, by module path.
        channels: the number of channels of every layer to sum over.
        device: the device for the zeros.
    """
    read = [(name, one) for name in channels for one in statistics.get(name, ()) if one.gradient is not None]
    sums: dict[str, GammaSums] = {}
    if read:
        columns = ("scale", "gradient", "variance")
        scale, gradient, variance = (torch.cat([getattr(one, column) for _, one in read]) for column in columns)
        widths = [one.scale.numel() for _, one in read]
        inner = batch_norm_epsilon_inner(scale, gradient, variance, epsilons([one for _, one in read]))
        parts = zip(torch.split(gradient, widths), torch.split(inner, widths), strict=True)
        for (name, _), (by_gamma, part) in zip(read, parts, strict=True):
            before = sums.get(name)
            found = GammaSums(by_gamma, part)
            sums[name] = found if before is None else GammaSums(*map(torch.add, before, found))
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return {name: sums.get(name) or GammaSums(zero.expand(n), zero.expand(n)) for name, n in channels.items()}


def epsilon_inner_by_weight(steps: Sequence[WeightStep], sums: Mapping[str, GammaSums]) -> dict[str, Tensor]:
    """Return the part of ⟨W, g⟩ that ε causes, ``(units,)`` for each weight where it is known.

    The optimizer's gradients are those of the passes times a factor (clipping, unscaling, averaging). The factor is
    found by comparing ∂L/∂γ of the optimizer with that of the passes. If it differs between channels, another gradient
    was added, and the part is NaN.

    Args:
        steps: weights with ∂L/∂γ as the optimizer got it.
        sums: sums over the passes, by module path.
    """
    known: list[tuple[WeightStep, GammaSums]] = []
    for step in steps:
        found = sums.get("" if step.units.scale is None else step.units.scale.removesuffix(".weight"))
        if found is not None and step.scale_gradient is not None and found.inner.shape == step.inner.shape:
            known.append((step, found))
    if not known:
        return {}
    applied = torch.cat([step.scale_gradient for step, _ in known if step.scale_gradient is not None])
    gradient, inner = (torch.cat(column) for column in zip(*(found for _, found in known), strict=True))
    widths = [step.units.count for step, _ in known]
    layers = LayerSegments([step.units.name for step, _ in known], widths, applied.device)
    square, product, size = layers.sum(torch.stack([gradient * gradient, gradient * applied, applied * applied]))
    factor = torch.where(square > 0, product / torch.where(square > 0, square, 1.0), 0.0)
    spread = layers.spread_each(factor)
    same = layers.sum((applied - spread * gradient).square()) <= _PROPORTIONAL**2 * size
    if not all(step.scale_shared for step, _ in known):  # if W and γ are clipped separately, their factors differ
        same &= repeated([float(step.scale_shared) for step, _ in known], [1] * len(known), applied.device) > 0
    parts = torch.where(layers.spread_each(same), spread * inner, torch.nan)
    return {step.units.name: part for (step, _), part in zip(known, torch.split(parts, widths), strict=True)}


def with_whole_gradients(
    statistics: Mapping[str, Sequence[BatchStatistics]], steps: Sequence[WeightStep]
) -> dict[str, list[BatchStatistics]]:
    """Return statistics in which layers with a single pass have the parameter's gradient of γ, where none was recorded.

    Under ``torch.compile`` the gradient of a single pass cannot be recorded. With one pass, one backward pass and one
    device it equals the gradient of the parameter γ; call this only then.
    """
    whole = {
        step.units.scale.removesuffix(".weight"): step.scale_gradient
        for step in steps
        if step.units.scale is not None and step.scale_gradient is not None
    }
    return {
        name: [passes[0]._replace(gradient=whole[name])]
        if len(passes) == 1 and passes[0].gradient is None and name in whole
        else list(passes)
        for name, passes in statistics.items()
    }
