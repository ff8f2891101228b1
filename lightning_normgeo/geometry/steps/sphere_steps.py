r"""Steps on a sphere: where an update D of a vector W on the sphere of radius r leads if it has to stay there.

Both return the coefficients of :math:`W^+ = \alpha W + \beta D`, so that a step needs three inner products of W and D,
and no copy of either.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def geodesic_step(weight_sq: Tensor, inner: Tensor, update_sq: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the coefficients (α, β) of a step along a great circle.

    The tangential part :math:`D_\perp = D - \rho W`, :math:`\rho = \langle W, D\rangle/\lVert W\rVert^2`, is the
    initial velocity, and its length that of the arc: with :math:`\theta = \lVert D_\perp\rVert/\lVert W\rVert`

    .. math:: W^+ = \cos\theta\, W + \frac{\sin\theta}{\theta} D_\perp,

    the exponential map of the sphere. For D = −η∇ it is SGD on the Grassmann manifold G(1, n) (Cho and Lee 2017,
    eq 3, for r = 1). The radial part of D has no effect.

    Args:
        weight_sq: ‖W‖², positive, of any shape; the others have the same shape.
        inner: ⟨W, D⟩.
        update_sq: ‖D‖².
        radius: r; W is brought to it.

    Example:
        >>> alpha, beta = geodesic_step(*torch.tensor([1.0, 0.0, (math.pi / 2) ** 2, 1.0]))
        >>> abs(round(float(alpha), 6)), round(float(beta), 6)  # a quarter of the circle: W⁺ = D/‖D‖
        (0.0, 0.63662)
    """
    radial = inner / weight_sq
    angle = ((update_sq - radial * inner).clamp_min(0) / weight_sq).sqrt()
    per_angle = torch.sinc(angle / math.pi)  # sin θ / θ, also at 0
    to_radius = radius / weight_sq.sqrt()
    return (angle.cos() - per_angle * radial) * to_radius, per_angle * to_radius


def hyperball_step(
    weight_sq: Tensor, inner: Tensor, update_sq: Tensor, direction_sq: Tensor, radius: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Return the coefficients (α, β) of a step whose length is the learning rate times the radius.

    .. math:: W^+ = r\,N(W - \eta r\,N(u)), \quad N(v) = v/\lVert v\rVert,

    for the optimizer's update D = −ηu (the Hyperball optimizers, arXiv 2606.16899): the size of u has no effect, and
    the learning rate is the tangent of the angle by which W turns if u is orthogonal to W.

    Args:
        weight_sq: ‖W‖², positive, of any shape; the others have the same shape.
        inner: ⟨W, D⟩.
        update_sq: ‖D‖².
        direction_sq: ‖u‖² = ‖D/η‖².
        radius: r.

    Example:
        >>> alpha, beta = hyperball_step(*torch.tensor([4.0, 0.0, 0.09, 9.0, 2.0]))  # η = 0.1, ‖u‖ = 3
        >>> round(float((alpha**2 * 4 + beta**2 * 0.09).sqrt()), 6), round(float(beta * 0.3 / (alpha * 2)), 6)
        (2.0, 0.1)
    """
    to_radius = radius / weight_sq.sqrt()
    stretch = torch.where(direction_sq != 0, radius / direction_sq.sqrt(), 0.0)
    length = (to_radius**2 * weight_sq + 2 * to_radius * stretch * inner + stretch**2 * update_sq).sqrt()
    return to_radius * radius / length, stretch * radius / length
