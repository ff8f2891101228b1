"""Layer-wise adaptive rates: LARS and LAMB, whose steps are scaled by norms of whole weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.geometry.update_rules.elementwise import StepParts, average
from lightning_normgeo.geometry.update_rules.optimizers.adam import AdamRule
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule
from lightning_normgeo.geometry.update_rules.recipe import (
    Described,
    Group,
    Recipe,
    State,
    averages,
    moments,
    recipe,
    scalar,
    shared,
)
from lightning_normgeo.geometry.update_rules.timm_options import ADAM_STATE, TIMM_OPTIONS, with_decoupled_decay
from lightning_normgeo.geometry.update_rules.whole_tensor import (
    Direction,
    WholeTensorRule,
    masked,
    own_norm,
    scaled,
    zeros_if_new,
)


@dataclass(frozen=True, kw_only=True)
class LarsRule(WholeTensorRule):
    r"""LARS as in timm: SGD of r(g + λW) with r = κ‖W‖/(‖g‖ + λ‖W‖ + ε) (You et al. 2017). State as for SGD.

    Args:
        sgd: the SGD that moves the weight; its η, μ, τ and ``nesterov`` are used.
        trust: κ. Default: 1e-3.
        eps: ε. Default: 1e-8.
        clip: whether r/η is limited to at most 1, as in LARC. Default: False.
        adapts: whether r is used; if not, r = 1 and λ is unused. timm adapts weights with decay. Default: True.
    """

    sgd: SGDRule
    trust: float = 1e-3
    eps: float = 1e-8
    clip: bool = False
    adapts: bool = True

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return the parts G, M and Λ."""
        ratio = self._ratio(own_norm(weight), own_norm(gradient)) if self.adapts else 1.0
        w, g, *buffer = (tensor.to(wide_dtype(weight.device)) for tensor in (weight, gradient, *state))
        c_g, c_m = self.sgd.coefficients
        by_gradient = self.lr * c_g * ratio
        decay = w * (by_gradient * self.weight_decay) if self.adapts else None
        return Direction(StepParts(g * by_gradient, buffer[0] * (self.lr * c_m) if buffer else None, decay))

    def _ratio(self, weight: Tensor, gradient: Tensor) -> Tensor:
        ratio = self.trust * weight / (gradient + weight * self.weight_decay + self.eps)
        ratio = torch.where((weight > 0) & (gradient > 0), ratio, 1.0)
        return (ratio / self.lr).clamp_max(1.0) if self.clip else ratio


@dataclass(frozen=True, kw_only=True)
class LambRule(WholeTensorRule, AdamRule):
    r"""LAMB as in timm: W⁺ = sW - ηr(A + λW), r = ‖sW‖/‖A + λW‖, with A as in Adam (You et al. 2020).

    State as for Adam.

    Args:
        clip: the divisor of all gradients, from their joint norm; None without clipping. Default: None.
        averaging: whether m accumulates (1-β₁)g instead of g. Default: True.
        corrected: whether m and v are corrected for their start at zero. Default: True.
        trust_clip: whether r is limited to at most 1. Default: False.
        adapts: whether r is used; if not, r = 1. timm adapts weights with decay. Default: True.
        caution: whether A is masked, see :class:`CautiousRule`. Default: False.
        folded: whether the corrections come last, as in timm's foreach implementation. Default: False.
    """

    clip: Tensor | None = None
    averaging: bool = True
    corrected: bool = True
    trust_clip: bool = False
    adapts: bool = True
    caution: bool = False
    folded: bool = False

    @property
    def _corrections(self) -> tuple[Scalar, Scalar]:
        """The divisors that turn m into m̂ and v into v̂."""
        beta1, beta2 = self.betas
        return (1 - beta1**self.step, 1 - beta2**self.step) if self.corrected else (1.0, 1.0)

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return the parts G, M and Λ."""
        own = gradient if self.clip is None else gradient / self.clip
        ratio: Tensor | float = self._ratio(weight, own, *state) if self.adapts else 1.0
        w, g, *states = (tensor.to(wide_dtype(weight.device)) for tensor in (weight, own, *state))
        first, second = states or (None, None)
        beta1, beta2 = self.betas
        for_mean, for_square = self._corrections
        by = ((average(second, g.square(), beta2) / for_square).sqrt() + self.eps) * for_mean
        share = 1 - beta1 if self.averaging else 1.0
        parts = StepParts(g * share / by, None if first is None else first * beta1 / by)
        parts = masked(parts, g) if self.caution else parts
        decay = w * self.coupled if self.coupled else None
        return Direction(scaled(parts._replace(weight_decay=decay), self.lr * ratio))

    def _ratio(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Tensor:
        """Return r, by the optimizer's operations in its precision: rounding depends on the order of sums."""
        first, second = (tensor.clone() for tensor in zeros_if_new(state, weight, 2))
        beta1, beta2 = self.betas
        for_mean, for_square = self._corrections
        first = first.lerp_(gradient, 1 - beta1) if self.averaging else first.mul_(beta1).add_(gradient)
        second = second.mul_(beta2).addcmul_(gradient, gradient, value=float(1 - beta2))
        scale: Scalar = for_square**0.5 / for_mean if self.folded else 1.0
        if self.folded:
            update = first / second.sqrt().add_(self.eps * for_square**0.5)
        else:
            update = (first / for_mean).div_((second.sqrt() / for_square**0.5).add_(self.eps))
        if self.caution:
            update = masked(StepParts(update), gradient).gradient
        if self.decoupled and self.weight_decay:
            weight = weight.add(weight, alpha=float(-self.lr * self.weight_decay))
        elif self.weight_decay:
            update = update.add(weight, alpha=float(self.weight_decay / scale))
        length, size = own_norm(weight), own_norm(update) * scale
        ratio = torch.where((length > 0) & (size > 0), length / size, 1.0)
        return ratio.clamp_max(1.0) if self.trust_clip else ratio


