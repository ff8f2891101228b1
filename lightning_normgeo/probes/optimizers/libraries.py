"""Descriptions of optimizers of timm, adamp and pytorch-optimizer, by the names of their classes."""

from __future__ import annotations

import math
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normgeo.geometry.norm_increments import SGDRule
from lightning_normgeo.geometry.update_rules.adam_family import AdamRule
from lightning_normgeo.geometry.update_rules.elementwise import ElementwiseRule
from lightning_normgeo.geometry.update_rules.layerwise import LambRule, LarsRule, MarsRule
from lightning_normgeo.geometry.update_rules.projected import AdamPRule, SGDPRule
from lightning_normgeo.geometry.update_rules.variants import AdEMAMixRule, AdoptRule, LaPropRule, NAdamWRule, SGDWRule
from lightning_normgeo.probes.optimizers.lion import LIONS, corrected, with_caution
from lightning_normgeo.probes.optimizers.recipe import (
    Describe,
    Described,
    Group,
    Recipe,
    State,
    averages,
    moments,
    pair,
    recipe,
    scalar,
    scalar_dtype,
    shared,
)

_ADAM = ("exp_avg", "exp_avg_sq")


def _decoupled(group: Group, dtype: torch.dtype, subtracted: bool = False) -> dict[str, Any]:
    """Return what all rules have, decay being outside the gradient; ``subtracted`` as ηλW, and not W times s."""
    found = shared({**corrected(group), "decoupled_weight_decay": True}, dtype)
    return found | {"dtype": torch.float64} if subtracted else found


def _adamw(rule: type[AdamRule]) -> Describe:
    def describe(group: Group, state: State, dtype: torch.dtype) -> Described:
        names = [*_ADAM, *["max_exp_avg_sq"] * bool(group.get("amsgrad"))]
        described = rule(**_decoupled(group, dtype), **moments(group, state))
        return with_caution(described, group), averages(state, *names)

    return describe


def _sgdw(group: Group, state: State, dtype: torch.dtype) -> Described:
    momentum, buffer = group["momentum"], state.get("momentum_buffer")
    rule: ElementwiseRule = SGDWRule(
        **_decoupled(group, dtype), momentum=momentum, dampening=group["dampening"], nesterov=bool(group["nesterov"])
    )
    if not momentum:
        return SGDWRule(**_decoupled(group, dtype)), ()  # nor any caution
    return with_caution(rule, group), () if buffer is None else (buffer,)


def _adopt(group: Group, state: State, dtype: torch.dtype) -> Described:
    step, exponent = scalar(state["step"] + 1 if state else 1.0), group["clip_exp"]
    numbers = _decoupled(group if group["decoupled"] else {**group, "corrected_weight_decay": False}, dtype, True)
    rule = AdoptRule(
        **{**numbers, "decoupled": bool(group["decoupled"] and state)},
        **moments(group, state),
        bound=None if exponent is None or not state else (step - 1) ** exponent,
    )
    return with_caution(rule, group), averages(state, *_ADAM)


def _laprop(group: Group, state: State, dtype: torch.dtype) -> Described:
    numbers, (beta1, beta2) = _decoupled(group, dtype, True), group["betas"]
    mean_lr = scalar(state["exp_avg_lr_1"] if state else 0.0) * beta1 + (1 - beta1) * numbers["lr"]
    start = torch.zeros((), dtype=scalar_dtype())
    rule = LaPropRule(
        **numbers,
        **moments(group, state),
        size=numbers["lr"] / mean_lr if mean_lr != 0 else 0.0,
        correction=scalar((state["exp_avg_lr_2"] if state else start) * beta2 + (1 - beta2)),
    )
    return with_caution(rule, group), averages(state, *_ADAM)


def _adamp(group: Group, state: State, dtype: torch.dtype) -> Described:
    rule = AdamPRule(
        **_decoupled(group, dtype),
        **moments(group, state),
        delta=group["delta"],
        ratio=group["wd_ratio"],
        nesterov=bool(group["nesterov"]),
        caution=bool(group.get("caution", False)),
    )
    return rule, averages(state, *_ADAM)


def _sgdp(group: Group, state: State, dtype: torch.dtype) -> Described:
    rule = SGDPRule(
        **_decoupled(group, dtype),
        momentum=group["momentum"],
        dampening=group["dampening"],
        nesterov=bool(group["nesterov"]),
        delta=group["delta"],
        ratio=group["wd_ratio"],
        eps=group["eps"],
        caution=bool(group.get("caution", False)),
    )
    return rule, averages(state, "momentum")


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
    numbers = _decoupled(group if decoupled else {**group, "corrected_weight_decay": False}, dtype, True)
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
    return rule, averages(state, *_ADAM)


