"""Lion, as in lion-pytorch, timm and pytorch-optimizer, whose options differ."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import ClassVar

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.update_rules.elementwise import ElementwiseRule, StepParts
from lightning_normgeo.geometry.update_rules.recipe import Described, Group, Recipe, State, pair, recipe, shared
from lightning_normgeo.geometry.update_rules.timm_options import corrected, with_caution
from lightning_normgeo.geometry.update_rules.whole_tensor import cautious


@dataclass(frozen=True, kw_only=True)
class LionRule(ElementwiseRule):
    r"""Lion: W⁺ = sW - η sign(c) with c = β₁m⁻ + (1-β₁)g (Chen et al. 2023); torch has no Lion.

    Since sign(c) = c/|c|, the step splits into G and M in the same proportions as c. The state is (m⁻,) before the
    step, and empty before the first step.

    Args:
        betas: (β₁, β₂). Default: (0.9, 0.99).
    """

    betas: tuple[Scalar, Scalar] = (0.9, 0.99)
    additive: ClassVar[bool] = True

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts G, M and Λ."""
        beta1 = self.betas[0]
        gradient, full = self.full(weight, gradient)
        whole = full * (1 - beta1) + (state[0] * beta1 if state else 0.0)
        by = torch.where(whole == 0, torch.inf, whole.abs())
        return self.divided(weight, gradient, state[0] if state else None, (self.lr * (1 - beta1), self.lr * beta1), by)


def describe_lion(group: Group, state: State, dtype: torch.dtype) -> Described:
    """Describe your own implementation of the published Lion, for :func:`register_optimizer`.

    It reads ``lr``, ``betas`` and ``weight_decay`` from the group and ``exp_avg`` from the state; decay is decoupled,
    s = 1 - ηλ. The Lions of lion-pytorch, timm and pytorch-optimizer need no registration: they are known with all
    their options.

    Args:
        group: the parameter group.
        state: ``optimizer.state[parameter]`` before the step.
        dtype: the type that the parameter is stored in.

    Returns:
        A :class:`~lightning_normgeo.geometry.LionRule`, and (m⁻,) or, before the first step, ().
    """
    return _lion(group, state, dtype)


def _lion(
    group: Group, state: State, dtype: torch.dtype, decoupled: bool = True
) -> tuple[LionRule, tuple[Tensor, ...]]:
    rule = LionRule(**{**shared(group, dtype), "decoupled": decoupled}, betas=pair(group["betas"]))
    return rule, (state["exp_avg"],) if "exp_avg" in state else ()


def _lion_pytorch(group: Group, state: State, dtype: torch.dtype) -> Described:
    """Describe the Lion of lion-pytorch, which divides λ by the initial η with ``decoupled_weight_decay``."""
    decay = group["weight_decay"] / group["first_lr"] if group["decoupled"] else group["weight_decay"]
    return describe_lion({**group, "weight_decay": decay}, state, dtype)


def _of_timm(group: Group, state: State, dtype: torch.dtype) -> Described:
    group = corrected(group)
    rule, tensors = _lion(group, state, dtype)
    return with_caution(rule, group), tensors


def _of_pytorch_optimizer(group: Group, state: State, dtype: torch.dtype) -> Described | None:
    if group.get("fixed_decay") and group["weight_decay"]:
        return None  # decay by 1 - λ, independent of η, which the rule does not cover
    rule, tensors = _lion(group, state, dtype, bool(group["weight_decouple"]))
    return cautious(rule, "count") if group.get("cautious") else rule, tensors


_OPTIONS = "lr betas weight_decay maximize"
OWN_LION = recipe(describe_lion, _OPTIONS)
RECIPES: dict[str, Recipe] = {
    "lion_pytorch.lion_pytorch.Lion": recipe(
        _lion_pytorch, _OPTIONS, decoupled=attrgetter("decoupled_wd"), first_lr=attrgetter("_init_lr")
    ),
    "timm.optim.lion.Lion": recipe(
        _of_timm, f"{_OPTIONS} caution corrected_weight_decay max_lr_snapshot", always_decoupled=True
    ),
    "pytorch_optimizer.optimizer.lion.Lion": recipe(
        _of_pytorch_optimizer,
        f"{_OPTIONS} weight_decouple fixed_decay cautious",
        refuses="use_gc adanorm",
        maximize=attrgetter("maximize"),
    ),
}
