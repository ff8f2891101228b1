"""Options that several optimizers of timm share: corrected weight decay and caution."""

from __future__ import annotations

from typing import Any

import torch

from lightning_normgeo.geometry.update_rules.elementwise import ElementwiseRule
from lightning_normgeo.geometry.update_rules.recipe import Group, scalar, shared
from lightning_normgeo.geometry.update_rules.whole_tensor import cautious

TIMM_OPTIONS = "lr betas eps weight_decay maximize caution corrected_weight_decay max_lr_snapshot"
ADAM_STATE = ("exp_avg", "exp_avg_sq")


def corrected(group: Group) -> Group:
    """Return the group with λ replaced by λη/η_max where timm corrects weight decay, so that s = 1 - λη²/η_max."""
    if not group.get("corrected_weight_decay", False):
        return group
    return {**group, "weight_decay": group["weight_decay"] * scalar(group["lr"]) / group["max_lr_snapshot"]}


def with_caution(rule: ElementwiseRule, group: Group) -> ElementwiseRule:
    """Return the rule, as a :class:`CautiousRule` if the group has timm's option ``caution`` (Liang et al. 2024)."""
    return cautious(rule) if group.get("caution", False) else rule


def with_decoupled_decay(group: Group, dtype: torch.dtype, subtracted: bool = False) -> dict[str, Any]:
    """Return the arguments that all rules with decoupled decay share.

    Args:
        group: the parameter group.
        dtype: the type that the parameter is stored in.
        subtracted: whether the optimizer subtracts ηλW instead of multiplying W with s = 1 - ηλ.
    """
    found = shared({**corrected(group), "decoupled_weight_decay": True}, dtype)
    return found | {"dtype": torch.float64} if subtracted else found
