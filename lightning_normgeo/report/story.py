"""Sections of a report about the geometry: their titles, explanations and quantities.

The HTML page shows a section as a figure, W&B as a group of panels; both take titles and texts from here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Attributes:
        title: Title of the figure, and of the section at W&B.
        caption: Text on how to read the figure of the page.
        keys: Metric keys that the figure draws.
        wandb_text: Text on how to read the panels at W&B. Default: the caption.
        wandb_keys: Metric keys of the panels; ``{layer}`` stands for the first layer with a key of its own. Default:
            those of the figure.
        by_weight_decay: Whether W&B shows runs with and without weight decay apart.
    """

    title: str
    caption: str
    keys: tuple[str, ...]
    wandb_text: str = ""
    wandb_keys: tuple[str, ...] = ()
    by_weight_decay: bool = False


LOSS = Section("Loss", "As the project logged it, for comparison with the geometry below.", ())
ACCURACY = Section("Accuracy", "As the project logged it, without attack.", ())
AFFINE = Section(
    "γ, β against σ, μ (Fig 2)",
    "The paper says both distances settle at small values. σ and μ, and so all three, change with the scale of the "
    "weights in front, which has no effect on the function. One channel, drawn at random by a seed, as in the paper.",
    ("affine/abs_gamma2_minus_sigma2_mean", "affine/abs_beta_minus_mu_mean", "affine/gamma2_over_sigma2_mean"),
    "The paper says that both distances settle at small values. σ and μ, and so all three, change with the scale "
    "of the weights in front, which has no effect on the function. Means over all channels, and one channel drawn by a "
    "seed, as in the paper.",
    (
        "affine/abs_gamma2_minus_sigma2_mean",
        "affine/abs_beta_minus_mu_mean",
        "affine/gamma2_over_sigma2_mean",
        "affine/abs_gamma2_minus_sigma2_channel/{layer}",
        "affine/abs_beta_minus_mu_channel/{layer}",
    ),
)
NORMS = Section(
    "Norms of the weights (Fig 3)",
    "Of all scale-invariant weights, or of the chosen layer. Without weight decay the norm can only grow under "
    "SGD. It does not by itself change the function the network computes.",
    ("norm_growth/weight_norm",),
    "‖W‖ of all scale-invariant weights, and of the first layer that has a curve of its own. Without weight decay "
    "it can only grow under SGD. It does not by itself change the function the network computes.",
    ("norm_growth/weight_norm", "norm_growth/weight_norm/{layer}", "norm_growth_control/weight_norm"),
    by_weight_decay=True,
)
INCREMENTS = Section(
    "What one step adds to ‖W‖²",
    "Points: measured. Wide line: explained by the optimizer's formula, with all its terms. Thin line: predicted by "
    "the paper's eq 16. Summed over all scale-invariant weights; magnitudes, hover for signs. Eq 16 covers plain SGD: "
    "under momentum or weight decay only the wide line has to meet the points.",
    ("norm_growth/increment", "norm_growth/explained", "norm_growth/predicted"),
    "Measured, explained by the optimizer's formula, and predicted by the paper's eq 16, summed over all "
    "scale-invariant weights. Eq 16 covers plain SGD; momentum and weight decay are in the explained curve only. "
    "The axes are linear, as increments can be negative.",
    (
        "norm_growth/increment",
        "norm_growth/explained",
        "norm_growth/predicted",
        "norm_growth/cumulative_increment",
        "norm_growth/cumulative_explained",
        "norm_growth/cumulative_predicted",
    ),
)
RATIO = Section(
    "One step: measured over predicted",
    "The ratio is 1 where a prediction is exact. Close to the storage floor, rounding of the stored weights moves it. "
    "Eq 16 covers plain SGD: under momentum or weight decay its ratio is far from 1. The axis is linear from 0.999 to "
    "1.001 and logarithmic beyond; steps with a predicted increment of zero are left out.",
    INCREMENTS.keys,
)
TERMS = Section(
    "The terms of the increment",
    "Magnitudes; hover for signs. The residual is measured minus explained: it stays below the storage floor, "
    "what rounding of the stored weights adds at random, unless steps are so short that most weights hardly move.",
    (
        "norm_growth/term_quadratic",
        "norm_growth/term_momentum",
        "norm_growth/term_weight_decay",
        "norm_growth/term_gradient",
        "norm_growth/residual",
        "norm_growth/storage_floor",
    ),
    'The terms add up to the explained increment; W&B has them with wandb_keys="all". The residual is measured minus '
    "explained; rounding alone can make it as large as the storage floor, on either side of zero.",
)
CUMULATIVE = Section(
    "What all steps together added to ‖W‖²",
    "Every step counted, measured or not. Points: measured. Wide line: explained by the optimizer's formula. Thin "
    "line: predicted by eq 16. Under plain SGD without weight decay the three agree.",
    ("norm_growth/cumulative_increment", "norm_growth/cumulative_explained", "norm_growth/cumulative_predicted"),
)
CUMULATIVE_RATIO = Section(
    "All steps: measured over predicted",
    "The ratio is 1 where a prediction is exact. The axis is linear from 0.999 to 1.001 and logarithmic beyond.",
    CUMULATIVE.keys,
)
ORTHOGONALITY = Section(
    "Weights are orthogonal to their gradients",
    "Largest |cos(W, ∇W)| over all units (Lemma 2). What remains for scale-invariant units is the ε of the "
    "normalization, known exactly, and float rounding.",
    ("orthogonality/max_abs_cos", "orthogonality/max_abs_cos_corrected", "orthogonality_control/max_abs_cos"),
    "Largest |cos(W, ∇W)| over all units (Lemma 2). What remains for scale-invariant units is the ε of the "
    "normalization, known exactly, and float rounding. The control shows weights that are not scale invariant.",
)
ORTHOGONALITY_BY_LAYER = Section(
    "Orthogonality, layer by layer",
    "At the last measured step, one point for each layer and run. Hover for the layer's name.",
    ORTHOGONALITY.keys,
)
ANGLES = Section(
    "How far the weights turn per step",
    "Root mean square angle between W and W⁺ over all units; with weight decay it approaches the equilibrium of "
    "decay and gradient noise, which only runs with weight decay have.",
    ("norm_growth/angular_update", "norm_growth/equilibrium_angle"),
    wandb_keys=("norm_growth/angular_update", "norm_growth/equilibrium_angle", "norm_growth/effective_lr"),
)
CHARGES = Section(
    "Charges of scale symmetries",
    "A symmetry scales several slices of weights and leaves the loss as it is, so that its charge Σ s⟨W, ∇W⟩ is zero. "
    "The largest of all, over its largest possible value, and the largest if its terms did not cancel.",
    ("symmetry/max_charge", "symmetry/max_uncanceled"),
)
IMBALANCE = Section(
    "Balance of rescalings",
    "|Q| over Σ |s|‖W‖², with Q = Σ s‖W‖², mean over all rescalings such as queries against keys. 0 is the balanced "
    "point. Rescalings change nothing of the function; plain SGD drives them to balance, other optimizers need not.",
    ("symmetry/imbalance",),
)
JOINT_NORM = Section(
    "Norm of what is invariant jointly",
    "‖W‖ of all weights that are invariant as one vector, such as all that write into a residual stream. Its growth "
    "lowers their effective learning rate; by itself it changes nothing of the function.",
    ("symmetry/joint_norm",),
    wandb_keys=("symmetry/joint_norm", "symmetry/joint_angular_update", "symmetry/joint_effective_lr"),
)
JOINT_ANGLES = Section(
    "How far this vector turns per step",
    "The angle between all weights that are invariant as one vector, before and after a step.",
    ("symmetry/joint_angular_update",),
)
SPHERES = Section(
    "Free training with the same directions",
    "Training on spheres moves directions exactly as free training with this learning rate, whose norms would be "
    "longer by the other factor. Geometric means over all blocks.",
    ("sphere/equivalent_lr", "sphere/free_norm_ratio"),
    wandb_keys=("sphere/equivalent_lr", "sphere/free_norm_ratio", "sphere/step_stretch"),
)
BATCH_RANK = Section(
    "Batch against width",
    "Rank of Σ_X, the covariance of the inputs of a unit, over their number: at most (N − 1)/n for N input vectors in "
    "the batch. Below 1 there is a kernel, in which gradients never move the weights; the second curve is the share of "
    "their squared norm in it.",
    ("batch_geometry/rank_over_inputs", "batch_geometry/kernel_share_mean"),
)
EFFECTIVE_RANK = Section(
    "Effective rank of the inputs",
    "tr(Σ)²/tr(Σ²), the number of directions that carry the variance of the inputs, mean over the chosen layers.",
    ("batch_geometry/effective_rank",),
)
BATCH_OUTPUTS = Section(
    "Spheres that batch normalization reaches",
    "s/√(s² + ε), the length of a channel's normalized outputs over √N, smallest of all channels. At 1 the ε has no "
    "effect; near 0 the channel has collapsed to its β.",
    ("batch_geometry/radius_reached_min",),
    wandb_keys=("batch_geometry/radius_reached_min", "batch_geometry/collapsed_channels"),
)
GAP = Section(
    "Orthogonality of samples",
    "The gap ‖HᵀH/‖H‖² − I/B‖ of the inputs H of the chosen layers: 0 if the samples of a batch are orthogonal, near 1 "
    "if they are parallel (Daneshmand et al. 2021).",
    ("batch_geometry/orthogonality_gap",),
)
EFFECTIVE_WEIGHTS = Section(
    "Effective weights",
    "W' = γW/√(σ² + ε) is what a layer in front of batch normalization computes with. Norms, products of spectral "
    "norms and path norms of these weights belong to the function; those of raw weights change with scales without "
    "effect on it. A correlation over runs that also differ in other settings is no cause.",
    (),
)
CHANNELS = Section(
    "What removing channels costs",
    "Channels of batch normalizations masked without retraining, the least important ones first. A criterion that "
    "works stays above the controls at random. |γ| depends on a scale without effect: a channel's γ can grow while the "
    "weights that read it shrink.",
    (),
)
CONTROLS_ONLY = "No weight of these runs is scale invariant, so the curves are those of the controls."
"""Sentence in front of captions where only weights without the invariance were measured."""
GLOSSARY = {
    "scale symmetry": "Slices of weights that can be multiplied by e^(s·t), each with its exponent s, without "
    "effect on the loss. With exponents of both signs it is a rescaling, such as queries against keys.",
    "charge": "Σ s⟨W, ∇W⟩ of a scale symmetry, which is zero; for a single unit this is ⟨W, ∇W⟩ = 0.",
    "Σ_X": "The covariance of the inputs of a unit over the samples and positions of one batch.",
    "unit": "A slice of a weight whose scale leaves the loss unchanged: a filter in front of batch normalization, a "
    "group of filters in front of group normalization, a whole layer in front of layer normalization.",
    "scale-invariant weight": "A weight that consists of such units. Its gradient is orthogonal to it: ⟨W, ∇W⟩ = 0.",
    "control": "A weight without this invariance, measured in the same way: what the law does not force.",
    "Δ‖W‖²": "The increment of the squared norm of a weight in one optimizer step, ‖W⁺‖² − ‖W‖².",
    "eq 16": "Δ‖W‖² = η²‖∇W‖², for scale-invariant weights under SGD without momentum and weight decay.",
    "explained": "The increment that the formula of the optimizer gives, with all its terms.",
    "storage floor": "The largest increment that rounding of the stored weights can add at random.",
    "ε part": "The part of ⟨W, ∇W⟩ that the ε of the normalization causes; it is known exactly.",
    "equilibrium": "The angle per step at which weight decay and gradient noise balance.",
    "γ²/σ²": "The squared scale of a batch normalization over the variance of its input; 1 where γ has reached σ.",
    "BIM": "The basic iterative method: several steps along the sign of the gradient, within a radius ε of the image.",
    "95 % interval": "Wilson's interval: how well this number of samples determines an accuracy.",
}
"""Words of the report in one sentence each."""
AT_A_GLANCE = Section(
    "At a glance",
    "What decides about the claims of the paper. Weights in front of a normalization are orthogonal to their "
    "gradients, |cos(W, ∇W)| ≈ 0; other weights, the control, are not. What a step adds to ‖W‖² follows from the "
    "optimizer's formula, and under plain SGD from the paper's eq 16. Accuracies are those on the test set, clean and "
    "attacked. The tables name each claim, the number that decides it, and how to judge it.",
    (),
)
"""First section of the view of a W&B project."""
WANDB_TRAINING = Section("Loss and accuracy", LOSS.caption, ())
"""Section at W&B with the curves that the project logged itself."""
WANDB_KEYS = Section("Words and keys", "Every metric key, its unit and its meaning.", ())
"""Last section of the view of a W&B project."""
WANDB_SECTIONS = (
    *(AFFINE, NORMS, INCREMENTS, TERMS, ORTHOGONALITY, ANGLES),
    *(CHARGES, IMBALANCE, JOINT_NORM, SPHERES),
    *(BATCH_RANK, EFFECTIVE_RANK, BATCH_OUTPUTS, GAP),
)
"""Sections of a W&B report, in order. The section of increments also shows the cumulative ones."""
WANDB_ROBUSTNESS = (
    "Accuracy on the test set and under each attack, and what the attack takes of it. A bar over several runs is their "
    "mean. How sure a single accuracy is, the intervals in the tables say."
)
