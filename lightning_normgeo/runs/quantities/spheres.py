"""Rows of the table of logged quantities for training on spheres."""

from __future__ import annotations

from lightning_normgeo.runs.quantities.quantity import Quantity

ON_SPHERES = "sphere/radius_error"
"""A key that every training on spheres logs, and no other."""
_RETRACT = "with `mode: retract`"
SPHERE = (
    Quantity(
        "sphere/equivalent_lr",
        "1",
        "learning rate of free training that moves the same directions, geometric mean over blocks",
        label="learning rate of equivalent free training",
        panel="learning rate of equivalent free training",
        condition=_RETRACT,
        in_wandb=True,
        log_scale=True,
    ),
    Quantity(
        "sphere/free_norm_ratio",
        "1",
        "‖W‖ of this free training over the radius, geometric mean over blocks",
        label="‖W‖ of equivalent free training",
        panel="‖W‖ of equivalent free training, over the radius",
        condition=_RETRACT,
        in_wandb=True,
    ),
    Quantity(
        "sphere/step_stretch",
        "1",
        "largest |‖W‖/r − 1| after the step of the optimizer, before the projection",
        condition="with `mode: retract` or `tangent`",
        in_wandb=True,
        log_scale=True,
    ),
    Quantity(ON_SPHERES, "1", "largest |‖W‖/r − 1| after the projection"),
)
"""Quantities of SphereProjection, in the order of the key table."""
