r"""Equilibrium of weight decay and gradient noise, for scale-invariant weights in a random-walk model.

The model takes the gradient as isotropic noise orthogonal to W with :math:`\mathbb{E}\lVert g(\hat W)\rVert^2` constant
at the direction :math:`\hat W = W/\lVert W\rVert`. Then ‖W‖ and the angle by which W turns in each step approach a
fixed point: van Laarhoven 2017, Wan et al. 2021, Kosson et al. 2024. The norm of plain SGD at that point is
:func:`lightning_normgeo.geometry.steps.weight_decay.balanced_norm`.
"""

from __future__ import annotations

import math

from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import Scalar, UpdateRule
from lightning_normgeo.geometry.update_rules.optimizers.adam import AdamRule
from lightning_normgeo.geometry.update_rules.optimizers.lion import LionRule
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule


def equilibrium_angle(rule: UpdateRule) -> Scalar | None:
    r"""Return the angle by which W turns in each step once weight decay and gradient noise balance, in radians.

    ====================  ==================================================  ==============================
    SGD, momentum μ       :math:`\sqrt{2\eta(1-\tau)\lambda/(1+\mu)}`          Wan et al. 2021 (τ = dampening)
    Nesterov              :math:`\sqrt{2\eta\lambda(1+2\mu-2\mu^3)/(1+\mu)}`   the same model, derived here
    AdamW                 :math:`\sqrt{2\eta\lambda(1-\beta_1)/(1+\beta_1)}`   Kosson et al. 2024
    Lion                  :math:`\sqrt{\pi\eta\lambda\,q/(1+(\pi/2-1)q)}`     Kosson et al. 2024 for small q
    ====================  ==================================================  ==============================

    Lion's update is the sign of c; :math:`q = (1-\beta_1)^2 + \beta_1^2(1-\beta_2)/(1+\beta_2)` is the variance of c
    over that of g. The signs of Gaussian c with correlation ρ have correlation :math:`\tfrac{2}{\pi}\arcsin\rho`.
    Between steps this is approximated by :math:`\tfrac{2}{\pi}\rho`, an error of at most 5 % in the angle; within a
    step it is exactly 1, which gives the denominator.

    Args:
        rule: the optimizer's update rule with its learning rate η > 0 and weight decay λ.

    Returns:
        The angle (root mean square over units and steps), to leading order in ηλ; None where no closed form is known:
        without weight decay, and for adaptive optimizers that add the decay to the gradient.

    Example:
        >>> import torch
        >>> from lightning_normgeo.geometry import SGDRule, angular_update
        >>> _ = torch.manual_seed(0)
        >>> rule, weight = SGDRule(lr=0.1, weight_decay=0.1), 0.01 * torch.randn(1, 5000, dtype=torch.float64)
        >>> for _ in range(200):  # the gradient of a scale-invariant loss is proportional to 1 / ‖W‖
        ...     before, gradient = weight, torch.randn_like(weight) / weight.norm()
        ...     weight = weight - rule.lr * (gradient + rule.weight_decay * weight)
        >>> abs(angular_update(before, weight).item() / equilibrium_angle(rule) - 1) < 0.05
        True
    """
    decay = _decay(rule)
    if decay is None:
        return None
    factor: Scalar
    if isinstance(rule, SGDRule):
        mu = rule.momentum
        factor = (1 + 2 * mu - 2 * mu**3 if rule.nesterov else 1 - _dampening(rule)) / (1 + mu)
    elif isinstance(rule, LionRule):
        beta1, beta2 = rule.betas
        variance = (1 - beta1) ** 2 + beta1**2 * (1 - beta2) / (1 + beta2)
        factor = math.pi / 2 * variance / (1 + (math.pi / 2 - 1) * variance)
    else:
        assert isinstance(rule, AdamRule)  # noqa: S101
        factor = (1 - rule.betas[0]) / (1 + rule.betas[0])
    return (2 * decay * factor) ** 0.5


def steps_to_equilibrium(rule: UpdateRule) -> Scalar | None:
    r"""Return the time constant T, in optimizer steps, with which the norm approaches equilibrium.

    The distance of :math:`\lVert W\rVert^4` from its equilibrium decays as :math:`e^{-t/T}` with
    :math:`T = (1-\mu)/(4\eta(1-\tau)\lambda)` for SGD (τ = dampening), that of :math:`\lVert W\rVert^2` with
    :math:`T = 1/(2\eta\lambda)` for AdamW and Lion. Training that is much shorter than T does not reach the
    equilibrium: with η = 1e-3, λ = 5e-4 and no momentum T is 5e5 steps.

    Args:
        rule: the optimizer's update rule with its learning rate η > 0 and weight decay λ.

    Returns:
        T in steps, to leading order in ηλ; None without weight decay and where no closed form is known.

    Example:
        >>> import torch
        >>> from lightning_normgeo.geometry import SGDRule, balanced_norm
        >>> _ = torch.manual_seed(0)
        >>> rule, equilibrium = SGDRule(lr=0.1, weight_decay=0.01), balanced_norm(0.1, 0.01, unit_gradient_norm=1.0)
        >>> start = square = 1 + torch.rand(5, dtype=torch.float64)  # ‖W‖²
        >>> for _ in range(round(steps_to_equilibrium(rule))):  # W ← (1 - ηλ)W - ηg with ‖g‖ = 1 / ‖W‖
        ...     square = (1 - 0.1 * 0.01) ** 2 * square + 0.1**2 / square
        >>> remaining = (square**2 - equilibrium**4) / (start**2 - equilibrium**4)
        >>> bool((remaining.log() + 1).abs().max() < 0.01)
        True
    """
    decay = _decay(rule)
    if decay is None:
        return None
    if isinstance(rule, SGDRule):
        return (1 - rule.momentum) / (4 * decay * (1 - _dampening(rule)))
    return 1 / (2 * decay)


def _decay(rule: UpdateRule) -> Scalar | None:
    """Return ηλ where an equilibrium is known, else None; also None while ηλ = 0, as when a warm-up starts at 0."""
    if isinstance(rule, SGDRule):
        decay = rule.lr * rule.weight_decay
        return decay if _positive(decay) and _positive(1 - _dampening(rule)) else None
    if type(rule) is AdamRule or isinstance(rule, LionRule):
        decay = rule.lr * rule.weight_decay
        return decay if rule.decoupled and _positive(decay) else None
    return None


def _positive(value: Scalar) -> bool:
    """Whether a number can be divided by; on a device always: waiting for it costs more than an infinite result."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return True
    return bool(value > 1e-300)


def _dampening(rule: SGDRule) -> float:
    """Return the dampening τ that takes effect: torch ignores it without momentum."""
    return rule.dampening if rule.momentum else 0.0
