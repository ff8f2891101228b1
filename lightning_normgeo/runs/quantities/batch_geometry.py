"""Rows of the table of logged quantities for the geometry of a batch: Σ_X, and outputs of batch normalizations."""

from __future__ import annotations

from lightning_normgeo.runs.quantities.quantity import Quantity

_KNOWN = "where it is known, and the aggregate where it is known for every chosen layer"
BATCH_GEOMETRY = (
    Quantity(
        "batch_geometry/rank",
        "1",
        "rank of Σ_X, the covariance of a layer's inputs; mean over the chosen layers",
        condition=_KNOWN,
    ),
    Quantity("batch_geometry/rank_at_least", "1", "lower bound of the rank, equal to it where the rank is known"),
    Quantity(
        "batch_geometry/rank_over_inputs",
        "1",
        "rank of Σ_X over n, the number of inputs of a unit; smallest of the chosen layers",
        label="rank of Σ_X",
        panel="rank of Σ_X over width, smallest",
        summary="rank of Σ_X over width",
        condition=_KNOWN,
        in_wandb=True,
    ),
    Quantity(
        "batch_geometry/rank_over_bound",
        "1",
        "rank of Σ_X over min(n, N − 1), N = input vectors of the batch; smallest of the chosen layers",
        label="rank over its bound",
        condition=_KNOWN,
    ),
    Quantity(
        "batch_geometry/samples_over_inputs",
        "1",
        "N/n, batch against width; smallest of the chosen layers",
        label="N/n",
    ),
    Quantity(
        "batch_geometry/effective_rank",
        "1",
        "tr(Σ_X)² / tr(Σ_X²), mean over the chosen layers",
        label="effective rank",
        panel="effective rank of Σ_X, mean",
        summary="effective rank of Σ_X, mean",
        in_wandb=True,
    ),
    Quantity("batch_geometry/effective_rank_error", "1", "its standard error over random probes; 0 if it is exact"),
    Quantity(
        "batch_geometry/eigenvalue_share_1",
        "1",
        "largest eigenvalue of Σ_X over its trace, mean over the chosen layers",
        label="largest eigenvalue",
    ),
    Quantity("batch_geometry/eigenvalue_share_*", "1", "the second, third and fourth one"),
    Quantity(
        "batch_geometry/eigenvalue_residual",
        "1",
        "largest ‖Σ_X v − λv‖ of these four over the trace, which bounds their error; 0 if they are exact",
    ),
    Quantity(
        "batch_geometry/kernel_share_mean",
        "1",
        "share of ‖W_i‖² in the kernel of Σ_X, where gradients never move W_i; mean over units",
        label="share of W in the kernel",
        panel="share of W in the kernel of Σ_X, mean",
        summary="share of W in the kernel of Σ_X",
        condition=_KNOWN,
        in_wandb=True,
    ),
    Quantity("batch_geometry/kernel_share_max", "1", "the largest of a unit", condition=_KNOWN),
    Quantity(
        "batch_geometry/orthogonality_gap",
        "1",
        "‖HᵀH/‖H‖² − I/B‖ of the inputs H of the chosen layers, of at most 256 samples; 0 if samples are orthogonal",
        label="orthogonality gap",
        panel="orthogonality gap of samples, mean",
        in_wandb=True,
    ),
    Quantity(
        "batch_geometry/collapsed_channels",
        "channels",
        "number of channels with ε/s² above 10⁴, whose output is β ± 1 % of |γ|; all batch normalizations",
        label="collapsed channels",
        panel="collapsed channels",
        summary="collapsed channels",
        in_wandb=True,
    ),
    Quantity("batch_geometry/collapsed_share", "1", "the same as a share of all channels"),
    Quantity("batch_geometry/epsilon_over_variance_median", "1", "ε/s², median over all channels; at most 10⁷"),
    Quantity("batch_geometry/epsilon_over_variance_max", "1", "the largest ε/s²", label="largest ε/s²", log_scale=True),
    Quantity("batch_geometry/radius_reached_median", "1", "s/√(s² + ε), median over all channels"),
    Quantity(
        "batch_geometry/radius_reached_min",
        "1",
        "s/√(s² + ε), radius of a channel's output sphere over |γ|√N, smallest of all channels",
        label="smallest radius",
        panel="smallest radius s/√(s² + ε)",
        in_wandb=True,
    ),
)
"""Quantities of BatchGeometryMonitor, in the order of the key table."""
