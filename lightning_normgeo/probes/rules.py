"""From an optimizer to the update rule that explains its norm increments: a registry that users can extend."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry.adaptive import (
    AdagradRule,
    AdamaxRule,
    AdamRule,
    LionRule,
    NAdamRule,
    RAdamRule,
    RMSpropRule,
)
from lightning_normgeo.geometry.increments import SGDRule, UpdateRule
from lightning_normgeo.geometry.rows import wide_dtype

Group = dict[str, Any]
State = dict[str, Any]
Described = tuple[UpdateRule, tuple[Tensor, ...]]


class Describe(Protocol):
    """Tells the rule of one parameter's next update, and the optimizer state it reads, before the step."""

    def __call__(self, group: Group, state: State, dtype: torch.dtype) -> Described | None:
        """Return the rule and the tensors that its ``parts`` get, each of the parameter's shape; None if unknown.

        Args:
            group: the parameter group, read now: a scheduler changes ``lr`` right after the step.
            state: ``optimizer.state[parameter]`` before the step; usually empty at the first.
            dtype: what the parameter is stored in.
        """


def register_optimizer(optimizer: type[Optimizer], describe: Describe) -> None:
    """Explain the increments of an optimizer of your own, in every monitor.

    The registered rule holds for the class and for subclasses that keep its ``step``. Registering a class again
    replaces its rule.

    Args:
        optimizer: the class.
        describe: returns the rule of a parameter's next update, such as
            :class:`~lightning_normgeo.geometry.LionRule` or an
            :class:`~lightning_normgeo.geometry.ElementwiseRule` of your own, and the state it reads.

    Raises:
        ConfigurationError: if ``optimizer`` is not a class of optimizers.

    Example:
        >>> class Lion(torch.optim.Optimizer):
        ...     pass  # with state["exp_avg"], as in lion-pytorch
        >>> register_optimizer(Lion, describe_lion)
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise ConfigurationError(
            f"register_optimizer({optimizer!r}): give the class, derived from torch.optim.Optimizer, not an instance."
        )
    _DESCRIPTIONS[optimizer] = describe


def describe_update(
    optimizer: Optimizer, group: Group, state: State, dtype: torch.dtype = torch.float64
) -> Described | None:
    """Return the rule of one parameter's next update, and the optimizer state it reads, before the step.

    Args:
        optimizer: any; known are torch's SGD, Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad and Adamax, what
            :func:`register_optimizer` added, and subclasses that keep their ``step``.
        group: the parameter group.
        state: ``optimizer.state[parameter]``.
        dtype: what the parameter is stored in.

    Returns:
        The rule and its state tensors, or None for an optimizer whose increments have no known decomposition.
    """
    describe = description_of(type(optimizer))
    return None if describe is None else describe(group, state, dtype)


def description_of(kind: type[Optimizer]) -> Describe | None:
    """Return what describes a class of optimizers: its own entry, or that of the nearest base whose step it keeps."""
    for base in kind.__mro__:
        if base in _DESCRIPTIONS:
            same = inspect.unwrap(kind.step) is inspect.unwrap(base.step)
            return _DESCRIPTIONS[base] if same else None
    return None


def scalar(value: float | Tensor) -> float | Tensor:
    """Return a hyperparameter that may be a tensor, as torch allows, in wide precision and as it is now."""
    if not isinstance(value, Tensor):
        return value
    return float(value) if value.device.type == "cpu" else value.detach().to(wide_dtype(value.device), copy=True)


def _describe_sgd(group: Group, state: State, dtype: torch.dtype) -> Described:
    del dtype
    buffer = state.get("momentum_buffer") if group["momentum"] else None
    rule = SGDRule(
        lr=scalar(group["lr"]),
        momentum=group["momentum"],
        dampening=group["dampening"],
        weight_decay=group["weight_decay"],
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        first=buffer is None,
    )
    return rule, () if buffer is None else (buffer,)


def _shared(group: Group, dtype: torch.dtype) -> dict[str, Any]:
    """Return what all elementwise rules have."""
    lr = group["lr"]
    return {
        "lr": scalar(lr),
        "weight_decay": group["weight_decay"],
        "decoupled": group.get("decoupled_weight_decay", False),
        "maximize": group.get("maximize", False),
        # torch computes 1 - ηλ in the dtype of a tensor η, then rounds it to the weight's: the coarser one is left
        "dtype": max(dtype, lr.dtype, key=lambda d: torch.finfo(d).eps) if isinstance(lr, Tensor) else dtype,
    }


def _moments(group: Group, state: State) -> dict[str, Any]:
    """Return what Adam and its relatives have; torch creates the state, as zeros, inside the first step."""
    betas = (scalar(group["betas"][0]), scalar(group["betas"][1]))
    return {"betas": betas, "eps": group["eps"], "step": scalar(state["step"] + 1 if state else 1.0)}


def _describe_adam(group: Group, state: State, dtype: torch.dtype) -> Described:
    names = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * bool(group["amsgrad"])] if state else []
    return AdamRule(**_shared(group, dtype), **_moments(group, state)), tuple(state[name] for name in names)


def _describe_nadam(group: Group, state: State, dtype: torch.dtype) -> Described:
    # torch keeps Π μ in float32, even for float64 weights
    fresh = torch.ones((), dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
    product = state["mu_product"].clone() if state else fresh
    rule = NAdamRule(
        **_shared(group, dtype), **_moments(group, state), momentum_decay=group["momentum_decay"], product=product
    )
    return rule, (state["exp_avg"], state["exp_avg_sq"]) if state else ()


def _describe_radam(group: Group, state: State, dtype: torch.dtype) -> Described:
    rule = RAdamRule(**_shared(group, dtype), **_moments(group, state))
    return rule, (state["exp_avg"], state["exp_avg_sq"]) if state else ()


def _describe_adamax(group: Group, state: State, dtype: torch.dtype) -> Described:
    rule = AdamaxRule(**_shared(group, dtype), **_moments(group, state))
    return rule, (state["exp_avg"], state["exp_inf"]) if state else ()


def _describe_rmsprop(group: Group, state: State, dtype: torch.dtype) -> Described:
    shared = {name: group[name] for name in ("alpha", "eps", "momentum", "centered")}
    names = ["square_avg", *["momentum_buffer"] * (group["momentum"] > 0), *["grad_avg"] * group["centered"]]
    return RMSpropRule(**_shared(group, dtype), **shared), tuple(state[name] for name in names) if state else ()


def _describe_adagrad(group: Group, state: State, dtype: torch.dtype) -> Described:
    step = scalar(state["step"] + 1)
    rule = AdagradRule(**_shared(group, dtype), lr_decay=group["lr_decay"], eps=group["eps"], step=step)
    return rule, (state["sum"],)


def describe_lion(group: Group, state: State, dtype: torch.dtype) -> Described:
    """Describe Lion as published, and as in lion-pytorch, for :func:`register_optimizer`.

    Reads ``lr``, ``betas`` and ``weight_decay`` from the group and ``exp_avg`` from the state; decay is decoupled.
    """
    betas = (scalar(group["betas"][0]), scalar(group["betas"][1]))
    rule = LionRule(**{**_shared(group, dtype), "decoupled": True}, betas=betas)
    return rule, (state["exp_avg"],) if "exp_avg" in state else ()


_DESCRIPTIONS: dict[type[Optimizer], Describe] = {
    SGD: _describe_sgd,
    Adam: _describe_adam,
    AdamW: lambda group, state, dtype: _describe_adam({"decoupled_weight_decay": True, **group}, state, dtype),
    NAdam: _describe_nadam,
    RAdam: _describe_radam,
    RMSprop: _describe_rmsprop,
    Adagrad: _describe_adagrad,
    Adamax: _describe_adamax,
}
