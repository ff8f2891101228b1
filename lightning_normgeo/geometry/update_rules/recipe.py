"""Descriptions of optimizers: from a parameter group and a state to an update rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normgeo.geometry.increments.increment_terms import Scalar, UpdateRule
from lightning_normgeo.geometry.rows import wide_dtype
from lightning_normgeo.geometry.update_rules.elementwise import arithmetic_dtype

Group = dict[str, Any]
State = dict[str, Any]
Described = tuple[UpdateRule, tuple[Tensor, ...]]
_NEUTRAL = frozenset({"params", "foreach", "fused", "capturable", "differentiable", "initial_lr"})
"""Options that say how a step is computed, and not which."""


class Describe(Protocol):
    """Tells the rule of one parameter's next update, and the optimizer state it reads, before the step."""

    def __call__(self, group: Group, state: State, dtype: torch.dtype) -> Described | None:
        """Return the rule and the tensors that its ``parts`` get, each of the parameter's shape; None if unknown.

        Args:
            group: the parameter group, read now: a scheduler changes ``lr`` right after the step.
            state: ``optimizer.state[parameter]`` before the step; usually empty at the first.
            dtype: what the parameter is stored in.
        """


@dataclass(frozen=True)
class Recipe:
    """A description of somebody's optimizer that says for which of its options it holds.

    Attributes:
        describe: gets the group with all options, what ``reads`` finds, and only the one parameter that it is about.
        options: which of them it understands.
        reads: what it has to know of the optimizer itself.
        refuses: options that only a group can have, which change the step when they are set.
        always_decoupled: whether the class multiplies W with 1 - ηλ whatever its options are.
    """

    describe: Describe
    options: frozenset[str]
    reads: Mapping[str, Callable[[Optimizer], Any]] = field(default_factory=dict)
    refuses: frozenset[str] = frozenset()
    always_decoupled: bool = False

    def __call__(self, group: Group, state: State, dtype: torch.dtype) -> Described | None:
        """Describe an update of a group that is covered."""
        return self.describe(group, state, dtype)

    def covers(self, optimizer: Optimizer, group: Group) -> bool:
        """Whether all options are understood; one that a later version has brought may stay switched off."""
        unknown = (set(optimizer.defaults) | self.refuses) - self.options - _NEUTRAL
        return not any(_is_set(group.get(name, optimizer.defaults.get(name))) for name in unknown)

    def view(self, optimizer: Optimizer, group: Group, parameter: Tensor | None) -> Group:
        """Return the group that ``describe`` gets."""
        own = {name: read(optimizer) for name, read in self.reads.items()}
        return {**group, "params": [] if parameter is None else [parameter], **own}


def recipe(
    describe: Describe,
    options: str,
    refuses: str = "",
    always_decoupled: bool = False,
    **reads: Callable[[Optimizer], Any],
) -> Recipe:
    """Return a :class:`Recipe` from names of options that are separated by spaces."""
    return Recipe(describe, frozenset(options.split()), reads, frozenset(refuses.split()), always_decoupled)


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and not (isinstance(value, (int, float)) and value == 0)


def scalar(value: float | Tensor) -> float | Tensor:
    """Return a hyperparameter that may be a tensor, as torch allows, in wide precision and as it is now."""
    if not isinstance(value, Tensor):
        return value
    return float(value) if value.device.type == "cpu" else value.detach().to(wide_dtype(value.device), copy=True)


def shared(group: Group, dtype: torch.dtype) -> dict[str, Any]:
    """Return what all elementwise rules have."""
    lr, exact = group["lr"], arithmetic_dtype(dtype)
    return {
        "lr": scalar(lr),
        "weight_decay": scalar(group["weight_decay"]),
        "decoupled": bool(group.get("decoupled_weight_decay", False)),
        "maximize": bool(group.get("maximize", False)),
        # torch computes 1 - ηλ in the dtype of a tensor η, then rounds it to the weight's: the coarser one is left
        "dtype": max(exact, lr.dtype, key=lambda d: torch.finfo(d).eps) if isinstance(lr, Tensor) else exact,
    }


def pair(betas: tuple[Any, ...]) -> tuple[Scalar, Scalar]:
    """Return (β₁, β₂)."""
    return scalar(betas[0]), scalar(betas[1])


def moments(group: Group, state: State) -> dict[str, Any]:
    """Return what Adam and its relatives have; torch creates the state, as zeros, inside the first step."""
    step = state["step"] + 1 if state else 1.0
    if not (group.get("capturable") or group.get("differentiable")) or group.get("fused"):
        step = scalar(step)
    elif not isinstance(step, Tensor):  # there β^t is a tensor of float32, and 1 - β^t has few digits at first
        step = torch.tensor(step, dtype=scalar_dtype())
    return {"betas": pair(group["betas"]), "eps": group["eps"], "step": step}


def scalar_dtype() -> torch.dtype:
    """Return what torch keeps numbers of a state in."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def averages(state: State, *names: str) -> tuple[Tensor, ...]:
    """Return the tensors of a state; none before there is one."""
    return tuple(state[name] for name in names) if state else ()
