r"""What weight decay does to scale-invariant weights: it sets their length, hence how fast their direction turns.

Only the direction of such a weight matters, so SGD with weight decay walks through the same functions as SGD without
it at a learning rate that grows exponentially (Li & Arora 2020), see :class:`ExponentialSchedule`. Weight decay does
not break the scale invariance of the loss, as Sun et al. 2020 have it in section 3: it adds to the increment of eq 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry.increments.increment_terms import Scalar

_ROUNDING = 1e-14
"""Slack at the double root, where α may be off by its square root, but the schedule by no more than this."""


def balanced_norm(lr: Scalar, weight_decay: Scalar, unit_gradient_norm: Scalar) -> Scalar:
    r"""Return the ‖W‖ that one step of plain SGD with weight decay leaves unchanged.

    With G the norm of the gradient at ‖W‖ = 1, hence ‖g‖ = G/‖W‖, and ⟨W, g⟩ = 0:

    .. math:: \Delta\lVert W\rVert^2 = \bigl((1-\eta\lambda)^2 - 1\bigr)\lVert W\rVert^2 + \eta^2\lVert g\rVert^2 = 0
              \iff \lVert W\rVert^4 = \frac{\eta G^2}{\lambda(2-\eta\lambda)}

    A longer weight shrinks, a shorter one grows.

    Args:
        lr: η.
        weight_decay: λ, with 0 < ηλ < 2.
        unit_gradient_norm: G, in units of loss.

    Returns:
        ‖W‖, in units of weight; of the type and shape that the arguments combine to.
    """
    quartic: Scalar = lr * unit_gradient_norm**2 / (weight_decay * (2 - lr * weight_decay))
    return quartic**0.25


@dataclass(frozen=True)
class ExponentialSchedule:
    r"""The schedule without weight decay that moves scale-invariant weights through the same directions (Li & Arora).

    Let θ follow torch's SGD with constant η, momentum μ and weight decay λ, and let α be the larger root of
    :math:`x^2 - (1 + \mu - \lambda\eta)x + \mu = 0`; α = 1 - λη without momentum. Then
    :math:`\tilde\theta_k = \alpha^{-k}\theta_k` follows torch's SGD *without* weight decay, with the same μ and

    .. math:: \eta_k = \eta\,\alpha^{-2k-1}

    from θ₀, where with momentum the buffer starts as :meth:`initial_buffer`. In other words a heavy ball,
    :math:`\tilde\theta_{k+1} = \tilde\theta_k + (\mu/\alpha^2)(\tilde\theta_k - \tilde\theta_{k-1})
    - \eta_k g(\tilde\theta_k)` with :math:`\tilde\theta_{-1} = \alpha\theta_0`. Exact for a loss that does not depend
    on the scale of θ; every other weight has to keep its own schedule. Without dampening and Nesterov.

    Args:
        lr: η > 0.
        weight_decay: λ ≥ 0.
        momentum: μ in [0, 1).

    Raises:
        ConfigurationError: where no positive root exists: λη > (1 - √μ)², or λη = 1 without momentum. (Real roots
            also exist for λη ≥ (1 + √μ)², but they are negative: θ̃ would change its sign at every step.)

    Example:
        >>> schedule = ExponentialSchedule(lr=0.1, weight_decay=0.5)
        >>> [round(schedule.lr_at(k), 4) for k in range(3)]
        [0.1053, 0.1166, 0.1292]
    """

    lr: float
    weight_decay: float
    momentum: float = 0.0

    def __post_init__(self) -> None:
        """Refuse settings without an equivalent schedule."""
        if not (self.lr > 0 and self.weight_decay >= 0 and 0 <= self.momentum < 1):
            raise ConfigurationError(
                f"lr={self.lr}, weight_decay={self.weight_decay}, momentum={self.momentum} have no equivalent "
                "exponential schedule: choose lr > 0, weight_decay >= 0 and 0 <= momentum < 1."
            )
        product, limit = self.lr * self.weight_decay, _real_below(self.momentum)
        if not (product <= limit * (1 + _ROUNDING) and product < 1):
            lower = f", or momentum < {_real_below(product):.6g}" if product < 1 else ""
            raise ConfigurationError(
                f"lr={self.lr} times weight_decay={self.weight_decay} is {product:.6g}: with momentum={self.momentum} "
                f"an equivalent exponential schedule exists below {limit:.6g} only, beyond it weights without gradient "
                f"oscillate around zero. Choose weight_decay < {limit / self.lr:.6g}{lower}."
            )

    @property
    def shrink(self) -> float:
        """1 - α: the share of its length that a weight without gradient loses per step in the long run."""
        product = self.lr * self.weight_decay
        beyond = max(0.0, _real_below(self.momentum) - product)  # rounding can pass the double root
        discriminant = beyond * ((1 + math.sqrt(self.momentum)) ** 2 - product)
        # (1 - μ + λη - √disc) / 2, made a quotient: nothing is lost where λη is tiny
        return 2 * product / (1 - self.momentum + product + math.sqrt(discriminant))

    @property
    def root(self) -> float:
        """The root α, in (0, 1]."""
        return 1 - self.shrink

    def scale_at(self, step: int) -> float:
        """Return α^-k, the factor between θ̃_k and θ_k; an OverflowError where it exceeds what a float can hold."""
        return math.exp(-step * math.log1p(-self.shrink))

    def lr_at(self, step: int) -> float:
        """Return η_k = η α^(-2k-1), the learning rate of step k (from 0); an OverflowError beyond a float's range."""
        return self.lr * math.exp(-(2 * step + 1) * math.log1p(-self.shrink))

    def initial_buffer(self, weight: Tensor) -> Tensor:
        r"""Return the momentum buffer before the first step, :math:`b = -(1-\alpha)\theta_0 / (\eta\alpha)`.

        It says that θ̃ already moves outwards as it will under the growing rate. Unused without momentum.

        Args:
            weight: θ₀, any shape.
        """
        return weight * (-self.shrink / (self.lr * self.root))


def _real_below(value: float) -> float:
    """Return (1 - √x)², which is its own inverse: up to which λη roots are real for momentum x, and the reverse."""
    return ((1 - value) / (1 + math.sqrt(value))) ** 2