def _lars(group: Group, state: State, dtype: torch.dtype) -> Described:
    buffer = state.get("momentum_buffer") if group["momentum"] else None
    names = ("momentum", "dampening", "nesterov")
    sgd = SGDRule(lr=scalar(group["lr"]), **{name: group[name] for name in names}, first=buffer is None)
    rule = LarsRule(
        **shared(group, dtype),
        sgd=sgd,
        trust=group["trust_coeff"],
        eps=group["eps"],
        clip=bool(group["trust_clip"]),
        adapts=bool(group["weight_decay"] != 0 or group["always_adapt"]),
    )
    return rule, () if buffer is None else (buffer,)


def _lamb(group: Group, state: State, dtype: torch.dtype) -> Described:
    (parameter,) = group["params"]
    decoupled = bool(group.get("decoupled_decay", False))
    numbers = with_decoupled_decay(group if decoupled else {**group, "corrected_weight_decay": False}, dtype, True)
    foreach = group.get("foreach")
    by_device = parameter.is_cuda and not isinstance(group["lr"], Tensor)
    rule = LambRule(
        **{**numbers, "decoupled": decoupled},
        **{**moments(group, {}), "step": scalar(group.get("step", 0) + 1)},
        clip=group["clip"],
        averaging=bool(group["grad_averaging"]),
        corrected=bool(group["bias_correction"]),
        trust_clip=bool(group["trust_clip"]),
        adapts=bool(group["weight_decay"] != 0 or group["always_adapt"]),
        caution=bool(group.get("caution", False)),
        folded=(by_device if foreach is None else bool(foreach)) and dtype != torch.float16,
    )
    return rule, averages(state, *ADAM_STATE)


_clips: WeakKeyDictionary[Optimizer, tuple[list[Any], Tensor]] = WeakKeyDictionary()
"""For each optimizer the last divisor of :func:`_clip`, and the steps, identities and versions of its gradients."""


def _clip(optimizer: Optimizer) -> Tensor | None:
    """Return the divisor of LAMB's gradient clipping, or None without clipping.

    It is computed once per step, for all weights: while no gradient changes, the last value is returned again.
    """
    limit = optimizer.defaults["max_grad_norm"]
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if limit is None or not gradients:
        return None
    # the gradients of another step may get the same identities
    steps = [group.get("step", 0) for group in optimizer.param_groups]
    seen: list[Any] = [step._version if isinstance(step, Tensor) else step for step in steps]
    seen += [(id(gradient), gradient._version) for gradient in gradients]
    if optimizer not in _clips or _clips[optimizer][0] != seen:
        norms = torch.stack(torch._foreach_norm(gradients))
        _clips[optimizer] = seen, (torch.linalg.vector_norm(norms) / limit).clamp_(min=1.0)
    return _clips[optimizer][1]


RECIPES: dict[str, Recipe] = {
    "timm.optim.lars.Lars": recipe(
        _lars, "lr momentum dampening weight_decay nesterov trust_coeff eps trust_clip always_adapt"
    ),
    "timm.optim.lamb.Lamb": recipe(
        _lamb,
        f"{TIMM_OPTIONS} bias_correction grad_averaging max_grad_norm trust_clip always_adapt decoupled_decay",
        clip=_clip,
    ),
}
