"""The part of ⟨W, g⟩ that the ε of a batch normalization causes, from what one step has shown."""

from __future__ import annotations

from torch import Tensor

from lightning_normgeo.geometry.orthogonality import batch_norm_epsilon_inner
from lightning_normgeo.probes.batchnorm import BatchStatistics
from lightning_normgeo.probes.measurement import WeightStep


def epsilon_inner(step: WeightStep, statistics: dict[str, BatchStatistics]) -> Tensor | None:
    """Return the ⟨W, g⟩ that ε causes for each unit, or None where it is not known."""
    if step.units.scale is None or step.scale_gradient is None:
        return None
    batch = statistics.get(step.units.scale.removesuffix(".weight"))
    if batch is None or batch.variance.shape != step.inner.shape:
        return None
    return batch_norm_epsilon_inner(batch.scale, step.scale_gradient, batch.variance, batch.eps)
