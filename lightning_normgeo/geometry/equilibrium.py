r"""Where weight decay and gradient noise balance, for scale-invariant weights in a random-walk model.

The gradient is taken as isotropic noise orthogonal to W with :math:`\mathbb{E}\lVert g(\hat W)\rVert^2` constant. Then
‖W‖ and the angle that W turns by in each step approach a fixed point: van Laarhoven 2017, Wan et al. 2021, Kosson et
al. 2024. The norm is :func:`lightning_normgeo.geometry.weight_decay.balanced_norm`.
"""

from __future__ import annotations

import math

from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import Scalar, UpdateRule
from lightning_normgeo.geometry.update_rules.optimizers.adam import AdamRule
from lightning_normgeo.geometry.update_rules.optimizers.lion import LionRule
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule


def equilibrium_angle(rule: UpdateRule) -> Scalar | None:
    r"""Return the angular update at which weight decay and gradient noise balance, in radians.

    ====================  ==================================================  ==============================
    SGD, momentum μ       :math:`\sqrt{2\eta(1-\tau)\lambda/(1+\mu)}`          Wan et al. 2021 (τ = dampening)
    Nesterov              :math:`\sqrt{2\eta\lambda(1+2\mu-2\mu^3)/(1+\mu)}`   the same model, derived here
    AdamW                 :math:`\sqrt{2\eta\lambda(1-\beta_1)/(1+\beta_1)}`   Kosson et al. 2024
    Lion                  :math:`\sqrt{\pi\eta\lambda\,q/(1+(\pi/2-1)q)}`     Kosson et al. 2024 for small q
    ====================  ==================================================  ==============================

    For Lion :math:`q = (1-\beta_1)^2 + \beta_1^2(1-\beta_2)/(1+\beta_2)` is the variance of c over that of g. Signs of
    Gaussian c with correlation ρ correlate by :math:`\tfrac{2}{\pi}\arcsin\rho`, which is taken as
    :math:`\tfrac{2}{\pi}\rho` between steps, at most 5 % in the angle, and is 1 within a step: the denominator.

    Returns:
        The angle (root mean square over units and steps), or None where no closed form is known: without weight
        decay, and for adaptive optimizers with decay inside the gradient.
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
    r"""Return the time constant, in optimizer steps, at which the norm approaches equilibrium.

    :math:`\lVert W\rVert^4` relaxes as :math:`e^{-t/T}` with :math:`T = (1-\mu)/(4\eta(1-\tau)\lambda)` for SGD (τ =
    dampening), :math:`\lVert W\rVert^2` with :math:`T = 1/(2\eta\lambda)` for AdamW and Lion. Training that is much
    shorter does not reach the equilibrium: with η = 1e-3, λ = 5e-4 and no momentum T is 5e5 steps.

    Returns:
        T in steps, or None without weight decay and where no closed form is known.
    """
    decay = _decay(rule)
    if decay is None:
        return None
    if isinstance(rule, SGDRule):
        return (1 - rule.momentum) / (4 * decay * (1 - _dampening(rule)))
    return 1 / (2 * decay)


def _decay(rule: UpdateRule) -> Scalar | None:
    """Return ηλ where an equilibrium is known, else None: also at the first step of a warm-up from η = 0."""
    if isinstance(rule, SGDRule):
        decay = rule.lr * rule.weight_decay
        return decay if _positive(decay) and _positive(1 - _dampening(rule)) else None
    if type(rule) is AdamRule or isinstance(rule, LionRule):
        decay = rule.lr * rule.weight_decay
        return decay if rule.decoupled and _positive(decay) else None
    return None


def _positive(value: Scalar) -> bool:
    """Whether one can divide by a number; on a device nobody waits for the answer, and the quotient may be infinite."""
    return True if isinstance(value, Tensor) and value.device.type != "cpu" else bool(value > 1e-300)


def _dampening(rule: SGDRule) -> float:
    """Return τ where it acts: torch ignores it without momentum."""
    return rule.dampening if rule.momentum else 0.0
