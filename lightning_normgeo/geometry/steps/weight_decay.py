r"""Weight decay of scale-invariant weights: it sets their norm, and so how fast their direction turns.

Only the direction of such a weight matters, so SGD with weight decay passes through the same functions as SGD without
it at a learning rate that grows exponentially (Li & Arora 2020), see :class:`ExponentialSchedule`. Weight decay does
not break the scale invariance of the loss, as Sun et al. 2020 say in section 3.2: it adds a term to the increment of
eq 16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry.increments.increment_terms import Scalar

_ROUNDING = 1e-14
"""Relative tolerance at the double root, where rounding by this much moves α by its square root."""


def balanced_norm(lr: Scalar, weight_decay: Scalar, unit_gradient_norm: Scalar) -> Scalar:
    r"""Return the ‖W‖ that one step of plain SGD with weight decay leaves unchanged (eq 16 plus weight decay).

    With G the norm of the gradient at ‖W‖ = 1, so that ‖g‖ = G/‖W‖, and with ⟨W, g⟩ = 0 (Lemma 3):

    .. math:: \Delta\lVert W\rVert^2 = \bigl((1-\eta\lambda)^2 - 1\bigr)\lVert W\rVert^2 + \eta^2\lVert g\rVert^2 = 0
              \iff \lVert W\rVert^4 = \frac{\eta G^2}{\lambda(2-\eta\lambda)}

    A weight with a larger norm shrinks, one with a smaller norm grows (van Laarhoven 2017).

    Args:
        lr: η > 0.
        weight_decay: λ, with 0 < ηλ < 2.
        unit_gradient_norm: G ≥ 0, in units of loss.

    Returns:
        ‖W‖, in units of weight; of the type and shape that the arguments combine to.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> direction, orthogonal = torch.linalg.qr(torch.randn(5, 2, dtype=torch.float64)).Q.T
        >>> norm = balanced_norm(lr=0.1, weight_decay=0.5, unit_gradient_norm=3.0)
        >>> weight, gradient = norm * direction, 3.0 / norm * orthogonal
        >>> torch.allclose((weight - 0.1 * (gradient + 0.5 * weight)).norm(), weight.norm())
        True
    """
    quartic: Scalar = lr * unit_gradient_norm**2 / (weight_decay * (2 - lr * weight_decay))
    return quartic**0.25


@dataclass(frozen=True)
class ExponentialSchedule:
    r"""The learning rates that replace weight decay: scale-invariant weights pass through the same directions.

    Li & Arora 2020. Let θ follow torch's SGD with constant η, momentum μ and weight decay λ, and let α be the larger
    root of :math:`x^2 - (1 + \mu - \lambda\eta)x + \mu = 0`, which is 1 - λη without momentum. Then
    :math:`\tilde\theta_k = \alpha^{-k}\theta_k` follows torch's SGD *without* weight decay, with the same μ and

    .. math:: \eta_k = \eta\,\alpha^{-2k-1}

    It starts from θ₀, with momentum also from the buffer :meth:`initial_buffer`. Written as a heavy ball,
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
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> schedule = ExponentialSchedule(lr=0.1, weight_decay=0.5)
        >>> start, target = torch.randn(2, 5, dtype=torch.float64)
        >>> gradient = torch.func.grad(lambda weight: torch.cosine_similarity(weight, target, dim=0))
        >>> decayed = growing = start
        >>> for k in range(20):
        ...     decayed = decayed - 0.1 * (gradient(decayed) + 0.5 * decayed)
        ...     growing = growing - schedule.lr_at(k) * gradient(growing)
        >>> torch.allclose(growing, schedule.scale_at(20) * decayed)
        True
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
        """1 - α, the fraction of its norm that a weight without gradient loses per step in the long run."""
        product = self.lr * self.weight_decay
        beyond = max(0.0, _real_below(self.momentum) - product)  # negative by rounding at the double root
        discriminant = beyond * ((1 + math.sqrt(self.momentum)) ** 2 - product)
        # equals (1 - μ + λη - √discriminant) / 2; as a quotient nothing cancels where λη is tiny
        return 2 * product / (1 - self.momentum + product + math.sqrt(discriminant))

    @property
    def root(self) -> float:
        """The root α, in (0, 1]."""
        return 1 - self.shrink

    def scale_at(self, step: int) -> float:
        """Return the factor α^-k between θ̃_k and θ_k.

        Args:
            step: k ≥ 0, in optimizer steps.

        Raises:
            OverflowError: where the factor exceeds the range of a float.
        """
        return math.exp(-step * math.log1p(-self.shrink))

    def lr_at(self, step: int) -> float:
        """Return the learning rate η_k = η α^(-2k-1) of a step.

        Args:
            step: k, counted from 0.

        Raises:
            OverflowError: where the rate exceeds the range of a float.
        """
        return self.lr * math.exp(-(2 * step + 1) * math.log1p(-self.shrink))

    def initial_buffer(self, weight: Tensor) -> Tensor:
        r"""Return the momentum buffer before the first step, :math:`b = -(1-\alpha)\theta_0 / (\eta\alpha)`.

        With it θ̃ already moves outwards, as it does later under the growing rate. Not used without momentum.

        Args:
            weight: θ₀, any shape.

        Returns:
            b, of the shape of θ₀.
        """
        return weight * (-self.shrink / (self.lr * self.root))


def _real_below(value: float) -> float:
    """Return (1 - √x)²: for x = μ the largest λη with positive roots; its own inverse, so for x = λη the largest μ."""
    return ((1 - value) / (1 + math.sqrt(value))) ** 2
