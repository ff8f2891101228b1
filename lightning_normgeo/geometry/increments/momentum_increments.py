r"""Norm increments of SGD with momentum that follow from ⟨W, g⟩ = 0 alone, as a recursion over steps.

With momentum, a step no longer adds η²‖g‖² to ‖W‖² as in eq 16 of Sun et al. 2020, but eq 15, ⟨W, g⟩ = 0, still
determines the increment. For :math:`d = g + \lambda W`, :math:`b = \mu b^- + c\,d`, :math:`W^+ = W - \eta u` and u = b
(Nesterov: d + μb), the inner product of W with the momentum buffer obeys

.. math:: \langle W, b\rangle = \mu\langle W, b^-\rangle + c\lambda\lVert W\rVert^2, \qquad
          \langle W^+, b\rangle = \langle W, b\rangle - \eta\langle u, b\rangle

so no inner product of W with a gradient or a buffer has to be measured: norms are enough. Without weight decay and
dampening, at a constant learning rate, the increments are :math:`\Delta_k = \eta^2\lVert b_k\rVert^2 +
2\eta^2\sum_{j<k}\mu^{k-j}\lVert b_j\rVert^2 \ge 0`: with momentum, too, the norm only grows (Heo et al. 2021).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule


class MomentumState(NamedTuple):
    """Inner products of the momentum buffers b of several weights, each ``(weights,)``; zeros before the first step."""

    inner: Tensor
    """⟨W, b⟩ with W and b after the same step, in units of loss."""
    square: Tensor
    """‖b‖², in units of loss² per weight²."""


def momentum_increment(
    rule: SGDRule, weight_sq: Tensor, gradient_sq: Tensor, direction_sq: Tensor | None, state: MomentumState
) -> tuple[Tensor, MomentumState]:
    """Return the increment of ‖W‖² that follows from ⟨W, g⟩ = 0, and the state for the next step.

    Args:
        rule: the update rule of this step.
        weight_sq: ‖W‖² before the step, ``(weights,)``, in units of weight².
        gradient_sq: ‖g‖², ``(weights,)``, in units of (loss per weight)².
        direction_sq: ‖u‖² of the step's direction, ``(weights,)``, in units of (loss per weight)²; None where no
            weight has a momentum buffer yet, since ‖u‖² then follows from the other arguments.
        state: the state before the step; not used where there is no buffer yet.

    Returns:
        ‖W⁺‖² - ‖W‖², in units of weight², and the state after the step.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> (weight, target), state = torch.randn(2, 1, 6, dtype=torch.float64), MomentumState(*torch.zeros(2, 1))
        >>> optimizer = torch.optim.SGD([weight.requires_grad_()], lr=0.1, momentum=0.9)
        >>> for k in range(5):
        ...     (weight.grad,) = torch.autograd.grad(torch.cosine_similarity(weight, target).sum(), weight)
        ...     before, gradient_sq = weight.square().sum(1), weight.grad.square().sum(1)
        ...     optimizer.step()
        ...     direction_sq = optimizer.state[weight]["momentum_buffer"].square().sum(1)
        ...     rule = SGDRule(lr=0.1, momentum=0.9, first=k == 0)
        ...     increment, state = momentum_increment(rule, before, gradient_sq, direction_sq, state)
        >>> torch.allclose(increment, weight.square().sum(1) - before)
        True
    """
    mu, along = rule.momentum, rule.weight_decay * weight_sq  # along: ⟨W, d⟩
    if rule.first or direction_sq is None:
        square = crossed = _direction_sq(rule, weight_sq, gradient_sq)
        inner, whole = along, (1 + mu) ** 2 * square if rule.nesterov else square
    else:
        inner, whole = mu * state.inner + (1 - rule.dampening) * along, direction_sq
        square = crossed = direction_sq
        if rule.nesterov:
            square, crossed = _buffer(rule, _direction_sq(rule, weight_sq, gradient_sq), direction_sq, state.square)
    radial, by_buffer = inner, square  # ⟨W, u⟩ and ⟨u, b⟩
    if rule.nesterov:
        radial, by_buffer = along + mu * inner, crossed + mu * square
    increment = -2 * rule.lr * radial + rule.lr**2 * whole
    if not mu:
        return increment, MomentumState(torch.zeros_like(inner), torch.zeros_like(square))
    return increment, MomentumState(inner - rule.lr * by_buffer, square)


def _direction_sq(rule: SGDRule, weight_sq: Tensor, gradient_sq: Tensor) -> Tensor:
    """Return ‖d‖² of d = g + λW."""
    return gradient_sq + rule.weight_decay**2 * weight_sq


def _buffer(rule: SGDRule, size: Tensor, direction_sq: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖b‖² and ⟨d, b⟩ after a step of Nesterov's form, from ‖d‖², ‖u‖² and ‖b⁻‖²."""
    mu, share = rule.momentum, 1 - rule.dampening
    # ‖u‖² = ‖d + μb‖² with b = μb⁻ + c d, solved for ⟨d, b⁻⟩
    known = size * (1 + mu * share) ** 2 + mu**4 * square
    crossed = (direction_sq - known) / (2 * mu**2 * (1 + mu * share))
    return mu**2 * square + 2 * mu * share * crossed + share**2 * size, mu * crossed + share * size
