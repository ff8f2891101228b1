"""Descriptions of optimizers, which turn a parameter group and an optimizer state into an update rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_normgeo.geometry.increments.increment_terms import Scalar, UpdateRule
from lightning_normgeo.geometry.update_rules.device_scalars import copies_of
from lightning_normgeo.geometry.update_rules.elementwise import arithmetic_dtype

Group = dict[str, Any]
State = dict[str, Any]
Described = tuple[UpdateRule, tuple[Tensor, ...]]
_NEUTRAL = frozenset({"params", "foreach", "fused", "capturable", "differentiable", "initial_lr"})
"""Options that change how a step is computed, but not its result."""


class Describe(Protocol):
    """Protocol of a function that describes one parameter's next update, before the step."""

    def __call__(self, group: Group, state: State, dtype: torch.dtype) -> Described | None:
        """Return the update rule and the state tensors that it reads, or None if the update has no known formula.

        The tensors of an elementwise rule have the shape of the parameter.

        Args:
            group: the parameter group. Read its values in this call: a scheduler changes ``lr`` right after the step.
            state: ``optimizer.state[parameter]`` before the step; usually empty before the first step.
            dtype: the type that the parameter is stored in.
        """


@dataclass(frozen=True)
class Recipe:
    """A description of one class of optimizers, with the options for which it is valid.

    Attributes:
        describe: the description. It gets the group with all options, the values that ``reads`` returns, and in
            ``params`` only the parameter to describe.
        options: names of the options that the description understands.
        reads: functions of the optimizer; their values are added to the group by name.
        refuses: options that are not in ``optimizer.defaults`` and change the step when they are set.
        always_decoupled: whether the class multiplies W with 1 - ηλ whatever its options are.
    """

    describe: Describe
    options: frozenset[str]
    reads: Mapping[str, Callable[[Optimizer], Any]] = field(default_factory=dict)
    refuses: frozenset[str] = frozenset()
    always_decoupled: bool = False

    def __call__(self, group: Group, state: State, dtype: torch.dtype) -> Described | None:
        """Describe the next update of one parameter of a group that :meth:`covers` accepts."""
        return self.describe(group, state, dtype)

    def covers(self, optimizer: Optimizer, group: Group) -> bool:
        """Whether the description understands all options of the group; unknown ones must be switched off."""
        unknown = (set(optimizer.defaults) | self.refuses) - self.options - _NEUTRAL
        return not any(_is_set(group.get(name, optimizer.defaults.get(name))) for name in unknown)

    def view(self, optimizer: Optimizer, group: Group, parameter: Tensor | None) -> Group:
        """Return the group as ``describe`` gets it."""
        own = {name: read(optimizer) for name, read in self.reads.items()}
        return {**group, "params": [] if parameter is None else [parameter], **own}


def recipe(
    describe: Describe,
    options: str,
    refuses: str = "",
    always_decoupled: bool = False,
    **reads: Callable[[Optimizer], Any],
) -> Recipe:
    """Return a :class:`Recipe`; ``options`` and ``refuses`` are names separated by spaces."""
    return Recipe(describe, frozenset(options.split()), reads, frozenset(refuses.split()), always_decoupled)


def _is_set(value: Any) -> bool:
    return value is not None and value is not False and not (isinstance(value, (int, float)) and value == 0)


def scalar(value: float | Tensor) -> float | Tensor:
    """Return the current value of a hyperparameter: a number, or a wide copy of a tensor on an accelerator."""
    if not isinstance(value, Tensor):
        return value
    return float(value) if value.device.type == "cpu" else copies_of(value).wide


def shared(group: Group, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments that all elementwise rules have."""
    lr, exact = group["lr"], arithmetic_dtype(dtype)
    in_its_dtype = isinstance(lr, Tensor) and not group.get("fused")
    return {
        "lr": scalar(lr),
        "weight_decay": scalar(group["weight_decay"]),
        "decoupled": bool(group.get("decoupled_weight_decay", False)),
        "maximize": bool(group.get("maximize", False)),
        # torch computes 1 - ηλ in the dtype of a tensor η, then rounds it to the weight's: the coarser one decides;
        # fused kernels take the number
        "dtype": max(exact, lr.dtype, key=lambda d: torch.finfo(d).eps) if in_its_dtype else exact,
    }


def pair(betas: tuple[Any, ...]) -> tuple[Scalar, Scalar]:
    """Return the pair (β₁, β₂) as numbers or wide tensors."""
    return scalar(betas[0]), scalar(betas[1])


def moments(group: Group, state: State) -> dict[str, Any]:
    """Return the arguments that the rules of Adam and its relatives share.

    The state is empty before the first step, in which torch creates it as zeros.
    """
    # in these modes β^t is a float32 number, so 1 - β^t loses digits in the first steps
    modes = bool(group.get("capturable") or group.get("differentiable")), bool(group.get("fused"))
    narrow = modes == (True, False) or (modes[1] and bool(state) and _rounds_beta(state["step"]))
    step: Scalar = _next_step(state["step"], narrow) if state else 1.0
    if narrow and not isinstance(step, Tensor):
        step = torch.tensor(step, dtype=scalar_dtype())
    return {"betas": pair(group["betas"]), "eps": group["eps"], "step": step}


def _rounds_beta(taken: Any) -> bool:
    """Whether a fused kernel computes β^t in the precision of W, as CUDA's does from torch 2.11 on."""
    return isinstance(taken, Tensor) and taken.device.type == "cuda" and torch.__version__ >= "2.11"


def _next_step(taken: Scalar, narrow: bool) -> Scalar:
    """Return the number of the step that follows; ``narrow`` keeps the dtype of a tensor."""
    if isinstance(taken, Tensor) and not taken.is_cpu:
        copies = copies_of(taken)
        return copies.following if narrow else copies.wide_following
    return taken + 1 if narrow else scalar(taken + 1)


def scalar_dtype() -> torch.dtype:
    """Return the type in which torch stores scalars of an optimizer state."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def averages(state: State, *names: str) -> tuple[Tensor, ...]:
    """Return tensors of an optimizer state by name; none where the state is empty."""
    return tuple(state[name] for name in names) if state else ()
