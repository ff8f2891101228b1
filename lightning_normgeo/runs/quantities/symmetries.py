"""Rows of the table of logged quantities for scale symmetries."""

from __future__ import annotations

from lightning_normgeo.runs.quantities.quantity import Quantity

_JOINTLY = "where weights are invariant jointly"
SYMMETRY = (
    Quantity(
        "symmetry/max_charge",
        "1",
        "largest |Σ s_i⟨W_i, ∇W_i⟩| of all scale symmetries, over √(Σ s_i²‖W_i‖² · Σ‖∇W_i‖²)",
        label="charge",
        panel="largest charge",
        summary="largest charge, symmetries",
        in_wandb=True,
        log_scale=True,
    ),
    Quantity("symmetry/max_charge_alone", "1", "the same over slices that are invariant alone"),
    Quantity("symmetry/max_charge_jointly", "1", "over slices that are invariant jointly", condition=_JOINTLY),
    Quantity("symmetry/max_charge_rescaling", "1", "over rescalings"),
    Quantity(
        "symmetry/max_uncanceled",
        "1",
        "largest Σ |s_i⟨W_i, ∇W_i⟩| over the same: joint symmetries and rescalings, if terms did not cancel",
        label="if terms did not cancel",
        panel="largest charge if terms did not cancel",
        summary="  if its terms did not cancel",
        in_wandb=True,
        log_scale=True,
    ),
    Quantity(
        "symmetry/imbalance",
        "1",
        "|Q| / Σ |s_i|‖W_i‖² with Q = Σ s_i‖W_i‖², mean over rescalings; 0 is the balanced point",
        label="imbalance",
        panel="imbalance of rescalings",
        summary="imbalance of rescalings, mean",
        in_wandb=True,
    ),
    Quantity(
        "symmetry/increment",
        "1",
        "ΔQ of the step over Σ |s_i|‖W_i‖², positive for growing |Q|; mean over joint symmetries and rescalings",
        label="measured",
        panel="ΔQ, measured",
        in_wandb=True,
    ),
    Quantity("symmetry/noise", "1", "its part η² Σ s_i‖∇W_i‖², all of it under plain SGD", label="noise"),
    Quantity("symmetry/decay", "1", "its part −2 Σ s_i ηλ‖W_i‖²", label="weight decay"),
    Quantity(
        "symmetry/joint_norm",
        "weight",
        "‖W‖ of the parameters that are invariant as one vector, such as all writers of a residual stream",
        panel="‖W‖, invariant jointly",
        summary="‖W‖, invariant jointly",
        condition=_JOINTLY,
        in_wandb=True,
    ),
    Quantity(
        "symmetry/joint_angular_update",
        "radians",
        "angle by which this vector turns",
        panel="angle, invariant jointly, radians",
        condition=_JOINTLY,
        in_wandb=True,
        log_scale=True,
    ),
    Quantity(
        "symmetry/joint_effective_lr",
        "1/weight²",
        "η/‖W‖² of this vector",
        panel="effective learning rate, invariant jointly",
        in_wandb=True,
        log_scale=True,
        condition="where its parameters have one learning rate",
    ),
)
"""Quantities of SymmetryMonitor, in the order of the key table."""
