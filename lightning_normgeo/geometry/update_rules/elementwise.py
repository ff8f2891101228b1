r"""What the update rules of Adam and its relatives have in common: they scale each element by itself.

All of them move a weight by :math:`W^+ = sW - (G + M + \Lambda)`, elementwise parts that come from the gradient, from
the momentum before the step, and from weight decay inside the gradient; s is decoupled weight decay. Hence

.. math:: \Delta\lVert W\rVert^2 = (s^2-1)\lVert W\rVert^2 - 2s\langle W, G + M + \Lambda\rangle
          + \lVert G + M + \Lambda\rVert^2

⟨W, G⟩ is not zero for scale-invariant weights, since G is not along the gradient: eq 16 does not cover these
optimizers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms, Scalar
from lightning_normgeo.geometry.rows import dot


class StepParts(NamedTuple):
    """What one step takes off sW, elementwise; None for a part that the optimizer does not have."""

    gradient: Tensor
    momentum: Tensor | None = None
    weight_decay: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class ElementwiseRule(ABC):
    r"""Base of rules :math:`W^+ = sW - (G + M + \Lambda)`; for an optimizer of your own write :meth:`parts`.

    Args:
        lr: learning rate η at this step.
        weight_decay: λ.
        decoupled: whether decay is outside the gradient, as in AdamW.
        maximize: as in torch, g → -g.
        dtype: what 1 - ηλ is rounded to, the same way for every element: the weight's, or float32 for one of 16 bits,
            with which torch computes in float32; float64 where decay is subtracted instead, ηλW by ηλW.
    """

    lr: Scalar
    weight_decay: Scalar = 0.0
    decoupled: bool = False
    maximize: bool = False
    dtype: torch.dtype = torch.float64
    is_plain_sgd: ClassVar[bool] = False

    @abstractmethod
    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return what this step takes off sW, from wide ``(rows, n)`` blocks.

        Args:
            weight: W.
            gradient: g as the optimizer reads it.
            state: the optimizer's state before the step, as described with the rule.
        """

    @property
    def stores(self) -> int:
        """How many times a step stores the weight: decoupled decay does so by itself."""
        return 2 if self.decoupled and some(self.weight_decay) else 1

    @property
    def shrink(self) -> Scalar:
        """s: what decoupled weight decay multiplies W with, else 1."""
        if not self.decoupled:
            return 1.0
        return shrunk(1 - self.lr * self.weight_decay, self.dtype)

    @property
    def coupled(self) -> Scalar:
        """λ where decay is added to the gradient, else 0."""
        return 0.0 if self.decoupled else self.weight_decay

    def products(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        """Return ⟨W, G⟩, ⟨W, M⟩, ⟨W, Λ⟩ and ‖G + M + Λ‖²."""
        return self.reduced(weight, self.parts(weight, gradient, *state))

    def reduced(self, weight: Tensor, parts: StepParts, shrink: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the products of rows of W and of the parts, and behind them an s that is not the rule's."""
        none = weight.new_zeros(weight.shape[0])
        inner = [none if part is None else dot(weight, part) for part in parts]
        whole = sum((part for part in parts[1:] if part is not None), parts.gradient)
        own = () if shrink is None else (none + shrink,)
        return *inner, dot(whole, whole), *own

    def terms(self, weight_sq: Tensor, inner: Tensor, gradient_sq: Tensor, *products: Tensor) -> IncrementTerms:
        """Return the four terms of the increment."""
        del inner, gradient_sq
        by_gradient, by_momentum, by_decay, whole_sq, *own = products
        shrink = own[0] if own else self.shrink
        return IncrementTerms(
            gradient=-2 * shrink * by_gradient,
            momentum=-2 * shrink * by_momentum,
            # (s² - 1) as (s - 1)(s + 1): nothing is lost where ηλ is tiny
            weight_decay=(shrink - 1) * (shrink + 1) * weight_sq - 2 * shrink * by_decay,
            quadratic=whole_sq,
        )

    def full(self, weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return g with the sign it is followed in, and g̃ = g + λW where decay is coupled."""
        gradient = -gradient if self.maximize else gradient
        return gradient, gradient + self.coupled * weight if some(self.coupled) else gradient

    def divided(
        self,
        weight: Tensor,
        gradient: Tensor,
        momentum: Tensor | None,
        rates: tuple[Scalar, Scalar],
        by: Tensor | float,
    ) -> StepParts:
        """Return G = r_g g/D, M = r_m m/D and Λ = r_g λW/D."""
        by_gradient, by_momentum = rates
        return StepParts(
            gradient * by_gradient / by,
            None if momentum is None else momentum * by_momentum / by,
            weight * (by_gradient * self.coupled) / by if some(self.coupled) else None,
        )


def average(before: Tensor | None, value: Tensor, decay: Scalar) -> Tensor:
    """Return the exponential moving average after ``value``; None for one that is zero so far."""
    fresh = value * (1 - decay)
    return fresh if before is None else before * decay + fresh


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what torch computes elementwise in where ``dtype`` is stored: float32 for 16 bits, and real numbers."""
    real = dtype.to_real()
    return torch.float32 if torch.finfo(real).bits < 32 else real


def shrunk(factor: Scalar, dtype: torch.dtype) -> Scalar:
    """Return 1 - ηλ as torch multiplies a tensor with it that is stored in ``dtype``."""
    exact = arithmetic_dtype(dtype)
    if isinstance(factor, Tensor):
        return factor.to(exact).to(factor.dtype)
    return float(torch.tensor(factor, dtype=exact))


def some(value: Scalar) -> bool:
    """Whether a hyperparameter may differ from zero; on a device nobody waits for the answer."""
    return True if isinstance(value, Tensor) and value.device.type != "cpu" else bool(value != 0)
