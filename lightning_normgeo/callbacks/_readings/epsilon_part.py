r"""The part of ⟨W, g⟩ caused by the ε of batch normalizations, summed over all passes that contribute to a gradient.

For one pass :math:`\langle W, g\rangle = \varepsilon/(\sigma^2 + \varepsilon)\,\gamma\,\partial L/\partial\gamma`. Over
several passes, micro-batches or processes both sides add up, provided that ∂L/∂γ is known for each pass separately.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.callbacks._readings.reductions.layer_segments import LayerSegments
from lightning_normgeo.geometry.columns import repeated
from lightning_normgeo.geometry.orthogonality import batch_norm_epsilon_inner, cosine_of_norms
from lightning_normgeo.probes.after_backward import AfterBackward
from lightning_normgeo.probes.batch_norm.forward_pass import BatchStatistics, epsilons
from lightning_normgeo.probes.weight_step import WeightStep

_COMPLETE = 1e-4
"""Relative distance up to which gradients of γ count as equal: float32 sums differ by 1e-6."""
_ROUNDINGS = 4
"""Distance between the cosines of a gradient before and after it was scaled, in units of the dtype's rounding."""


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


def epsilon_inner_by_weight(
    steps: Sequence[WeightStep], sums: Mapping[str, GammaSums], noted: Mapping[str, AfterBackward]
) -> dict[str, Tensor]:
    """Return the part of ⟨W, g⟩ that ε causes, ``(units,)`` for each weight where it is known.

    It is NaN for all units of a weight if ∂L/∂γ of the passes does not add up to ``γ.grad``: another gradient was
    added, or a pass was not seen. Between the backward pass and the step, clipping or other code may scale g; the part
    is then scaled alike, and NaN for units for which the cosine of W and g is not what it was.

    Args:
        steps: weights as the optimizer has moved them.
        sums: sums over the passes, by module path.
        noted: the same weights right after the backward pass, by name.
    """
    known: list[tuple[WeightStep, GammaSums, AfterBackward]] = []
    for step in steps:
        found = sums.get("" if step.units.scale is None else step.units.scale.removesuffix(".weight"))
        before = noted.get(step.units.name)
        if found is not None and before is not None and found.inner.shape == step.inner.shape:
            known.append((step, found, before))
    if not known:
        return {}
    whole = torch.cat([before.scale_gradient for *_, before in known])
    gradient, inner = (torch.cat(column) for column in zip(*(found for _, found, _ in known), strict=True))
    widths = [step.units.count for step, *_ in known]
    layers = LayerSegments([step.units.name for step, *_ in known], widths, whole.device)
    square, missing = layers.sum(torch.stack([whole, whole - gradient]).square())
    parts = torch.where(layers.spread_each(missing <= _COMPLETE**2 * square), inner, torch.nan)
    if any(before.doubt is not None for *_, before in known):
        zero = parts.new_zeros(())
        doubts = [zero.expand(n) if b.doubt is None else b.doubt for n, (*_, b) in zip(widths, known, strict=True)]
        parts = parts + torch.cat(doubts)
    if any(before.sums is not None for *_, before in known):  # elsewhere nothing can have changed it
        left = [(step.sums if before.sums is None else before.sums)[:3] for step, _, before in known]
        applied = torch.cat([step.sums[:3] for step, *_ in known], 1)
        roundings = repeated([_ROUNDINGS * torch.finfo(step.dtype).eps for step, *_ in known], widths, parts.device)
        parts = parts * _scaled(torch.cat(left, 1), applied, roundings)
    return {step.units.name: part for (step, *_), part in zip(known, torch.split(parts, widths), strict=True)}


def _scaled(before: Tensor, after: Tensor, tolerance: Tensor) -> Tensor:
    """Return the factor between two values of ‖W‖‖g‖, negative if g was negated; NaN where its direction was changed.

    Args:
        before: ‖W‖², ⟨W, g⟩ and ‖g‖² of each unit right after the backward pass, ``(3, units)``.
        after: the same as the optimizer applies it.
        tolerance: largest difference of cosines that rounding explains, ``(units,)``.
    """
    norms, new_norms = (sums[0].sqrt() * sums[2].sqrt() for sums in (before, after))
    cosines, new_cosines = cosine_of_norms(before[1], norms), cosine_of_norms(after[1], new_norms)
    ratio = torch.where(norms > 0, new_norms / torch.where(norms > 0, norms, 1.0), 0.0)
    negated = torch.where((new_cosines + cosines).abs() <= tolerance, -ratio, torch.nan)
    return torch.where((new_cosines - cosines).abs() <= tolerance, ratio, negated)


def with_whole_gradients(
    statistics: Mapping[str, Sequence[BatchStatistics]],
    steps: Sequence[WeightStep],
    noted: Mapping[str, AfterBackward],
) -> dict[str, list[BatchStatistics]]:
    """Return statistics in which layers with a single pass have the gradient in ``γ.grad``, where none was recorded.

    Under ``torch.compile`` the gradient of a single pass cannot be recorded. With one pass, one backward pass and one
    device it equals the gradient of the parameter γ right after the backward pass; call this only then.
    """
    whole = {
        step.units.scale.removesuffix(".weight"): before.scale_gradient
        for step in steps
        if step.units.scale is not None and (before := noted.get(step.units.name)) is not None
    }
    return {
        name: [passes[0]._replace(gradient=whole[name])]
        if len(passes) == 1 and passes[0].gradient is None and name in whole
        else list(passes)
        for name, passes in statistics.items()
    }