_clips: WeakKeyDictionary[Optimizer, tuple[list[tuple[int, int]], Tensor]] = WeakKeyDictionary()


def _clip(optimizer: Optimizer) -> Tensor | None:
    """Return what LAMB divides all gradients by; once for all weights of a step, that is while no gradient changes."""
    limit = optimizer.defaults["max_grad_norm"]
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if limit is None or not gradients:
        return None
    seen = [(id(gradient), gradient._version) for gradient in gradients]
    if optimizer not in _clips or _clips[optimizer][0] != seen:
        norms = torch.stack(torch._foreach_norm(gradients))
        _clips[optimizer] = seen, (torch.linalg.vector_norm(norms) / limit).clamp_(min=1.0)
    return _clips[optimizer][1]


def _mars(group: Group, state: State, dtype: torch.dtype) -> Described:
    (parameter,) = group["params"]
    mixed = group["optimize_1d"] or parameter.ndim >= 2
    seen = group if mixed else {**group, "lr": group["lr"] * group["lr_1d_factor"], "betas": group["betas_1d"]}
    rule = MarsRule(
        **_decoupled(seen, dtype, True),
        **moments(seen, state),
        gamma=group["gamma"] if mixed else None,
        sign=bool(mixed and group["mars_type"] == "lion"),
        caution=bool(group.get("caution", False)),
    )
    return rule, averages(state, *_ADAM, "last_grad")


def _ademamix(group: Group, state: State, dtype: torch.dtype) -> Described | None:
    if group.get("fixed_decay") and group["weight_decay"]:
        return None  # 1 - λ, whatever η is
    step, warmup = group.get("step", 0) + 1, group["t_alpha_beta3"]
    (beta1, _, slow), alpha = group["betas"], group["alpha"]
    if warmup is not None:
        share, fast, late = step / warmup, math.log(beta1), math.log(slow)
        alpha = min(share * alpha, alpha)
        slow = min(math.exp(fast * late / ((1.0 - share) * late + share * fast)), slow)
    rule = AdEMAMixRule(
        **{**shared(group, dtype), "decoupled": bool(group["weight_decouple"])},
        betas=pair(group["betas"]),
        eps=group["eps"],
        step=step,
        alpha=alpha,
        slow=slow,
    )
    return rule, averages(state, *_ADAM, "exp_avg_slow")


_TIMM = "lr betas eps weight_decay maximize caution corrected_weight_decay max_lr_snapshot"
_PROJECTED = "lr eps weight_decay delta wd_ratio nesterov caution"
BY_NAME: dict[str, Recipe] = {
    **LIONS,
    "timm.optim.adamw.AdamWLegacy": recipe(_adamw(AdamRule), f"{_TIMM} amsgrad"),
    "timm.optim.nadamw.NAdamW": recipe(_adamw(NAdamWRule), _TIMM),
    "timm.optim.sgdw.SGDW": recipe(_sgdw, f"{_TIMM} momentum dampening nesterov"),
    "timm.optim.adopt.Adopt": recipe(_adopt, f"{_TIMM} clip_exp decoupled"),
    "timm.optim.laprop.LaProp": recipe(_laprop, _TIMM),
    "timm.optim.adamp.AdamP": recipe(_adamp, f"{_PROJECTED} betas"),
    "timm.optim.sgdp.SGDP": recipe(_sgdp, f"{_PROJECTED} momentum dampening"),
    "timm.optim.lars.Lars": recipe(
        _lars, "lr momentum dampening weight_decay nesterov trust_coeff eps trust_clip always_adapt"
    ),
    "timm.optim.lamb.Lamb": recipe(
        _lamb,
        f"{_TIMM} bias_correction grad_averaging max_grad_norm trust_clip always_adapt decoupled_decay",
        clip=_clip,
    ),
    "timm.optim.mars.Mars": recipe(
        _mars, "lr betas eps weight_decay gamma mars_type optimize_1d lr_1d_factor betas_1d caution"
    ),
    "pytorch_optimizer.optimizer.ademamix.AdEMAMix": recipe(
        _ademamix,
        "lr betas weight_decay weight_decouple fixed_decay alpha t_alpha_beta3 eps",
        refuses="cautious stable_adamw",
        maximize=attrgetter("maximize"),
    ),
}
