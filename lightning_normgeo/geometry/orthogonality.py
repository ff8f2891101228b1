"""Lemmas 2 and 3 of Sun et al. 2020: scale-invariant weights are orthogonal to their gradients.

If the loss does not change when a unit W is scaled by any α > 0, then ⟨W, ∇W⟩ = 0 (Lemma 2). With the ε of a real
normalization the inner product is not zero but known exactly, see :func:`batch_norm_epsilon_inner` and, for every
normalization, :func:`epsilon_inner`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_normgeo.geometry.rows import dot, map_rows, wide_dtype


def cosine(inner: Tensor, squared_a: Tensor, squared_b: Tensor) -> Tensor:
    """Return ⟨a, b⟩ / (‖a‖‖b‖) from inner products, with 0 where either vector is zero.

    Args:
        inner: ⟨a, b⟩, any shape.
        squared_a: ‖a‖², same shape.
        squared_b: ‖b‖², same shape.

    Returns:
        Cosines in [-1, 1] up to rounding. A unit without gradient (a dead ReLU) counts as orthogonal.
    """
    norms = squared_a.sqrt() * squared_b.sqrt()
    return torch.where(norms > 0, inner / torch.where(norms > 0, norms, 1.0), torch.zeros_like(inner))


def weight_gradient_products(weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ‖W‖², ⟨W, g⟩ and ‖g‖² for each unit, accumulated in float64.

    Args:
        weight: ``(units, n)``.
        gradient: ``(units, n)``.
    """
    weight_sq, inner, gradient_sq = map_rows(lambda w, g: (dot(w, w), dot(w, g), dot(g, g)), weight, gradient)
    return weight_sq, inner, gradient_sq


def weight_gradient_cosine(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return cos(W, g) for each unit; 0 for a scale-invariant unit (Lemma 2) up to ε and rounding.

    Args:
        weight: ``(units, n)``.
        gradient: ``(units, n)``.
    """
    weight_sq, inner, gradient_sq = weight_gradient_products(weight, gradient)
    return cosine(inner, weight_sq, gradient_sq)


def batch_norm_epsilon_inner(gamma: Tensor, gamma_gradient: Tensor, variance: Tensor, eps: Tensor | float) -> Tensor:
    r"""Return the ⟨W, g⟩ that the ε of a batch normalization causes, exactly.

    .. math:: \langle W_i, g_i \rangle = \frac{\varepsilon}{\sigma_i^2 + \varepsilon}\, \gamma_i\,
              \frac{\partial L}{\partial \gamma_i}

    Derivation: scaling W by α is scaling ε by 1/α², so ⟨W, ∂L/∂W⟩ = -2ε ∂L/∂ε. Exact for one backward pass through
    one set of batch statistics; not for a sum over several (accumulated micro-batches, data parallel ranks).

    Args:
        gamma: scale γ, ``(channels,)``.
        gamma_gradient: ∂L/∂γ with the same clipping as the weight's gradient, ``(channels,)``.
        variance: biased batch variance σ² of the pre-activation, ``(channels,)``.
        eps: the layer's epsilon.
    """
    return eps / (variance + eps) * gamma * gamma_gradient


def batch_instances(y: Tensor) -> Tensor:
    """View pre-activations as batch normalization's instances: ``(N, C, ...)`` → ``(C, 1, N·…)``, a unit per channel.

    An *instance* is a vector that is normalized with statistics of its own.
    """
    return y.movedim(1, 0).flatten(1).unsqueeze(1)


def group_instances(y: Tensor, groups: int) -> Tensor:
    """View pre-activations as the instances of group, layer or instance normalization, a unit per group of channels.

    Args:
        y: ``(N, C, ...)``. For a layer normalization of the last dimension alone: ``y.flatten(0, -2)`` and one group.
        groups: number of groups; 1 for layer normalization over everything, C for instance normalization.

    Returns:
        ``(groups, N, C/groups·…)``.
    """
    return y.reshape(y.shape[0], groups, -1).movedim(1, 0)


def epsilon_inner(upstream: Tensor, normalized: Tensor, variance: Tensor, eps: Tensor | float) -> Tensor:
    r"""Return the ⟨W, g⟩ that the ε of any data-based normalization causes, exactly, jointly over each unit.

    .. math:: \langle W, g \rangle = \sum_k \frac{\varepsilon}{\sigma_k^2 + \varepsilon}
              \Bigl\langle \frac{\partial L}{\partial \hat y_k}, \hat y_k \Bigr\rangle

    over the instances k with statistics of their own that the unit feeds; :func:`batch_instances` and
    :func:`group_instances` put them in this shape. Where a bias of the layer does not cancel (GN, LN), it belongs to
    the unit: the left side is ⟨W, g⟩ + ⟨b, ∂L/∂b⟩. RMS normalization: mean squares in place of the variance.

    Derivation: as :func:`batch_norm_epsilon_inner`, the special case of one instance with ŷ's own γ.

    Args:
        upstream: ∂L/∂ŷ before γ and β, that is γ times the gradient of the output, ``(units, instances, n)``.
        normalized: ŷ before γ and β, ``(units, instances, n)``.
        variance: biased variance σ² of each instance, ``(units, instances)``.
        eps: the layer's epsilon.

    Returns:
        ``(units,)`` in float64.
    """
    wide = wide_dtype(upstream.device)
    return (eps / (variance.to(wide) + eps) * dot(upstream.to(wide), normalized.to(wide))).sum(-1)


def preactivation_epsilon_inner(upstream: Tensor, normalized: Tensor, variance: Tensor, eps: Tensor | float) -> Tensor:
    r"""Return ⟨∂L/∂y, ŷ⟩ for each instance, the term of Santurkar et al. 2018 that vanishes for ε = 0 (appendix 5.4).

    .. math:: \Bigl\langle \frac{\partial L}{\partial y}, \hat y \Bigr\rangle = \frac{\varepsilon}
              {(\sigma^2 + \varepsilon)^{3/2}} \Bigl\langle \frac{\partial L}{\partial \hat y}, \hat y \Bigr\rangle

    Args:
        upstream: ∂L/∂ŷ before γ and β, ``(..., n)``.
        normalized: ŷ before γ and β, ``(..., n)``.
        variance: biased variance σ², ``(...)``.
        eps: the layer's epsilon.

    Returns:
        ``(...)`` in float64.
    """
    wide = wide_dtype(upstream.device)
    return eps / (variance.to(wide) + eps).pow(1.5) * dot(upstream.to(wide), normalized.to(wide))


def weight_standardization_epsilon_inner(
    upstream: Tensor, standardized: Tensor, deviation: Tensor, eps: Tensor | float
) -> Tensor:
    r"""Return the ⟨V_i, ∂L/∂V_i⟩ that the ε of weight standardization causes, exactly.

    .. math:: \langle V_i, g_i \rangle = \frac{\varepsilon}{\sigma_i + \varepsilon}
              \Bigl\langle \frac{\partial L}{\partial W_i}, W_i \Bigr\rangle,
              \qquad W_i = P V_i / (\sigma_i + \varepsilon)

    Args:
        upstream: ∂L/∂W, ``(units, n)``.
        standardized: W, ``(units, n)``.
        deviation: σ of the rows of V, biased or not as in W, ``(units,)``.
        eps: ε, added to the deviation.

    Returns:
        ``(units,)`` in float64.
    """
    wide = wide_dtype(upstream.device)
    return eps / (deviation.to(wide) + eps) * dot(upstream.to(wide), standardized.to(wide))
