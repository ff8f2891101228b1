"""SGD of torch, its averaged form ASGD, and SGDW of timm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms, Scalar
from lightning_normgeo.geometry.rows import dot
from lightning_normgeo.geometry.update_rules.elementwise import ElementwiseRule, StepParts, shrunk
from lightning_normgeo.geometry.update_rules.recipe import (
    Described,
    Group,
    Recipe,
    State,
    recipe,
    scalar,
    scalar_dtype,
    shared,
)
from lightning_normgeo.geometry.update_rules.timm_options import TIMM_OPTIONS, with_caution, with_decoupled_decay


@dataclass(frozen=True)
class SGDRule:
    r"""torch.optim.SGD: d = g + λW, b = μb⁻ + (1-τ)d, u = b (Nesterov: d + μb), W⁺ = W - ηu.

    On a weight's first step torch sets b = d, without dampening. The state is (b⁻,), the momentum buffer before the
    step, and empty where there is none. With :math:`u = c_g (g + \lambda W) + c_m b^-`:

    .. math:: \Delta\lVert W\rVert^2 = -2\eta c_g\langle W,g\rangle - 2\eta c_m\langle W,b^-\rangle
              - 2\eta c_g\lambda\lVert W\rVert^2 + \eta^2\lVert u\rVert^2

    Args:
        lr: learning rate η at this step.
        momentum: μ. Default: 0.
        dampening: τ. Default: 0.
        weight_decay: λ. Default: 0.
        nesterov: whether u = d + μb, as in torch. Default: False.
        maximize: whether the optimizer follows +g instead of -g, as in torch. Default: False.
        first: whether there is no momentum buffer yet. Default: True.
    """

    lr: Scalar
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    first: bool = True
    additive: ClassVar[bool] = True

    @property
    def is_plain_sgd(self) -> bool:
        """Whether there is neither momentum nor weight decay, as eq 16 assumes."""
        return not self.momentum and not self.weight_decay

    @property
    def stores(self) -> int:
        """The number of times that one step stores the weight: once."""
        return 1

    @property
    def coefficients(self) -> tuple[float, float]:
        """The coefficients (c_g, c_m) of g + λW and of the buffer b⁻ in the step direction u."""
        gradient = 1.0 if self.first else 1.0 - self.dampening
        if self.nesterov:
            return 1.0 + self.momentum * gradient, 0.0 if self.first else self.momentum**2
        return gradient, 0.0 if self.first else self.momentum

    def products(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Return ⟨W, b⁻⟩ and ‖u‖², or nothing where there is no buffer."""
        if not state:
            return ()
        direction = self._direction(weight, gradient, state[0])
        return dot(weight, state[0]), dot(direction, direction)

    def terms(self, weight_sq: Tensor, inner: Tensor, gradient_sq: Tensor, *products: Tensor) -> IncrementTerms:
        """Return the four terms of the increment."""
        c_g, c_m = self.coefficients
        inner = -inner if self.maximize else inner
        decay = self.weight_decay
        if products:
            buffer_inner, direction_sq = products
        else:
            buffer_inner = torch.zeros_like(inner)
            direction_sq = c_g**2 * (gradient_sq + 2 * decay * inner + decay**2 * weight_sq)
        return IncrementTerms(
            gradient=-2 * self.lr * c_g * inner,
            momentum=-2 * self.lr * c_m * buffer_inner,
            weight_decay=-2 * self.lr * c_g * decay * weight_sq,
            quadratic=self.lr**2 * direction_sq,
        )

    def _direction(self, weight: Tensor, gradient: Tensor, buffer: Tensor) -> Tensor:
        """Return the step direction u."""
        c_g, c_m = self.coefficients
        by_gradient = -c_g if self.maximize else c_g
        scaled = gradient if by_gradient == 1 else by_gradient * gradient
        direction = torch.add(scaled, buffer, alpha=c_m)
        return direction.add_(weight, alpha=c_g * self.weight_decay) if self.weight_decay else direction


