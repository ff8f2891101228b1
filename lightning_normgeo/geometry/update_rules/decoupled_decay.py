"""Shrink factor of decoupled weight decay, for optimizers whose step has no known formula."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.update_rules.recipe import Group, scalar
from lightning_normgeo.geometry.update_rules.registry import recipe_of
from lightning_normgeo.geometry.update_rules.timm_options import corrected

_FLAGS = ("decoupled_weight_decay", "weight_decouple", "decoupled_decay", "decoupled")
"""Names of the option that makes weight decay decoupled, in torch, pytorch-optimizer and timm."""
_ADAPTED = ("d", "fallback_lr_scale")
"""Options of optimizers that multiply the decay with an adapted learning rate instead of η: D-Adaptation, Prodigy,
timm's Muon."""
_UNEXPLAINED = {
    "pytorch_optimizer.optimizer.soap.SOAP",
    "soap.SOAP",
    "muon.Muon",
    "muon.SingleDeviceMuon",
    "muon.MuonWithAuxAdam",
    "muon.SingleDeviceMuonWithAuxAdam",
}
"""Classes without a recipe that always multiply W with 1 - ηλ: SOAP and Muon, in pytorch-optimizer and as published by
their authors."""


def shrink_of(optimizer: Optimizer, group: Group) -> Scalar:
    """Return the factor s of decoupled weight decay, in W⁺ = sW - U.

    :func:`~lightning_normgeo.geometry.identity_terms` takes it as ``shrink``.

    Args:
        optimizer: any optimizer.
        group: one of its parameter groups, read before the step.

    Returns:
        1 - ηλ where the group or the class says that decay is decoupled, and 1 - λ where it also has
        ``fixed_decay``. Otherwise 1, also where this is unknown: decay then counts as part of the step U.
    """
    decay = scalar(group.get("weight_decay") or 0.0)
    if not _is_decoupled(optimizer, group) or (isinstance(decay, float | int) and decay == 0):
        return 1.0
    if group.get("fixed_decay", False):
        return 1 - decay
    return 1 - scalar(group["lr"]) * scalar(corrected(group)["weight_decay"])


def _is_decoupled(optimizer: Optimizer, group: Group) -> bool:
    if "lr" not in group or any(group.get(name) is not None for name in _ADAPTED):
        return False
    said = [group[name] for name in _FLAGS if name in group]
    if said:
        return bool(said[0])
    return any(_always_decouples(kind) for kind in type(optimizer).__mro__)


def _always_decouples(kind: type) -> bool:
    recipe = recipe_of(kind)
    if recipe is None:
        return f"{kind.__module__}.{kind.__qualname__}" in _UNEXPLAINED
    return recipe.always_decoupled
