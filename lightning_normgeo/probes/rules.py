"""From a torch optimizer to the update rule that explains its norm increments."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_normgeo.geometry.increments import AdamRule, SGDRule, UpdateRule
from lightning_normgeo.geometry.rows import wide_dtype

Group = dict[str, Any]
State = dict[str, Any]
Described = tuple[UpdateRule, tuple[Tensor, ...]]


def describe_update(
    optimizer: Optimizer, group: Group, state: State, dtype: torch.dtype = torch.float64
) -> Described | None:
    """Return the rule of one parameter's next update, and the optimizer state it reads, before the step.

    Args:
        optimizer: torch's SGD, Adam or AdamW, or a subclass that keeps their ``step``.
        group: the parameter group, read now: a scheduler changes ``lr`` right after the step.
        state: ``optimizer.state[parameter]`` before the step; empty at the first.
        dtype: what the parameter is stored in.

    Returns:
        The rule and its state tensors, or None for an optimizer whose increments have no known decomposition.
    """
    step = inspect.unwrap(type(optimizer).step)
    for kind, describe in _DESCRIPTIONS.items():
        if isinstance(optimizer, kind) and step is inspect.unwrap(kind.step):
            return describe(optimizer, group, state, dtype)
    return None


def scalar(value: float | Tensor) -> float | Tensor:
    """Return a hyperparameter that may be a tensor, as torch allows, in wide precision and as it is now."""
    if not isinstance(value, Tensor):
        return value
    return float(value) if value.device.type == "cpu" else value.detach().to(wide_dtype(value.device), copy=True)


def _describe_sgd(optimizer: Optimizer, group: Group, state: State, dtype: torch.dtype) -> Described:
    del optimizer, dtype
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


def _describe_adam(optimizer: Optimizer, group: Group, state: State, dtype: torch.dtype) -> Described:
    if not state:  # torch creates it, as zeros, inside the first step
        return _adam_rule(optimizer, group, 1.0, dtype), ()
    averages = [state["exp_avg"], state["exp_avg_sq"]]
    if group["amsgrad"]:
        averages.append(state["max_exp_avg_sq"])
    return _adam_rule(optimizer, group, state["step"] + 1, dtype), tuple(averages)


def _adam_rule(optimizer: Optimizer, group: Group, step: float | Tensor, dtype: torch.dtype) -> AdamRule:
    return AdamRule(
        lr=scalar(group["lr"]),
        betas=(scalar(group["betas"][0]), scalar(group["betas"][1])),
        eps=group["eps"],
        weight_decay=group["weight_decay"],
        decoupled=group.get("decoupled_weight_decay", isinstance(optimizer, AdamW)),
        maximize=group["maximize"],
        step=scalar(step),
        dtype=dtype,
    )


_DESCRIPTIONS: dict[type[Optimizer], Callable[[Optimizer, Group, State, torch.dtype], Described]] = {
    SGD: _describe_sgd,
    AdamW: _describe_adam,
    Adam: _describe_adam,
}
