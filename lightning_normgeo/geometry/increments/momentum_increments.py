r"""Eq 16 for SGD with momentum: what follows from ⟨W, g⟩ = 0 alone, as a recursion over steps.

Under momentum a step does not add η²‖g‖², but the law behind it still tells the increment. With ⟨W, g⟩ = 0 the inner
product of W with the momentum buffer obeys, for :math:`d = g + \lambda W`, :math:`b = \mu b^- + c\,d`,
:math:`W^+ = W - \eta u` and u = b (Nesterov: d + μb),

.. math:: \langle W, b\rangle = \mu\langle W, b^-\rangle + c\lambda\lVert W\rVert^2, \qquad
          \langle W^+, b\rangle = \langle W, b\rangle - \eta\langle u, b\rangle

so that no inner product of W with a gradient or a buffer is ever read: norms are enough. Without weight decay and
dampening, at a constant rate, it sums up to :math:`\Delta_k = \eta^2\lVert b_k\rVert^2 +
2\eta^2\sum_{j<k}\mu^{k-j}\lVert b_j\rVert^2 \ge 0`: with momentum too the norm only grows (Heo et al. 2021).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule


class MomentumState(NamedTuple):
    """The momentum buffer b of several weights, as far as their norms are concerned; each ``(weights,)``."""

    inner: Tensor
    """⟨W, b⟩ with W and b of the same moment."""
    square: Tensor
    """‖b‖²."""


def momentum_increment(
    rule: SGDRule, weight_sq: Tensor, gradient_sq: Tensor, direction_sq: Tensor | None, state: MomentumState
) -> tuple[Tensor, MomentumState]:
    """Return the increment that follows from ⟨W, g⟩ = 0, and the state after the step.

    Args:
        rule: of this step.
        weight_sq: ‖W‖² before the step.
        gradient_sq: ‖g‖².
        direction_sq: ‖u‖² of the step's direction; None where there is no buffer yet, so that it follows from the rest.
        state: before the step; not read where there is no buffer yet.

    Returns:
        ‖W⁺‖² - ‖W‖², in units of weight², and the state to go on from.
    """
    decay, mu = rule.weight_decay, rule.momentum
    along, size = decay * weight_sq, gradient_sq + decay**2 * weight_sq  # ⟨W, d⟩ and ‖d‖²
    if rule.first or direction_sq is None:
        inner, square, crossed = along, size, size
    else:
        share = 1 - rule.dampening
        inner = mu * state.inner + share * along
        square, crossed = _buffer(rule, size, direction_sq, state.square)
    by_buffer = crossed + mu * square if rule.nesterov else square  # ⟨u, b⟩
    radial = along + mu * inner if rule.nesterov else inner  # ⟨W, u⟩
    whole = size + 2 * mu * crossed + mu**2 * square if rule.nesterov else square  # ‖u‖²
    increment = -2 * rule.lr * radial + rule.lr**2 * whole
    if not mu:
        return increment, MomentumState(torch.zeros_like(inner), torch.zeros_like(square))
    return increment, MomentumState(inner - rule.lr * by_buffer, square)


def _buffer(rule: SGDRule, size: Tensor, direction_sq: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖b‖² and ⟨d, b⟩ after the step, from ‖d‖², ‖u‖² and ‖b⁻‖²."""
    if not rule.nesterov:  # u is b itself, and ⟨d, b⟩ is not asked for
        return direction_sq, torch.zeros_like(direction_sq)
    mu, share = rule.momentum, 1 - rule.dampening
    # ‖u‖² = ‖d + μb‖² with b = μb⁻ + c d, solved for ⟨d, b⁻⟩
    known = size * (1 + mu * share) ** 2 + mu**4 * square
    crossed = (direction_sq - known) / (2 * mu**2 * (1 + mu * share))
    return mu**2 * square + 2 * mu * share * crossed + share**2 * size, mu * crossed + share * size
