"""Descriptions of Lion, of which every library has its own."""

from __future__ import annotations

from operator import attrgetter

import torch
from torch import Tensor

from lightning_normgeo.geometry.update_rules.adam_family import LionRule
from lightning_normgeo.geometry.update_rules.elementwise import ElementwiseRule
from lightning_normgeo.geometry.update_rules.whole_tensor import cautious
from lightning_normgeo.probes.optimizers.recipe import Described, Group, Recipe, State, pair, recipe, scalar, shared


def describe_lion(group: Group, state: State, dtype: torch.dtype) -> Described:
    """Describe a Lion of your own, as published, for :func:`register_optimizer`.

    Reads ``lr``, ``betas`` and ``weight_decay`` from the group and ``exp_avg`` from the state; decay is
    decoupled, s = 1 - ηλ. The Lions of lion-pytorch, of timm and of pytorch-optimizer are known with all their options.
    """
    return _lion(group, state, dtype)


def _lion(
    group: Group, state: State, dtype: torch.dtype, decoupled: bool = True
) -> tuple[LionRule, tuple[Tensor, ...]]:
    rule = LionRule(**{**shared(group, dtype), "decoupled": decoupled}, betas=pair(group["betas"]))
    return rule, (state["exp_avg"],) if "exp_avg" in state else ()


def _lion_pytorch(group: Group, state: State, dtype: torch.dtype) -> Described:
    """Describe lion-pytorch's; with ``decoupled_weight_decay`` it divides λ by the η that it was made with."""
    decay = group["weight_decay"] / group["first_lr"] if group["decoupled"] else group["weight_decay"]
    return describe_lion({**group, "weight_decay": decay}, state, dtype)


def _of_timm(group: Group, state: State, dtype: torch.dtype) -> Described:
    group = corrected(group)
    rule, tensors = _lion(group, state, dtype)
    return with_caution(rule, group), tensors


def _of_pytorch_optimizer(group: Group, state: State, dtype: torch.dtype) -> Described | None:
    if group.get("fixed_decay") and group["weight_decay"]:
        return None  # 1 - λ, whatever η is
    rule, tensors = _lion(group, state, dtype, bool(group["weight_decouple"]))
    return cautious(rule, "count") if group.get("cautious") else rule, tensors


def corrected(group: Group) -> Group:
    """Return a group of timm with λη/η_max for λ, where decay is corrected: s = 1 - λη²/η_max."""
    if not group.get("corrected_weight_decay", False):
        return group
    return {**group, "weight_decay": group["weight_decay"] * scalar(group["lr"]) / group["max_lr_snapshot"]}


def with_caution(rule: ElementwiseRule, group: Group) -> ElementwiseRule:
    """Return a rule of timm, behind the mask where its group asks for it."""
    return cautious(rule) if group.get("caution", False) else rule


_OPTIONS = "lr betas weight_decay maximize"
OWN_LION = recipe(describe_lion, _OPTIONS)
LIONS: dict[str, Recipe] = {
    "lion_pytorch.lion_pytorch.Lion": recipe(
        _lion_pytorch, _OPTIONS, decoupled=attrgetter("decoupled_wd"), first_lr=attrgetter("_init_lr")
    ),
    "timm.optim.lion.Lion": recipe(_of_timm, f"{_OPTIONS} caution corrected_weight_decay max_lr_snapshot"),
    "pytorch_optimizer.optimizer.lion.Lion": recipe(
        _of_pytorch_optimizer,
        f"{_OPTIONS} weight_decouple fixed_decay cautious",
        refuses="use_gc adanorm",
        maximize=attrgetter("maximize"),
    ),
}
