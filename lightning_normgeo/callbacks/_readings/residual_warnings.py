"""Warnings about residuals: increments of ‖W‖² that neither an optimizer's formula nor rounding explains."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_normgeo.callbacks._readings.readings import HostValues
from lightning_normgeo.errors import warn_once
from lightning_normgeo.probes.weight_step import WeightStep

RESIDUAL, FLOOR, NORM_SQ = "residuals/residual", "residuals/floor", "residuals/weight_sq"
"""Keys of internal readings with one value per weight: residual, rounding floor and ‖W‖²."""
_FAR_ABOVE = 100.0
"""Ratio of a residual to its rounding floor above which something other than rounding must have moved the weight."""


def report_residuals(row: HostValues, steps: Sequence[WeightStep]) -> None:
    """Warn once for each optimizer whose formula does not explain what a step did to a weight."""
    residuals, floors, norms = (row.internal.get(key, {}) for key in (RESIDUAL, FLOOR, NORM_SQ))
    by_name = {step.units.name: step for step in steps}
    worst: dict[str, tuple[float, str]] = {}
    for name, residual in residuals.items():
        floor, step = floors.get(name, 0.0), by_name.get(name)
        if step is None or abs(residual) <= _FAR_ABOVE * floor:
            continue
        factor = abs(residual) / floor if floor else float("inf")
        if factor > worst.get(step.optimizer, (0.0, ""))[0]:
            worst[step.optimizer] = factor, name
    for optimizer, (factor, name) in worst.items():
        count = sum(step.optimizer == optimizer for step in by_name.values())
        unit = torch.finfo(by_name[name].arithmetic).eps * norms.get(name, 0.0)
        units = abs(residuals[name]) / unit if unit else float("inf")
        warn_once(
            f"{name}: what the step added to ‖W‖² differs from the formula of {optimizer} by {residuals[name]:.3g}, "
            f"{factor:.0f} times what rounding can do ({units:.3g} units in the last place of ‖W‖²). Something else "
            f"moved it: an option of {optimizer} that its formula lacks, a hook or a constraint on the weight inside "
            f"the step. `explained` is wrong for it, and maybe for others of the {count} that {optimizer} moves.",
            about=f"residual of {optimizer}",
        )
