"""OrthogonalityMonitor: are weights orthogonal to their gradients (Lemmas 2 and 3)?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_normgeo.callbacks.base import GeometryMonitor
from lightning_normgeo.callbacks.epsilon import epsilon_inner
from lightning_normgeo.callbacks.readings import Reading
from lightning_normgeo.callbacks.session import Measured
from lightning_normgeo.callbacks.sites import Sites
from lightning_normgeo.geometry.orthogonality import cosine
from lightning_normgeo.probes.batchnorm import BatchStatistics
from lightning_normgeo.probes.measurement import WeightStep


class OrthogonalityMonitor(GeometryMonitor):
    r"""Logs cos(W, g) over the scale-invariant units of a model, and over its other weights as a control.

    For a scale-invariant unit :math:`\langle W, \nabla W\rangle = 0` (Lemma 2). The ε of a batch normalization adds
    a known part, which ``…_corrected`` takes off; it is logged where that part is exact: one backward pass per
    step, on one device, without clipping by value.

    ======================================  =======================================================================
    key                                     meaning (unit: 1, range [0, 1])
    ======================================  =======================================================================
    ``orthogonality/max_abs_cos``           largest \|cos\| over all scale-invariant units
    ``orthogonality/q999_abs_cos``          99.9 % quantile of \|cos\|
    ``orthogonality/rms_cos``               root mean square of cos
    ``orthogonality/*_corrected``           the first two with the epsilon part removed
    ``orthogonality_control/*``             the same for weights without an established invariance, by output row
    ======================================  =======================================================================

    Add ``/{module path}`` for one layer (not for the quantile). Typical values in float32: 1e-5 raw, below 1e-6
    corrected; 1e-3 under bf16 autocast. Weights without invariance are around 0.01 to 0.5.

    Cost: one pass over weights and gradients per measured step.

    Args:
        every_n_steps: measure each n-th optimizer step; the Trainer's ``log_every_n_steps`` if left out.
        layers: globs for the layers that get keys of their own; the first residual block if left out.
    """

    groups = ("orthogonality", "orthogonality_control")
    needs_statistics = True

    def measure(self, measured: Measured) -> Iterable[Reading]:
        """Return the readings of one step."""
        invariant = [step for step in measured.steps if step.units.invariant]
        yield from _cosines("orthogonality", "", invariant, [step.inner for step in invariant])
        if measured.single_pass:
            yield from _corrected(invariant, measured.statistics)
        controls = [step for step in measured.steps if not step.units.invariant]
        yield from _cosines("orthogonality_control", "", controls, [step.inner for step in controls])


def _corrected(steps: Sequence[WeightStep], statistics: dict[str, BatchStatistics]) -> Iterator[Reading]:
    known = [(step, part) for step in steps if (part := epsilon_inner(step, statistics)) is not None]
    yield from _cosines("orthogonality", "_corrected", [s for s, _ in known], [s.inner - part for s, part in known])


def _cosines(group: str, suffix: str, steps: Sequence[WeightStep], inner: Sequence[Tensor]) -> Iterator[Reading]:
    if not steps:
        return
    sites = Sites([step.units.site for step in steps], [step.units.count for step in steps], inner[0].device)
    squares = (torch.cat([step.weight_sq for step in steps]), torch.cat([step.gradient_sq for step in steps]))
    cosines = cosine(torch.cat(list(inner)), *squares)
    yield sites.reading(f"{group}/max_abs_cos{suffix}", cosines.abs(), sites.maximum, watch=True)
    yield Reading(f"{group}/q999_abs_cos{suffix}", cosines.abs().quantile(0.999))
    if not suffix:
        yield sites.reading(f"{group}/rms_cos", cosines.square(), sites.mean, torch.sqrt, watch=True)
