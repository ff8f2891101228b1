"""Base class of update rules whose step depends on a whole weight: on a norm, a mean or a matrix product of it.

:class:`~lightning_normgeo.geometry.ElementwiseRule` reads blocks of rows. These rules read tensors as the optimizer has
them, and compute norms in the optimizer's precision: a norm of a million float32 numbers has an error of 1e-5 on a CPU,
far more than all other errors of a step. The terms of the increment are the same.
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
    """The parts of one step of a whole weight, and the factor of its decoupled decay."""

    parts: StepParts
    shrink: Tensor | None = None
    """s, a scalar tensor, where it depends on the tensors of the step; None where it is the rule's ``shrink``."""


@dataclass(frozen=True, kw_only=True)
class WholeTensorRule(ElementwiseRule):
    """Base of the rules :math:`W^+ = sW - (G + M + Λ)` whose parts depend on the whole weight.

    Subclasses implement :meth:`direction`.

    Cost: the arithmetic of one optimizer step, and its scratch memory for one weight at a time.
    """

    @abstractmethod
    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return the parts that this step subtracts from sW, η included, computed from whole tensors.

        No argument may be modified.

        Args:
            weight: W as it is stored, of any shape.
            gradient: g as the optimizer reads it, unscaled, of the same shape.
            state: the optimizer's state before the step, as the rule's docstring describes it.
        """

    def parts(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> StepParts:
        """Return the parts that :meth:`direction` computed before, which are passed here as ``state``."""
        del weight, gradient
        return StepParts(*state)


def whole_products(
    rule: WholeTensorRule, rows: Callable[[Tensor], Tensor], weight: Tensor, gradient: Tensor, *state: Tensor
) -> tuple[Tensor, ...]:
    """Return the per-unit ``products`` of a rule, each ``(units,)``, computed from whole tensors.

    Args:
        rule: the optimizer's rule.
        rows: a function that views a tensor of the weight's shape as a matrix with one unit per row.
        weight: W before the step, of its original shape.
        gradient: g, of the same shape.
        state: the state tensors that ``rule`` reads.
    """
    parts, shrink = rule.direction(weight, gradient, *state)
    there = {name: part for name, part in parts._asdict().items() if part is not None}

    def reduce(w: Tensor, *blocks: Tensor) -> tuple[Tensor, ...]:
        return rule.reduced(w, StepParts(**dict(zip(there, blocks, strict=True))), shrink)

    return map_rows(reduce, rows(weight), *map(rows, there.values()))


@dataclass(frozen=True, kw_only=True)
class CautiousRule(WholeTensorRule):
    r"""A cautious optimizer, which moves only the elements whose step has the gradient's sign (Liang et al. 2024).

    With the step U of ``base`` and the mask :math:`m = [U \odot \tilde g > 0]`, the step is :math:`U \odot m / \bar m`.
    G, M and Λ are those of the base, with the same mask. The state is the base's.

    Args:
        base: the rule without caution; its η, λ and s are used.
        scale: the divisor of m. ``mean``: its mean, at least 1e-3 (timm); ``count``: (Σm + 1)/n (pytorch-optimizer).
            Default: ``mean``.
    """

    base: ElementwiseRule
    scale: Literal["mean", "count"] = "mean"

    @property
    def stores(self) -> int:
        """The number of times that one step stores the weight: the same as without caution."""
        return self.base.stores

    @property
    def shrink(self) -> Scalar:
        """The factor s that decoupled weight decay multiplies W with: that of the base."""
        return self.base.shrink

    def direction(self, weight: Tensor, gradient: Tensor, *state: Tensor) -> Direction:
        """Return the parts G, M and Λ of the base, masked."""
        wide = wide_dtype(weight.device)
        w, g, *states = (tensor.to(wide) for tensor in (weight, gradient, *state))
        parts = self.base.parts(w, g, *states)
        return Direction(masked(parts, self.base.full(w, g)[1], self.scale))


def masked(parts: StepParts, gradient: Tensor, scale: Literal["mean", "count"] = "mean") -> StepParts:
    """Return the parts of a step, multiplied with the scaled mask of :class:`CautiousRule`."""
    whole = sum((part for part in parts[1:] if part is not None), parts.gradient)
    mask = (whole * gradient > 0).to(gradient.dtype)
    mask = mask / mask.mean().clamp_min(1e-3) if scale == "mean" else mask * (mask.numel() / (mask.sum() + 1))
    return scaled(parts, mask)


def scaled(parts: StepParts, by: Tensor | Scalar) -> StepParts:
    """Return the parts of a step, each multiplied with the same scalar or elementwise factor."""
    momentum, decay = (None if part is None else part * by for part in parts[1:])
    return StepParts(parts.gradient * by, momentum, decay)


def cautious(base: ElementwiseRule, scale: Literal["mean", "count"] = "mean") -> CautiousRule:
    """Return the :class:`CautiousRule` of a base rule."""
    return CautiousRule(
        base=base, scale=scale, lr=base.lr, weight_decay=base.weight_decay, decoupled=base.decoupled, dtype=base.dtype
    )


def own_norm(tensor: Tensor) -> Tensor:
    """Return ‖x‖ computed in the precision of the tensor, as the optimizer does, and converted to wide precision."""
    norm: Tensor = tensor.norm(2.0)
    return norm.to(wide_dtype(tensor.device))


def zeros_if_new(state: tuple[Tensor, ...], like: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return the state tensors, or ``count`` zero tensors before a weight's first step."""
    return state or tuple(torch.zeros_like(like) for _ in range(count))


def least(a: Scalar, b: Scalar) -> Scalar:
    """Return the smaller of two values, as a tensor if one of them is a tensor."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))
    return min(a, b)
