"""Rows of the table of logged quantities for effective weights."""

from __future__ import annotations

from lightning_normgeo.runs.quantities.quantity import Quantity

GROUP, RESULTS = "effective", "effective_weights"
"""First part of the metric keys, and the name of the results in a record."""
_FIXED = "without layer, group and instance normalization, whose effective weights depend on the sample"
EFFECTIVE = (
    Quantity(
        "effective/weight_norm",
        "weight",
        "‖W'‖ of all layers, W' = γW/√(σ² + ε) with the running variance σ²",
        label="‖W'‖, effective",
        summary="‖W'‖, effective weights",
        condition=_FIXED,
        in_wandb=True,
    ),
    Quantity(
        "effective/weight_norm_raw",
        "weight",
        "‖W‖ of all layers, as they compute with it before normalization",
        label="‖W‖, raw",
        in_wandb=True,
    ),
    Quantity(
        "effective/log10_spectral_product",
        "1",
        "log10 of the product of the spectral norms of all effective linear maps; a Lipschitz bound only for a chain "
        "of layers, none with residual connections",
        label="product of spectral norms, effective",
        summary="log10 of Π σmax(W')",
        condition=_FIXED,
        in_wandb=True,
    ),
    Quantity(
        "effective/log10_spectral_product_raw",
        "1",
        "the same of the raw weights",
        label="product of spectral norms, raw",
        in_wandb=True,
    ),
    Quantity(
        "effective/log10_path_norm",
        "1",
        "log10 of the l2 path norm, from one forward pass through squared effective weights",
        label="path norm, effective",
        condition="in networks of linear layers, batch normalization, ReLU and pooling",
        in_wandb=True,
    ),
    Quantity(
        "effective/log10_path_norm_raw",
        "1",
        "the same of the raw weights, without normalizations",
        label="path norm, raw",
        condition="in networks of linear layers, normalizations, ReLU and pooling",
        in_wandb=True,
    ),
    Quantity(
        "effective/last_layer_norm",
        "weight",
        "‖W‖ of the last layer, the classifier",
        label="‖W‖ of the last layer",
        in_wandb=True,
    ),
    Quantity(
        "effective/epsilon_over_variance",
        "1",
        "largest median of ε/σ² of a batch normalization",
        label="ε/σ², largest median",
        in_wandb=True,
        log_scale=True,
        condition="with batch normalization",
    ),
)
"""Quantities of EffectiveWeightsSummary, in the order of the key table."""