@dataclass(frozen=True, kw_only=True)
class ASGDRule(ElementwiseRule):
    r"""torch.optim.ASGD: W⁺ = (1 - λ₀η_t)W - η_t(g + λW) (Polyak & Juditsky 1992).

    The rule is about the weight W itself, not about its average. It reads no state; ``lr`` is η_t, which torch keeps
    for each weight.

    Args:
        decay_term: λ₀, torch's ``lambd``. Default: 1e-4.
        together: whether torch adds λ₀W to the gradient first, as its foreach operations do. Default: False.
    """

    decay_term: Scalar = 1e-4
    together: bool = False
    additive: ClassVar[bool] = True

    @property
    def stores(self) -> int:
        """The number of times that one step stores the weight: after the decay term and after the gradient, or once."""
        return 1 if self.together else 2

    @property
    def shrink(self) -> Scalar:
        """The factor s = 1 - λ₀η_t that W is multiplied with."""
        shrink = 1 - self.decay_term * self.lr
        return shrink if self.together else shrunk(shrink, self.dtype)

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts G and Λ."""
        del state
        return self.divided(weight, self.full(weight, gradient)[0], None, (self.lr, 0.0), 1.0)


@dataclass(frozen=True, kw_only=True)
class SGDWRule(ElementwiseRule):
    r"""SGD with decoupled weight decay, as in timm: W⁺ = sW - ηu, b = μb⁻ + (1-τ)g, u = b (Nesterov: g + μb).

    As in torch, b = g at the first step. The state is (b⁻,), and empty before the first step.

    Args:
        momentum: μ. Default: 0.
        dampening: τ. Default: 0.
        nesterov: whether u = g + μb, as in torch. Default: False.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    additive: ClassVar[bool] = True

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts G and M."""
        share = 1.0 - self.dampening if state and self.momentum else 1.0
        ahead = self.momentum if self.nesterov else 1.0
        by_gradient = 1.0 + ahead * share if self.nesterov else share
        rates = (self.lr * by_gradient, self.lr * ahead * self.momentum)
        return self.divided(weight, self.full(weight, gradient)[0], state[0] if state else None, rates, 1.0)


def _sgd(group: Group, state: State, dtype: torch.dtype) -> Described:
    del dtype
    buffer = state.get("momentum_buffer") if group["momentum"] else None
    numbers: dict[str, Any] = {name: scalar(group[name]) for name in ("lr", "momentum", "dampening", "weight_decay")}
    flags = {name: bool(group[name]) for name in ("nesterov", "maximize")}
    return SGDRule(**numbers, **flags, first=buffer is None), () if buffer is None else (buffer,)


def _asgd(group: Group, state: State, dtype: torch.dtype) -> Described:
    rate = state["eta"] if state else torch.tensor(float(group["lr"]), dtype=scalar_dtype())
    foreach = group.get("foreach")
    if foreach is None:  # torch's default, where it does not need to differentiate through the step
        foreach = not group.get("differentiable") and any(parameter.is_cuda for parameter in group["params"])
    numbers = {**shared(group, dtype), "lr": scalar(rate), "decay_term": scalar(group["lambd"])}
    return ASGDRule(**numbers, together=bool(foreach)), ()


def _sgdw(group: Group, state: State, dtype: torch.dtype) -> Described:
    momentum, buffer = group["momentum"], state.get("momentum_buffer")
    rule: ElementwiseRule = SGDWRule(
        **with_decoupled_decay(group, dtype),
        momentum=momentum,
        dampening=group["dampening"],
        nesterov=bool(group["nesterov"]),
    )
    if not momentum:
        return SGDWRule(**with_decoupled_decay(group, dtype)), ()  # without momentum timm ignores caution too
    return with_caution(rule, group), () if buffer is None else (buffer,)


RECIPES: dict[str, Recipe] = {
    "torch.optim.sgd.SGD": recipe(_sgd, "lr momentum dampening weight_decay nesterov maximize"),
    "torch.optim.asgd.ASGD": recipe(_asgd, "lr lambd alpha t0 weight_decay maximize"),
    "timm.optim.sgdw.SGDW": recipe(_sgdw, f"{TIMM_OPTIONS} momentum dampening nesterov", always_decoupled=True),
}
