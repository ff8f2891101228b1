"""Optimizers of torch with a step size for each element, without bias correction: RMSprop, Adagrad, Adadelta, Rprop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.update_rules.elementwise import ElementwiseRule, StepParts, average
from lightning_normgeo.geometry.update_rules.recipe import (
    Described,
    Group,
    Recipe,
    State,
    averages,
    recipe,
    scalar,
    shared,
)


@dataclass(frozen=True, kw_only=True)
class RMSpropRule(ElementwiseRule):
    r"""torch.optim.RMSprop: G = ηg/D with D = √v + ε, or centered D = √(v - ā²) + ε (Tieleman & Hinton 2012).

    With momentum μ the buffer is b = μb⁻ + g̃/D and the step is ηb, so M = ημb⁻. The state before the step is v⁻,
    followed by b⁻ with momentum, and by ā⁻ if centered.

    Args:
        alpha: the decay of the averages. Default: 0.99.
        eps: ε. Default: 1e-8.
        momentum: μ. Default: 0.
        centered: whether the squared mean gradient ā² is subtracted from v. Default: False.
    """

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False
    additive: ClassVar[bool] = True

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts G, M and Λ."""
        rest = list(state)
        second = rest.pop(0) if rest else None
        buffer = rest.pop(0) if rest and self.momentum > 0 else None
        gradient, full = self.full(weight, gradient)
        variance = average(second, full.square(), self.alpha)
        if self.centered:
            variance = variance - average(rest.pop(0) if rest else None, full, self.alpha).square()
        by = variance.sqrt() + self.eps
        parts = self.divided(weight, gradient, None, (self.lr, 0.0), by)
        return parts if buffer is None else parts._replace(momentum=buffer * (self.lr * self.momentum))


@dataclass(frozen=True, kw_only=True)
class AdagradRule(ElementwiseRule):
    r"""torch.optim.Adagrad: G = ηg / ((1 + (t-1)κ)(√Σg̃² + ε)) (Duchi et al. 2011).

    The state is (Σg̃²,) before the step.

    Args:
        lr_decay: κ. Default: 0.
        eps: ε. Default: 1e-10.
        step: number t of this step, from 1.
    """

    lr_decay: float = 0.0
    eps: float = 1e-10
    step: Scalar = 1.0
    additive: ClassVar[bool] = True

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts G, M and Λ."""
        gradient, full = self.full(weight, gradient)
        by = (state[0] + full.square()).sqrt() + self.eps
        return self.divided(weight, gradient, None, (self.lr / (1 + (self.step - 1) * self.lr_decay), 0.0), by)


@dataclass(frozen=True, kw_only=True)
class AdadeltaRule(ElementwiseRule):
    r"""torch.optim.Adadelta: G = ηg √(a⁻+ε)/√(v+ε) (Zeiler 2012). The state is (v⁻, a⁻) before the step.

    Args:
        rho: the decay of the averages. Default: 0.9.
        eps: ε. Default: 1e-6.
    """

    rho: Scalar = 0.9
    eps: float = 1e-6
    additive: ClassVar[bool] = True

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts G and Λ."""
        second, moved = state or (None, torch.zeros_like(weight))
        gradient, full = self.full(weight, gradient)
        by = ((average(second, full.square(), self.rho) + self.eps) / (moved + self.eps)).sqrt()
        return self.divided(weight, gradient, None, (self.lr, 0.0), by)


@dataclass(frozen=True, kw_only=True)
class RpropRule(ElementwiseRule):
    r"""torch.optim.Rprop: G = sign(g) δ with a step size δ for each element (Riedmiller & Braun 1993).

    δ is δ⁻ times η⁺ where g keeps its sign, and δ⁻ times η⁻ where the sign changes; it is then clamped to its range.
    Elements whose sign changes do not move. The state is (g⁻, δ⁻) before the step; δ⁻ = η before the first step.

    Args:
        etas: (η⁻, η⁺). Default: (0.5, 1.2).
        sizes: the smallest and the largest δ. Default: (1e-6, 50).
    """

    etas: tuple[float, float] = (0.5, 1.2)
    sizes: tuple[float, float] = (1e-6, 50.0)
    additive: ClassVar[bool] = True

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the part G."""
        before, size = state or (torch.zeros_like(weight), torch.ones_like(weight) * self.lr)
        gradient, _ = self.full(weight, gradient)
        agrees, shrinks, grows = gradient * before, *self.etas
        size = torch.where(agrees > 0, size * grows, torch.where(agrees < 0, size * shrinks, size))
        return StepParts(torch.where(agrees < 0, 0.0, gradient.sign()) * size.clamp(*self.sizes))


def _rmsprop(group: Group, state: State, dtype: torch.dtype) -> Described:
    numbers: dict[str, Any] = {name: scalar(group[name]) for name in ("alpha", "eps", "momentum")}
    names = ["square_avg"]
    if group["momentum"] > 0:
        names.append("momentum_buffer")
    if group["centered"]:
        names.append("grad_avg")
    rule = RMSpropRule(**shared(group, dtype), **numbers, centered=bool(group["centered"]))
    return rule, averages(state, *names)


def _adagrad(group: Group, state: State, dtype: torch.dtype) -> Described:
    step = scalar(state["step"] + 1 if state else 1.0)
    rule = AdagradRule(**shared(group, dtype), lr_decay=group["lr_decay"], eps=group["eps"], step=step)
    if state:
        return rule, (state["sum"],)
    (parameter,) = group["params"]  # torch creates the state of groups that were added later inside their first step
    start = group["initial"]
    value = complex(start, start) if parameter.is_complex() else start
    return rule, (torch.full_like(parameter, value, requires_grad=False),)


def _adadelta(group: Group, state: State, dtype: torch.dtype) -> Described:
    rule = AdadeltaRule(**shared(group, dtype), rho=scalar(group["rho"]), eps=group["eps"])
    return rule, averages(state, "square_avg", "acc_delta")


def _rprop(group: Group, state: State, dtype: torch.dtype) -> Described | None:
    if dtype == torch.float16:
        return None  # the products of two gradients, whose sign decides, underflow in float16
    rule = RpropRule(
        **shared({"weight_decay": 0.0, **group}, dtype), etas=group["etas"], sizes=tuple(group["step_sizes"])
    )
    return rule, averages(state, "prev", "step_size")


RECIPES: dict[str, Recipe] = {
    "torch.optim.rmsprop.RMSprop": recipe(_rmsprop, "lr alpha eps weight_decay momentum centered maximize"),
    "torch.optim.adagrad.Adagrad": recipe(
        _adagrad,
        "lr lr_decay weight_decay eps initial_accumulator_value maximize",
        initial=lambda optimizer: optimizer.defaults["initial_accumulator_value"],
    ),
    "torch.optim.adadelta.Adadelta": recipe(_adadelta, "lr rho eps weight_decay maximize"),
    "torch.optim.rprop.Rprop": recipe(_rprop, "lr etas step_sizes maximize"),
}
