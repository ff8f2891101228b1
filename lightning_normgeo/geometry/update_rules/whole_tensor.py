"""Rules of optimizers that look at a whole weight before they move an element: by a norm, a mean or a matrix.

Where :class:`~lightning_normgeo.geometry.ElementwiseRule` reads blocks of rows, these read tensors as the optimizer has
them, and take norms in its own precision: a norm of a million float32 numbers is off by 1e-5 on a CPU, far more than
everything else in a step. The terms are the same.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.rows import map_rows, wide_dtype
from lightning_normgeo.geometry.update_rules.elementwise import ElementwiseRule, StepParts


class Direction(NamedTuple):
    """What one step of a whole weight does."""

    parts: StepParts
    shrink: Tensor | None = None
    """s, a scalar, where the step itself finds it out; None where it is the rule's."""


@dataclass(frozen=True, kw_only=True)
class WholeTensorRule(ElementwiseRule):
    """Base of rules :math:`W^+ = sW - (G + M + Λ)` with parts that depend on all of a weight; write :meth:`direction`.

    Cost: the optimizer's own arithmetic once more, and its scratch memory for one weight at a time.
    """

    @abstractmethod
    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return what this step takes off sW, η included, from whole tensors.

        Args:
            weight: W as it is stored, of any shape.
            gradient: g as the optimizer reads it, unscaled.
            state: the optimizer's state before the step, as described with the rule. Nothing of this may be written to.
        """

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return what :meth:`direction` found, read as state."""
        del weight, gradient
        return StepParts(*state)


def whole_products(
    rule: WholeTensorRule, rows: Callable[[Tensor], Tensor], weight: Tensor, gradient: Tensor, *state: Tensor
) -> tuple[Tensor, ...]:
    """Return the ``products`` of a rule by unit, from whole tensors.

    Args:
        rule: of the optimizer.
        rows: views a tensor of the weight's shape with one unit per row.
        weight: W.
        gradient: g.
        state: what ``rule`` reads.
    """
    parts, shrink = rule.direction(weight, gradient, *state)
    there = {name: part for name, part in parts._asdict().items() if part is not None}

    def reduce(w: Tensor, *blocks: Tensor) -> tuple[Tensor, ...]:
        return rule.reduced(w, StepParts(**dict(zip(there, blocks, strict=True))), shrink)

    return map_rows(reduce, rows(weight), *map(rows, there.values()))


@dataclass(frozen=True, kw_only=True)
class CautiousRule(WholeTensorRule):
    r"""A cautious optimizer: only elements whose step agrees with the gradient move (Liang et al. 2024).

    With the step U of ``base`` and the mask :math:`m = [U \odot \tilde g > 0]`, the step is :math:`U \odot m / \bar m`.
    G, M and Λ are those of the base, masked alike. The state is the base's.

    Args:
        base: the rule without caution; its η, λ and s are used.
        scale: what m is divided by: its mean, at least 1e-3 (timm), or (Σm + 1)/n (pytorch-optimizer).
    """

    base: ElementwiseRule
    scale: Literal["mean", "count"] = "mean"

    @property
    def stores(self) -> int:
        """How many times a step stores the weight: as often as without caution."""
        return self.base.stores

    @property
    def shrink(self) -> Scalar:
        """What decay multiplies W with: s of the base."""
        return self.base.shrink

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return G, M and Λ behind the mask."""
        wide = wide_dtype(weight.device)
        w, g, *states = (tensor.to(wide) for tensor in (weight, gradient, *state))
        parts = self.base.parts(w, g, *states)
        return Direction(masked(parts, self.base.full(w, g)[1], self.scale))


def masked(parts: StepParts, gradient: Tensor, scale: Literal["mean", "count"] = "mean") -> StepParts:
    """Return the parts of a step where it agrees with the gradient, scaled as :class:`CautiousRule` says."""
    whole = sum((part for part in parts[1:] if part is not None), parts.gradient)
    mask = (whole * gradient > 0).to(gradient.dtype)
    mask = mask / mask.mean().clamp_min(1e-3) if scale == "mean" else mask * (mask.numel() / (mask.sum() + 1))
    return scaled(parts, mask)


def scaled(parts: StepParts, by: Tensor | Scalar) -> StepParts:
    """Return all parts of a step times one factor, or elementwise."""
    momentum, decay = (None if part is None else part * by for part in parts[1:])
    return StepParts(parts.gradient * by, momentum, decay)


def cautious(base: ElementwiseRule, scale: Literal["mean", "count"] = "mean") -> CautiousRule:
    """Return the cautious form of a rule."""
    return CautiousRule(
        base=base, scale=scale, lr=base.lr, weight_decay=base.weight_decay, decoupled=base.decoupled, dtype=base.dtype
    )


def own_norm(tensor: Tensor) -> Tensor:
    """Return ‖x‖ as an optimizer has it, rounded in the precision of its tensors, in wide precision."""
    norm: Tensor = tensor.norm(2.0)
    return norm.to(wide_dtype(tensor.device))


def zeros_if_new(state: tuple[Tensor, ...], like: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return the state, which is zero at a weight's first step."""
    return state or tuple(torch.zeros_like(like) for _ in range(count))
