"""Keys that W&B gets: it draws a chart for each, so a plain run has two dozen that tell the story."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

WandbKeys = Literal["aggregates", "all"]

AGGREGATES = frozenset(
    {
        "orthogonality/max_abs_cos",
        "orthogonality/max_abs_cos_corrected",
        "orthogonality_control/max_abs_cos",
        "norm_growth/weight_norm",
        "norm_growth/increment",
        "norm_growth/predicted",
        "norm_growth/explained",
        "norm_growth/residual",
        "norm_growth/storage_floor",
        "norm_growth/angular_update",
        "norm_growth/equilibrium_angle",
        "norm_growth/effective_lr",
        "norm_growth_control/weight_norm",
        # these there are only where somebody asked for them
        "norm_growth/cumulative_increment",
        "norm_growth/cumulative_predicted",
        "norm_growth/cumulative_explained",
        "norm_growth/cumulative_residual",
        "norm_growth/cumulative_storage_floor",
        "affine/abs_gamma2_minus_sigma2_mean",
        "affine/abs_beta_minus_mu_mean",
        "affine/gamma2_over_sigma2_mean",
    }
)


def for_wandb(scalars: Mapping[str, float], monitors: Iterable[Any]) -> dict[str, float]:
    """Return the numbers of a measured step that W&B gets.

    Args:
        scalars: all of them, by key.
        monitors: those that measured it. One with ``wandb_keys="all"`` has all keys of its groups there; one whose
            ``layers`` were chosen has the keys of these layers.
    """
    monitors = list(monitors)
    whole = {group for monitor in monitors if monitor.wandb_keys == "all" for group in monitor.groups}
    chosen = {group for monitor in monitors if monitor.layers is not None for group in monitor.groups}
    return {
        key: value
        for key, value in scalars.items()
        if key in AGGREGATES or (group := key.partition("/")[0]) in whole or (group in chosen and key.count("/") > 1)
    }
