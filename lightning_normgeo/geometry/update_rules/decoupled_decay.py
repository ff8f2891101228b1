"""How much decoupled weight decay shrinks a weight, of optimizers whose step has no formula."""

from __future__ import annotations

from torch.optim import Optimizer

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.update_rules.recipe import Group, scalar
from lightning_normgeo.geometry.update_rules.registry import recipe_of
from lightning_normgeo.geometry.update_rules.timm_options import corrected

_FLAGS = ("decoupled_weight_decay", "weight_decouple", "decoupled_decay", "decoupled")
"""Options that say so, in torch, pytorch-optimizer and timm."""
_ADAPTED = ("d", "fallback_lr_scale")
"""Options of optimizers whose own learning rate, not η, multiplies the decay: D-Adaptation, Prodigy, timm's Muon."""
_UNEXPLAINED = {
    "pytorch_optimizer.optimizer.soap.SOAP",
    "soap.SOAP",
    "muon.Muon",
    "muon.SingleDeviceMuon",
    "muon.MuonWithAuxAdam",
    "muon.SingleDeviceMuonWithAuxAdam",
}
"""Classes without a recipe that always multiply W with 1 - ηλ: SOAP and Muon, also as their authors' single files."""


def shrink_of(optimizer: Optimizer, group: Group) -> Scalar:
    """Return s of W⁺ = sW - U, for :func:`~lightning_normgeo.geometry.identity_terms`.

    Args:
        optimizer: any.
        group: one of its parameter groups, read before the step.

    Returns:
        1 - ηλ where the group or the class says that decay is decoupled, 1 - λ where it is also fixed; else 1, also
        where that is unknown: decay then counts as part of the step.
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
