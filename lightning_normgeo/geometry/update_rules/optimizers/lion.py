"""Lion, of which every library has its own: lion-pytorch, timm, pytorch-optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.update_rules.elementwise import ElementwiseRule, StepParts
from lightning_normgeo.geometry.update_rules.recipe import Described, Group, Recipe, State, pair, recipe, shared
from lightning_normgeo.geometry.update_rules.timm_options import corrected, with_caution
from lightning_normgeo.geometry.update_rules.whole_tensor import cautious


@dataclass(frozen=True, kw_only=True)
class LionRule(ElementwiseRule):
    r"""Lion: W⁺ = sW - η sign(c), c = β₁m⁻ + (1-β₁)g (Chen et al. 2023), not in torch.

    sign(c) = c/|c| splits as c does. The state is (m⁻,) before the step, or nothing at the first.

    Args:
        betas: (β₁, β₂).
    """

    betas: tuple[Scalar, Scalar] = (0.9, 0.99)

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return G, M and Λ."""
        beta1 = self.betas[0]
        gradient, full = self.full(weight, gradient)
        whole = full * (1 - beta1) + (state[0] * beta1 if state else 0.0)
        by = torch.where(whole == 0, torch.inf, whole.abs())
        return self.divided(weight, gradient, state[0] if state else None, (self.lr * (1 - beta1), self.lr * beta1), by)


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
