"""Table of logged quantities: every metric key once, with its unit, its meaning, and its names on screen.

W&B's selection of keys, the summary of a run, figures, reports, and the documentation's key tables are made from it.
"""

from __future__ import annotations

from lightning_normgeo.runs.quantities.batch_geometry import BATCH_GEOMETRY
from lightning_normgeo.runs.quantities.channels import CHANNEL_QUANTITIES
from lightning_normgeo.runs.quantities.effective_weights import EFFECTIVE
from lightning_normgeo.runs.quantities.quantity import Quantity
from lightning_normgeo.runs.quantities.spheres import SPHERE
from lightning_normgeo.runs.quantities.symmetries import SYMMETRY

_ORTHOGONALITY = (
    Quantity(
        "orthogonality/max_abs_cos",
        "1",
        "largest |cos(W, ∇W)| over all scale-invariant units",
        label="scale invariant",
        panel="largest |cos|",
        summary="largest |cos|, scale-invariant",
        in_wandb=True,
        log_scale=True,
    ),
    Quantity("orthogonality/q999_abs_cos", "1", "99.9 % quantile of |cos|"),
    Quantity("orthogonality/rms_cos", "1", "root mean square of cos over units that have a gradient"),
    Quantity(
        "orthogonality/max_abs_cos_corrected",
        "1",
        "largest |cos(W, ∇W)| without the part that ε of the normalization causes, which is known exactly",
        label="scale invariant, ε removed",
        panel="largest |cos|, ε removed",
        summary="  with the epsilon part removed",
        in_wandb=True,
        log_scale=True,
    ),
    Quantity("orthogonality/q999_abs_cos_corrected", "1", "99.9 % quantile of |cos| without the part that ε causes"),
    Quantity(
        "orthogonality_control/max_abs_cos",
        "1",
        "largest |cos(W, ∇W)| of weights that are not scale invariant",
        label="control (no invariance)",
        panel="largest |cos|, control",
        summary="  of the other weights",
        in_wandb=True,
        log_scale=True,
    ),
    Quantity("orthogonality_control/q999_abs_cos", "1", "99.9 % quantile of their |cos|"),
    Quantity("orthogonality_control/rms_cos", "1", "root mean square of cos over their rows that have a gradient"),
    Quantity(
        "orthogonality_control/rows_without_gradient",
        "rows",
        "number of their rows without a gradient, as those of tokens in no batch",
    ),
)
_NORM_GROWTH = (
    Quantity(
        "norm_growth/weight_norm",
        "weight",
        "‖W‖ before the step",
        label="‖W‖",
        panel="‖W‖, all scale-invariant weights",
        summary="‖W‖, scale-invariant weights",
        in_wandb=True,
    ),
    Quantity("norm_growth/weight_norm/{layer}", panel="‖W‖, one layer"),
    Quantity(
        "norm_growth/increment",
        "weight²",
        "measured ‖W⁺‖² − ‖W‖²",
        label="measured",
        summary="Δ‖W‖² of a step, measured",
        in_wandb=True,
    ),
    Quantity(
        "norm_growth/explained",
        "weight²",
        "what the optimizer's formula gives: the sum of the four terms",
        label="explained (all terms)",
        summary="  explained by the formula",
        in_wandb=True,
    ),
    Quantity(
        "norm_growth/predicted",
        "weight²",
        "η²‖∇W‖², eq 16 of the paper",
        label="eq 16: η²‖∇‖²",
        summary="  predicted by eq 16, η²‖∇‖²",
        in_wandb=True,
    ),
    Quantity(
        "norm_growth/predicted_momentum",
        "weight²",
        "increment that ⟨W, ∇W⟩ = 0 gives for SGD with momentum or weight decay",
        summary="  eq 16 with momentum, decay",
    ),
    Quantity(
        "norm_growth/term_quadratic",
        "weight²",
        "part from the squared length of the update",
        label="quadratic, η²‖u‖²",
    ),
    Quantity(
        "norm_growth/term_momentum",
        "weight²",
        "part of the increment from ⟨W, momentum before the step⟩",
        label="momentum",
    ),
    Quantity(
        "norm_growth/term_weight_decay",
        "weight²",
        "part from weight decay",
        label="weight decay",
    ),
    Quantity(
        "norm_growth/term_gradient",
        "weight²",
        "part from ⟨W, ∇W⟩",
        label="gradient, ⟨W, ∇W⟩",
    ),
    Quantity("norm_growth/residual", "weight²", "measured − explained", label="residual", in_wandb=True),
    Quantity(
        "norm_growth/storage_floor",
        "weight²",
        "what rounding in the weights' dtype can add to the increment",
        label="storage floor",
        in_wandb=True,
    ),
    Quantity(
        "norm_growth/identity_*",
        "weight²",
        "`direction`, `weight_decay` and `quadratic` parts of the increment",
        condition="for optimizers without a formula",
    ),
    Quantity(
        "norm_growth/weights_without_formula",
        "weights",
        "number of weights whose optimizer has no formula",
        condition="for optimizers without a formula",
    ),
    Quantity(
        "norm_growth/angular_update",
        "radians",
        "angle between W and W⁺, root mean square over units",
        label="measured",
        panel="angle, radians",
        summary="turn per step (radians)",
        in_wandb=True,
        log_scale=True,
    ),
    Quantity(
        "norm_growth/equilibrium_angle",
        "radians",
        "angle at which weight decay and gradient noise balance",
        label="equilibrium",
        panel="equilibrium, radians",
        condition="with weight decay",
        in_wandb=True,
        log_scale=True,
    ),
    Quantity(
        "norm_growth/steps_to_equilibrium", "steps", "time constant of the way there", condition="with weight decay"
    ),
    Quantity(
        "norm_growth/effective_lr",
        "1/weight²",
        "η/‖unit‖², mean over units",
        panel="effective learning rate, η/‖W‖²",
        in_wandb=True,
        log_scale=True,
    ),
    Quantity(
        "norm_growth/eq16_applies", "1", "1 under plain SGD; 0 where the paper's eq 16 does not cover the optimizer"
    ),
    Quantity(
        "norm_growth/cumulative_*",
        "weight²",
        "`increment`, `predicted`, `explained`, the terms, `residual`, `storage_floor`, summed over every step so far",
        condition="with `cumulative=True`",
    ),
    Quantity(
        "norm_growth/cumulative_increment",
        label="measured, ‖W_t‖² − ‖W_0‖²",
        panel="measured, since the first step",
        in_wandb=True,
    ),
    Quantity(
        "norm_growth/cumulative_explained",
        label="explained (all terms)",
        panel="explained, since the first step",
        in_wandb=True,
    ),
    Quantity(
        "norm_growth/cumulative_predicted",
        label="eq 16: Σ η²‖∇‖²",
        panel="eq 16, since the first step",
        in_wandb=True,
    ),
    Quantity("norm_growth/cumulative_residual", in_wandb=True),
    Quantity("norm_growth/cumulative_storage_floor", in_wandb=True),
    Quantity("norm_growth_control/*", "as above", "the same for weights that are not scale invariant"),
    Quantity("norm_growth_control/weight_norm", panel="‖W‖, control", in_wandb=True),
    Quantity(
        "norm_growth_control/rows_unmoved", "rows", "how many rows of controls stood still; angles leave them out"
    ),
)
_AFFINE = (
    Quantity(
        "affine/abs_gamma2_minus_sigma2_mean",
        "activation²",
        "|γ² − σ²|, mean over all channels; also `_median` and `_q90`",
        label="|γ² − σ²|",
        summary="|γ² - σ²|, mean over channels",
        in_wandb=True,
        log_scale=True,
    ),
    Quantity(
        "affine/abs_beta_minus_mu_mean",
        "activation",
        "|β − μ|, mean over all channels; also `_median` and `_q90`",
        label="|β − μ|",
        summary="|β - μ|, mean over channels",
        in_wandb=True,
        log_scale=True,
    ),
    Quantity(
        "affine/gamma2_over_sigma2_mean",
        "1",
        "γ²/(σ² + ε), mean over all channels; also `_median` and `_q90`",
        label="γ²/σ²",
        in_wandb=True,
        log_scale=True,
    ),
    Quantity(
        "affine/abs_gamma2_minus_sigma2_channel/{layer}",
        "activation²",
        "one channel, as in the paper's Fig 2; the others likewise",
        panel="|γ² − σ²|, one channel",
        log_scale=True,
    ),
    Quantity("affine/abs_beta_minus_mu_channel/{layer}", panel="|β − μ|, one channel", log_scale=True),
    Quantity(
        "affine/*_pooled_mean",
        "as above",
        "the same from μ and σ² of all passes together",
        condition="where a layer runs several times in a step",
    ),
    Quantity(
        "affine/*_mean_view1",
        "as above",
        "the same for the first, second … run of each layer, up to 8",
        condition="where a layer runs several times before one backward pass, as with two views",
    ),
)
_ROBUSTNESS = (
    Quantity("robustness/{attack}/accuracy", "1", "for `clean`, `gaussian`, `bim` and what else is evaluated"),
    Quantity("robustness/{attack}/accuracy_drop", "1", "clean accuracy − accuracy"),
    Quantity("robustness/{attack}/ci_low", "1", "lower end of the 95 % Wilson interval"),
    Quantity("robustness/{attack}/ci_high", "1", "upper end"),
    Quantity("robustness/{attack}/n", "1", "samples counted"),
)
QUANTITIES: dict[str, Quantity] = {
    quantity.key: quantity
    for group in (
        _ORTHOGONALITY,
        _NORM_GROWTH,
        _AFFINE,
        SYMMETRY,
        SPHERE,
        BATCH_GEOMETRY,
        EFFECTIVE,
        _ROBUSTNESS,
        CHANNEL_QUANTITIES,
    )
    for quantity in group
}
"""All logged quantities by metric key, in the order of the key table."""


def labels(*keys: str) -> dict[str, str]:
    """Return the labels of quantities by metric key, in the given order."""
    return {key: QUANTITIES[key].label for key in keys}
