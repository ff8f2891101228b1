"""Log of SphereProjection: radii, and the learning rate of free training with the same directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normgeo.callbacks._projection.projector import BlockGroup, Projector
from lightning_normgeo.errors import skipped_on_error, warn_once
from lightning_normgeo.symmetries.transformations.optimizer_states import scaling_of

_LONG = 0.25
"""Change of a norm in one step that is reported: above 1/μ - 1 momentum μ grows by itself, 0.11 for the usual 0.9."""


@skipped_on_error
def log_projection(projector: Projector, trainer: Any) -> None:
    """Send the readings of a step to every logger, every ``log_every_n_steps`` steps."""
    step, every = trainer.fit_loop.epoch_loop._batches_that_stepped, trainer.log_every_n_steps
    if not every or (step + 1) % every or not projector.groups:
        return
    values = readings(projector, trainer.optimizers)  # on every process: norms of sharded blocks are summed over all
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})
    for logger in trainer.loggers:
        try:
            logger.log_metrics(values, step=step)
        except Exception as error:
            warn_once(f"{type(logger).__name__} failed to log the projection: {error!r}.")


def readings(projector: Projector, optimizers: Sequence[Optimizer]) -> dict[str, float]:
    """Return the readings of the last step by metric key.

    In ``retract`` with transport, directions move as in free training whose norms and learning rate are known. With the
    factors a of all projections the norm is r/∏a, and the learning rate is η/(∏a)^p with the power p of the optimizer.
    """
    groups = [group for group in projector.groups if len(group.spheres)]
    norms = [(group.spheres.norms() / group.spheres.radii - 1).abs().max() for group in groups]
    values = {"sphere/radius_error": float(torch.stack(norms).max())}
    stretches = [(1 / group.factors - 1).abs().max() for group in groups if group.factors is not None]
    if stretches:
        values["sphere/step_stretch"] = stretch = float(torch.stack(stretches).max())
        if stretch > _LONG:
            warn_once(
                f"A step made a norm {1 + stretch:.3g} times as long before SphereProjection brought it back. That is "
                "too far for momentum to follow. Lower the learning rate: on spheres the effective one does not fall.",
                about="SphereProjection: long steps",
            )
    if projector.follows_free_training:
        values["sphere/free_norm_ratio"] = math.exp(float(torch.cat([group.growth for group in groups]).mean()))
        rates = [rate for rate in (_log_rates(group, optimizers) for group in groups) if rate is not None]
        if rates and len(rates) == len(groups):
            values["sphere/equivalent_lr"] = math.exp(float(torch.cat(rates).mean()))
    return {key: value for key, value in values.items() if math.isfinite(value)}


def _log_rates(group: BlockGroup, optimizers: Sequence[Optimizer]) -> Tensor | None:
    """Return the logarithm of the learning rate of free training, of each block; None where there is none."""
    powers = {None if (known := scaling_of(optimizers[k])) is None else known.rate for k in group.owners}
    power = powers.pop() if len(powers) == 1 else None
    return None if power is None else group.spheres.of_blocks(group.rates).log() + power * group.growth
