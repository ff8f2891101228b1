"""OrthogonalityMonitor: are weights orthogonal to their gradients (Lemmas 2 and 3)?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lightning_normgeo.callbacks.base import GeometryMonitor
from lightning_normgeo.callbacks.columns import Columns
from lightning_normgeo.callbacks.epsilon import epsilon_inner
from lightning_normgeo.callbacks.measured import Measured
from lightning_normgeo.callbacks.readings import Reading
from lightning_normgeo.geometry.orthogonality import cosine
from lightning_normgeo.probes.batchnorm import BatchStatistics


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
        layers: globs for the layers that get keys of their own, up to 16; more go into one table (see
            :class:`GeometryMonitor`). The first residual block if left out.
    """

    groups = ("orthogonality", "orthogonality_control")
    needs_statistics = True

    def measure(self, measured: Measured) -> Iterable[Reading]:
        """Return the readings of one step."""
        for group, invariant in zip(self.groups, (True, False), strict=True):
            columns = measured.columns(invariant, "gradient")
            if columns is None:
                continue
            yield from _cosines(group, "", columns, columns.column("inner"))
            if invariant and measured.single_pass:
                yield from _corrected(group, columns, measured.statistics)


def _corrected(group: str, columns: Columns, statistics: dict[str, BatchStatistics]) -> Iterator[Reading]:
    parts = [epsilon_inner(step, statistics) for step in columns.steps]
    explained = [part for part in parts if part is not None]
    if len(explained) < len(parts):
        known = [step for step, part in zip(columns.steps, parts, strict=True) if part is not None]
        if not known:
            return
        columns = Columns(known)
    yield from _cosines(group, "_corrected", columns, columns.column("inner") - torch.cat(explained))


def _cosines(group: str, suffix: str, columns: Columns, inner: Tensor) -> Iterator[Reading]:
    sites = columns.sites
    cosines = cosine(inner, columns.column("weight_sq"), columns.column("gradient_sq"))
    sizes = cosines.abs()
    yield sites.reading(f"{group}/max_abs_cos{suffix}", sizes, sites.maximum, watch=True)
    yield Reading(f"{group}/q999_abs_cos{suffix}", sizes.quantile(0.999))
    if not suffix:
        yield sites.reading(f"{group}/rms_cos", cosines.square(), sites.mean, torch.sqrt, watch=True)
