"""OrthogonalityMonitor, which measures whether weights are orthogonal to their gradients (Lemmas 2 and 3)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lightning_normgeo.callbacks._monitors.geometry_monitor import GeometryMonitor
from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep
from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.callbacks._readings.reductions.quantiles import quantile_of_some
from lightning_normgeo.callbacks._readings.reductions.stacked_units import StackedUnits


class OrthogonalityMonitor(GeometryMonitor):
    r"""Logs cos(W, g) over the scale-invariant units of a model, and over its other weights as a control.

    For a scale-invariant unit :math:`\langle W, g\rangle = 0` with the gradient g (Lemma 2; Lemma 3, eq 15 of Sun et
    al. 2020). The ε of a batch normalization adds a known part to this inner product. The ``…_corrected`` keys
    subtract it, summed over all forward and backward passes, micro-batches and processes that contribute to the
    gradient. They are logged only where this is exact: not where the direction of a gradient was changed before the
    step (clipping by value, noise) or may have been changed by a hook of a parameter, not in models sharded by
    ``fully_shard``, and under ``torch.compile`` only for one pass on one device.

    Scale invariance is derived from the autograd graphs of a step and confirmed by its cosines: a layer whose root mean
    square cosine exceeds 0.01 for another reason than ε becomes a control, with a warning.

    Metric keys, units and meanings: the documentation's key table, made from
    :data:`lightning_normgeo.runs.quantities.table.QUANTITIES`.

    Add ``/{module path}`` for one layer (not for the quantile). Typical cosines in float32: 1e-5 raw, below 1e-6
    corrected; 1e-3 under bf16 autocast. Weights that are not scale invariant have 0.01 to 0.5.

    Cost: one pass over weights and gradients per measured step; another one after each backward pass of such a step
    where something may change gradients before the optimizer applies them: clipping, a gradient scaler, manual
    optimization, or hooks of the project.

    Args:
        every_n_steps: measure every n-th optimizer step; ``auto`` for less and less often in long trainings (see
            :class:`GeometryMonitor`). Default: the Trainer's ``log_every_n_steps``.
        layers: globs for the layers with metric keys of their own, at most 16; more layers go into one table (see
            :class:`GeometryMonitor`). Default: the first residual block.
        wandb_keys: metric keys sent to W&B: two dozen ``aggregates`` or ``all`` (see :class:`GeometryMonitor`).
            Default: ``aggregates``.
    """

    groups = ("orthogonality", "orthogonality_control")
    needs_statistics = True

    def measure(self, measured: MeasuredStep) -> Iterable[Reading]:
        """Return the readings of one step."""
        invariant, controls = measured.columns(True, "gradient"), measured.columns(False, "gradient")
        if invariant is not None:
            yield from _cosines(self.groups[0], "", invariant, invariant.cosines)
            known = invariant.with_known_epsilon
            if known is not None:
                yield from _cosines(self.groups[0], "_corrected", known, known.corrected_cosines)
        if controls is not None:
            yield from _control(self.groups[1], controls)


def _cosines(group: str, suffix: str, columns: StackedUnits, cosines: Tensor) -> Iterator[Reading]:
    """Yield cosines over the units that have a gradient: a dead filter has no direction to compare with.

    Neither have a layer of dead filters, and rows of an embedding that are in no batch.
    """
    layers, sizes, has_gradient = columns.layers, cosines.abs(), columns.gradient_sq > 0
    yield layers.maximum_of_some(f"{group}/max_abs_cos{suffix}", sizes, has_gradient)
    yield Reading(f"{group}/q999_abs_cos{suffix}", quantile_of_some(sizes, has_gradient, 0.999), partial=True)
    if not suffix:
        yield layers.reading_of_some(f"{group}/rms_cos", cosines.square(), has_gradient, torch.sqrt)


def _control(group: str, columns: StackedUnits) -> Iterator[Reading]:
    yield from _cosines(group, "", columns, columns.cosines)
    without = (columns.gradient_sq <= 0).to(columns.cosines)
    yield columns.layers.reading(f"{group}/rows_without_gradient", without, columns.layers.sum)
