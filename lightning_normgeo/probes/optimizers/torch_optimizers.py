"""Descriptions of the optimizers of torch; LBFGS and SparseAdam have none."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop, Rprop

from lightning_normgeo.geometry.norm_increments import SGDRule
from lightning_normgeo.geometry.update_rules.adam_family import (
    AdagradRule,
    AdamaxRule,
    AdamRule,
    NAdamRule,
    RAdamRule,
    RMSpropRule,
)
from lightning_normgeo.geometry.update_rules.layerwise import AdafactorRule
from lightning_normgeo.geometry.update_rules.projected import MuonRule
from lightning_normgeo.geometry.update_rules.variants import AdadeltaRule, ASGDRule, RpropRule
from lightning_normgeo.probes.optimizers.recipe import (
    Described,
    Group,
    Recipe,
    State,
    averages,
    moments,
    recipe,
    scalar,
    scalar_dtype,
    shared,
)


def _sgd(group: Group, state: State, dtype: torch.dtype) -> Described:
    del dtype
    buffer = state.get("momentum_buffer") if group["momentum"] else None
    numbers: dict[str, Any] = {name: scalar(group[name]) for name in ("lr", "momentum", "dampening", "weight_decay")}
    flags = {name: bool(group[name]) for name in ("nesterov", "maximize")}
    return SGDRule(**numbers, **flags, first=buffer is None), () if buffer is None else (buffer,)


def _adam(group: Group, state: State, dtype: torch.dtype) -> Described:
    names = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * bool(group["amsgrad"])]
    return AdamRule(**shared(group, dtype), **moments(group, state)), averages(state, *names)


def _adamw(group: Group, state: State, dtype: torch.dtype) -> Described:
    return _adam({"decoupled_weight_decay": True, **group}, state, dtype)


def _nadam(group: Group, state: State, dtype: torch.dtype) -> Described:
    # torch keeps Π μ in float32, even for float64 weights
    product = state["mu_product"].clone() if state else torch.ones((), dtype=scalar_dtype())
    rule = NAdamRule(
        **shared(group, dtype), **moments(group, state), momentum_decay=group["momentum_decay"], product=product
    )
    return rule, averages(state, "exp_avg", "exp_avg_sq")


def _radam(group: Group, state: State, dtype: torch.dtype) -> Described:
    return RAdamRule(**shared(group, dtype), **moments(group, state)), averages(state, "exp_avg", "exp_avg_sq")


def _adamax(group: Group, state: State, dtype: torch.dtype) -> Described:
    return AdamaxRule(**shared(group, dtype), **moments(group, state)), averages(state, "exp_avg", "exp_inf")


def _rmsprop(group: Group, state: State, dtype: torch.dtype) -> Described:
    numbers: dict[str, Any] = {name: scalar(group[name]) for name in ("alpha", "eps", "momentum")}
    names = ["square_avg", *["momentum_buffer"] * (group["momentum"] > 0), *["grad_avg"] * bool(group["centered"])]
    rule = RMSpropRule(**shared(group, dtype), **numbers, centered=bool(group["centered"]))
    return rule, averages(state, *names)


def _adagrad(group: Group, state: State, dtype: torch.dtype) -> Described:
    step = scalar(state["step"] + 1 if state else 1.0)
    rule = AdagradRule(**shared(group, dtype), lr_decay=group["lr_decay"], eps=group["eps"], step=step)
    if state:
        return rule, (state["sum"],)
    (parameter,) = group["params"]  # of a group that was added later: torch creates its state inside the step
    start = group["initial"]
    value = complex(start, start) if parameter.is_complex() else start
    return rule, (torch.full_like(parameter, value, requires_grad=False),)


def _adadelta(group: Group, state: State, dtype: torch.dtype) -> Described:
    rule = AdadeltaRule(**shared(group, dtype), rho=scalar(group["rho"]), eps=group["eps"])
    return rule, averages(state, "square_avg", "acc_delta")


def _rprop(group: Group, state: State, dtype: torch.dtype) -> Described | None:
    if dtype == torch.float16:
        return None  # products of two gradients, whose sign is asked for, underflow
    rule = RpropRule(
        **shared({"weight_decay": 0.0, **group}, dtype), etas=group["etas"], sizes=tuple(group["step_sizes"])
    )
    return rule, averages(state, "prev", "step_size")


def _asgd(group: Group, state: State, dtype: torch.dtype) -> Described:
    rate = state["eta"] if state else torch.tensor(float(group["lr"]), dtype=scalar_dtype())
    rule = ASGDRule(**{**shared(group, dtype), "lr": scalar(rate)}, decay_term=scalar(group["lambd"]))
    return rule, ()


def _adafactor(group: Group, state: State, dtype: torch.dtype) -> Described:
    (parameter,) = group["params"]
    eps = group["eps"][0]
    rule = AdafactorRule(
        **shared({**group, "decoupled_weight_decay": True}, dtype),
        decay=group["beta2_decay"],
        eps=(torch.finfo(dtype).eps if eps is None else eps, group["eps"][1]),
        clip=group["d"],
        step=scalar(state["step"] + 1 if state else 1.0),
    )
    return rule, averages(state, *(["row_var", "col_var"] if parameter.ndim > 1 else ["variance"]))


def _muon(group: Group, state: State, dtype: torch.dtype) -> Described | None:
    (parameter,) = group["params"]
    rows, columns = parameter.shape
    adjusted = {
        None: math.sqrt(max(1, rows / columns)),
        "original": math.sqrt(max(1, rows / columns)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        "spectral_unclamped": math.sqrt(rows / columns),
    }.get(group["adjust_lr_fn"])
    if adjusted is None:
        return None
    rule = MuonRule(
        **shared({**group, "decoupled_weight_decay": True}, dtype),
        momentum=scalar(group["momentum"]),
        nesterov=bool(group["nesterov"]),
        coefficients=tuple(group["ns_coefficients"]),
        iterations=group["ns_steps"],
        eps=group["eps"],
        adjusted=adjusted,
    )
    return rule, averages(state, "momentum_buffer")


_ADAM = "lr betas eps weight_decay amsgrad maximize decoupled_weight_decay"
_RELATIVE = "lr betas eps weight_decay maximize decoupled_weight_decay"
OF_TORCH: dict[type[Optimizer], Recipe] = {
    SGD: recipe(_sgd, "lr momentum dampening weight_decay nesterov maximize"),
    Adam: recipe(_adam, _ADAM),
    AdamW: recipe(_adamw, _ADAM),
    NAdam: recipe(_nadam, f"{_RELATIVE} momentum_decay"),
    RAdam: recipe(_radam, _RELATIVE),
    RMSprop: recipe(_rmsprop, "lr alpha eps weight_decay momentum centered maximize"),
    Adagrad: recipe(
        _adagrad,
        "lr lr_decay weight_decay eps initial_accumulator_value maximize",
        initial=lambda optimizer: optimizer.defaults["initial_accumulator_value"],
    ),
    Adamax: recipe(_adamax, _RELATIVE),
    Adadelta: recipe(_adadelta, "lr rho eps weight_decay maximize"),
    Rprop: recipe(_rprop, "lr etas step_sizes maximize"),
    ASGD: recipe(_asgd, "lr lambd alpha t0 weight_decay maximize"),
}
_MUON = recipe(_muon, "lr weight_decay momentum nesterov ns_coefficients eps ns_steps adjust_lr_fn")
_ADAFACTOR = recipe(_adafactor, "lr beta2_decay eps d weight_decay maximize")
NEWER_IN_TORCH: dict[str, Recipe] = {
    "torch.optim.Muon": _MUON,
    "torch.optim._muon.Muon": _MUON,
    "torch.optim.Adafactor": _ADAFACTOR,
    "torch.optim._adafactor.Adafactor": _ADAFACTOR,
}
"""By name, which has changed: not every version has them."""
