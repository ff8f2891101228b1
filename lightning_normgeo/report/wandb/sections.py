"""Sections of a W&B report: their titles, explanations and curves."""

from __future__ import annotations

from dataclasses import dataclass

STEP = "trainer/global_step"
"""The key of the training step, which Lightning's WandbLogger adds to everything it logs: the axis of all curves."""


@dataclass(frozen=True)
class Curve:
    """One panel with a curve.

    Attributes:
        title: Title of the panel.
        key: Key of the metric; with a star at its end, the first key that it matches.
        log: Whether the vertical axis is logarithmic.
    """

    title: str
    key: str
    log: bool = False


@dataclass(frozen=True)
class Section:
    """One section of the report.

    Attributes:
        title: Title of the section.
        text: Text on what is shown and how to read it.
        curves: Panels of the section.
        by_weight_decay: Whether runs with and without weight decay are shown apart.
    """

    title: str
    text: str
    curves: tuple[Curve, ...]
    by_weight_decay: bool = False


SECTIONS = (
    Section(
        "γ, β against σ, μ (Fig 2)",
        "The paper says that both distances settle at small values. |γ² − σ²| changes with the scale of weights that "
        "has no effect on the function; γ²/σ² is free of it. Means over all channels, and one channel drawn by a seed, "
        "as in the paper.",
        (
            Curve("|γ² − σ²|", "affine/abs_gamma2_minus_sigma2_mean", log=True),
            Curve("|β − μ|", "affine/abs_beta_minus_mu_mean", log=True),
            Curve("γ²/σ²", "affine/gamma2_over_sigma2_mean", log=True),
            Curve("|γ² − σ²|, one channel", "affine/abs_gamma2_minus_sigma2_channel/*", log=True),
            Curve("|β − μ|, one channel", "affine/abs_beta_minus_mu_channel/*", log=True),
        ),
    ),
    Section(
        "Norms of the weights (Fig 3)",
        "‖W‖ of all scale-invariant weights, and of the first layer that has a curve of its own. Without weight decay "
        "it can only grow under SGD. It does not by itself change the function the network computes.",
        (
            Curve("‖W‖, all scale-invariant weights", "norm_growth/weight_norm"),
            Curve("‖W‖, one layer", "norm_growth/weight_norm/*"),
            Curve("‖W‖, control", "norm_growth_control/weight_norm"),
        ),
        by_weight_decay=True,
    ),
    Section(
        "What one step adds to ‖W‖²",
        "Measured, explained by the optimizer's formula, and predicted by the paper's eq 16, summed over all "
        "scale-invariant weights. Eq 16 covers plain SGD; momentum and weight decay are in the explained curve only. "
        "The axes are linear, as increments can be negative.",
        (
            Curve("measured", "norm_growth/increment"),
            Curve("explained (all terms)", "norm_growth/explained"),
            Curve("eq 16: η²‖∇‖²", "norm_growth/predicted"),
            Curve("measured, since the first step", "norm_growth/cumulative_increment"),
            Curve("explained, since the first step", "norm_growth/cumulative_explained"),
            Curve("eq 16, since the first step", "norm_growth/cumulative_predicted"),
        ),
    ),
    Section(
        "The terms of the increment",
        "They add up to the explained increment. The residual is measured minus explained; rounding alone can make it "
        "as large as the storage floor, on either side of zero.",
        (
            Curve("quadratic, η²‖u‖²", "norm_growth/term_quadratic"),
            Curve("momentum", "norm_growth/term_momentum"),
            Curve("weight decay", "norm_growth/term_weight_decay"),
            Curve("gradient, ⟨W, ∇W⟩", "norm_growth/term_gradient"),
            Curve("residual", "norm_growth/residual"),
            Curve("storage floor", "norm_growth/storage_floor"),
        ),
    ),
    Section(
        "Weights are orthogonal to their gradients",
        "Largest |cos(W, ∇W)| over all units (Lemma 2). What remains for scale-invariant units is the ε of the "
        "normalization, known exactly, and float rounding. The control shows weights that are not scale invariant.",
        (
            Curve("largest |cos|", "orthogonality/max_abs_cos", log=True),
            Curve("largest |cos|, ε removed", "orthogonality/max_abs_cos_corrected", log=True),
            Curve("largest |cos|, control", "orthogonality_control/max_abs_cos", log=True),
        ),
    ),
    Section(
        "How far the weights turn per step",
        "Root mean square angle between W and W⁺ over all units; with weight decay it approaches the equilibrium of "
        "decay and gradient noise, which only runs with weight decay have.",
        (
            Curve("angle, radians", "norm_growth/angular_update", log=True),
            Curve("equilibrium, radians", "norm_growth/equilibrium_angle", log=True),
            Curve("effective learning rate, η/‖W‖²", "norm_growth/effective_lr", log=True),
        ),
    ),
)
ROBUSTNESS = (
    "Accuracy on the test set and under each attack, and what the attack takes of it. A bar over several runs is their "
    "mean. How sure a single accuracy is, the intervals in the tables say."
)
