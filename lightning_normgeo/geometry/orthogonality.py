"""Lemmas 2 and 3 of Sun et al. 2020: scale-invariant weights are orthogonal to their gradients.

If the loss does not change when a unit W is scaled by any α > 0, then ⟨W, ∇W⟩ = 0 (Lemma 2). With the ε > 0 of a real
normalization layer the inner product is not zero but known exactly: see :func:`batch_norm_epsilon_inner` for batch
normalization and :func:`epsilon_inner` for every data-based normalization.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_normgeo.geometry.rows import dot, map_rows, wide_dtype


def cosine(inner: Tensor, squared_a: Tensor, squared_b: Tensor) -> Tensor:
    """Return the cosine ⟨a, b⟩ / (‖a‖‖b‖) from inner products, with 0 where either vector is zero.

    Args:
        inner: ⟨a, b⟩, any shape.
        squared_a: ‖a‖², same shape.
        squared_b: ‖b‖², same shape.

    Returns:
        Cosines in [-1, 1] up to rounding. A unit without gradient (a dead ReLU) counts as orthogonal.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> a, b = torch.randn(2, 3, 8, dtype=torch.float64)
        >>> found = cosine((a * b).sum(1), a.square().sum(1), b.square().sum(1))
        >>> torch.allclose(found, torch.cosine_similarity(a, b))
        True
    """
    return cosine_of_norms(inner, squared_a.sqrt() * squared_b.sqrt())


def cosine_of_norms(inner: Tensor, norms: Tensor) -> Tensor:
    """Return :func:`cosine` from the products ‖a‖‖b‖, of the shape of ``inner``."""
    return torch.where(norms != 0, inner / norms, 0.0)


def weight_gradient_products(weight: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ‖W‖², ⟨W, g⟩ and ‖g‖² of each unit, the inner products of Lemma 3 (eq 15 and 16).

    Args:
        weight: W, ``(units, n)``.
        gradient: g, ``(units, n)``.

    Returns:
        Three tensors ``(units,)``, accumulated in float64 (float32 on devices without it), in units of weight², loss,
        and loss² per weight².

    Cost: one pass over both.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight, gradient = torch.randn(2, 3, 8, dtype=torch.float64)
        >>> weight_sq, inner, gradient_sq = weight_gradient_products(weight, gradient)
        >>> torch.allclose((weight - gradient).square().sum(1), weight_sq - 2 * inner + gradient_sq)
        True
    """
    weight_sq, inner, gradient_sq = map_rows(lambda w, g: (dot(w, w), dot(w, g), dot(g, g)), weight, gradient)
    return weight_sq, inner, gradient_sq


def weight_gradient_cosine(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return cos(W, g) of each unit, which is 0 for a scale-invariant unit up to ε and rounding (Lemma 3, eq 15).

    Args:
        weight: W, ``(units, n)``.
        gradient: g, ``(units, n)``.

    Returns:
        ``(units,)`` in [-1, 1] up to rounding, in float64 (float32 on devices without it); 0 where W or g is zero.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight, target = torch.randn(2, 3, 8, dtype=torch.float64)
        >>> loss = torch.cosine_similarity(weight.requires_grad_(), target).sum()  # does not depend on ‖W‖
        >>> (gradient,) = torch.autograd.grad(loss, weight)
        >>> bool(weight_gradient_cosine(weight, gradient).abs().max() < 1e-12)
        True
    """
    weight_sq, inner, gradient_sq = weight_gradient_products(weight, gradient)
    return cosine(inner, weight_sq, gradient_sq)


def batch_norm_epsilon_inner(gamma: Tensor, gamma_gradient: Tensor, variance: Tensor, eps: Tensor | float) -> Tensor:
    r"""Return the exact ⟨W, g⟩ that the ε of a batch normalization causes; 0 for ε = 0, as in Lemma 3.

    .. math:: \langle W_i, g_i \rangle = \frac{\varepsilon}{\sigma_i^2 + \varepsilon}\, \gamma_i\,
              \frac{\partial L}{\partial \gamma_i}

    Derivation: scaling W by α has the effect of scaling ε by 1/α², so ⟨W, ∂L/∂W⟩ = -2ε ∂L/∂ε. Exact for one backward
    pass through one set of batch statistics; not for a sum over several (accumulated micro-batches, data-parallel
    ranks).

    Args:
        gamma: scale γ, ``(channels,)``.
        gamma_gradient: ∂L/∂γ with the same clipping as the weight's gradient, ``(channels,)``.
        variance: biased batch variance σ² of the pre-activation, ``(channels,)``.
        eps: ε ≥ 0 of the layer.

    Returns:
        ``(channels,)``, in units of loss.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, weight = torch.randn(16, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
        >>> gamma, y = torch.randn(3, dtype=torch.float64).requires_grad_(), x @ weight.requires_grad_().T
        >>> output = torch.nn.functional.batch_norm(y, None, None, gamma, training=True, eps=0.1)
        >>> g, gamma_gradient = torch.autograd.grad(output.pow(3).sum(), (weight, gamma))
        >>> inner = batch_norm_epsilon_inner(gamma, gamma_gradient, y.var(0, correction=0), eps=0.1)
        >>> torch.allclose((weight * g).sum(1), inner)
        True
    """
    return eps / (variance + eps) * gamma * gamma_gradient


def batch_instances(y: Tensor) -> Tensor:
    """View pre-activations as the instances of batch normalization, one unit per channel.

    An *instance* is a vector that is normalized with its own statistics.

    Args:
        y: ``(N, C, ...)``.

    Returns:
        ``(C, 1, N·…)``: units, instances per unit, length of an instance.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> y = torch.randn(4, 3, 5, 5, dtype=torch.float64)
        >>> output = batch_instances(torch.nn.functional.batch_norm(y, None, None, training=True, eps=0.1))
        >>> variance = batch_instances(y).var(-1, correction=0, keepdim=True)
        >>> torch.allclose(output.var(-1, correction=0, keepdim=True), variance / (variance + 0.1))
        True
    """
    return y.movedim(1, 0).flatten(1).unsqueeze(1)


def group_instances(y: Tensor, groups: int) -> Tensor:
    """View pre-activations as the instances of group, layer or instance normalization, one unit per group of channels.

    An *instance* is a vector that is normalized with its own statistics.

    Args:
        y: ``(N, C, ...)``. For a layer normalization of the last dimension alone: ``y.flatten(0, -2)`` and one group.
        groups: number of groups, a divisor of C; 1 for layer normalization over everything, C for instance
            normalization.

    Returns:
        ``(groups, N, C/groups·…)``: units, instances per unit, length of an instance.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> y = torch.randn(4, 6, 5, 5, dtype=torch.float64)
        >>> output = group_instances(torch.nn.functional.group_norm(y, 2, eps=0.1), 2)
        >>> variance = group_instances(y, 2).var(-1, correction=0, keepdim=True)
        >>> torch.allclose(output.var(-1, correction=0, keepdim=True), variance / (variance + 0.1))
        True
    """
    return y.reshape(y.shape[0], groups, -1).movedim(1, 0)


def epsilon_inner(upstream: Tensor, normalized: Tensor, variance: Tensor, eps: Tensor | float) -> Tensor:
    r"""Return the exact ⟨W, g⟩ of each unit that the ε of any data-based normalization causes (0 for ε = 0, Lemma 3).

    .. math:: \langle W, g \rangle = \sum_k \frac{\varepsilon}{\sigma_k^2 + \varepsilon}
              \Bigl\langle \frac{\partial L}{\partial \hat y_k}, \hat y_k \Bigr\rangle

    The sum is over the instances k that the unit contributes to, each normalized with its own statistics;
    :func:`batch_instances` and :func:`group_instances` bring tensors into this shape. A bias of the layer that does not
    cancel (GN, LN) belongs to the unit: the left side is then ⟨W, g⟩ + ⟨b, ∂L/∂b⟩. For RMS normalization give mean
    squares instead of variances.

    Derivation: as for :func:`batch_norm_epsilon_inner`, which is the special case of one instance with its own γ.

    Args:
        upstream: ∂L/∂ŷ before γ and β, that is γ times the gradient of the output, ``(units, instances, n)``.
        normalized: ŷ before γ and β, ``(units, instances, n)``.
        variance: biased variance σ² of each instance, ``(units, instances)``.
        eps: ε ≥ 0 of the layer.

    Returns:
        ``(units,)`` in float64 (float32 on devices without it), in units of loss.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, weight = torch.randn(2, 3, 5, 5, dtype=torch.float64), torch.randn(4, 3, 1, 1, dtype=torch.float64)
        >>> y = torch.nn.functional.conv2d(x, weight.requires_grad_())
        >>> output = torch.nn.functional.group_norm(y, 2, eps=0.1)
        >>> (g,) = torch.autograd.grad(output.pow(3).sum(), weight)
        >>> normalized, variance = group_instances(output, 2), group_instances(y, 2).var(-1, correction=0)
        >>> inner = epsilon_inner(3 * normalized.square(), normalized, variance, eps=0.1)
        >>> torch.allclose((weight * g).view(2, -1).sum(1), inner)
        True
    """
    wide = wide_dtype(upstream.device)
    return (eps / (variance.to(wide) + eps) * dot(upstream.to(wide), normalized.to(wide))).sum(-1)


def preactivation_epsilon_inner(upstream: Tensor, normalized: Tensor, variance: Tensor, eps: Tensor | float) -> Tensor:
    r"""Return ⟨∂L/∂y, ŷ⟩ of each instance, the term of Santurkar et al. 2018 that vanishes for ε = 0 (appendix 5.4).

    .. math:: \Bigl\langle \frac{\partial L}{\partial y}, \hat y \Bigr\rangle = \frac{\varepsilon}
              {(\sigma^2 + \varepsilon)^{3/2}} \Bigl\langle \frac{\partial L}{\partial \hat y}, \hat y \Bigr\rangle

    Args:
        upstream: ∂L/∂ŷ before γ and β, ``(..., n)``.
        normalized: ŷ before γ and β, ``(..., n)``.
        variance: biased variance σ², ``(...)``.
        eps: ε ≥ 0 of the layer.

    Returns:
        ``(...)`` in float64 (float32 on devices without it), in units of loss per unit of y.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> y = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
        >>> normalized = torch.nn.functional.layer_norm(y, (8,), eps=0.1)
        >>> (g,) = torch.autograd.grad(normalized.pow(3).sum(), y)
        >>> upstream, variance = 3 * normalized.square(), y.var(-1, correction=0)
        >>> inner = preactivation_epsilon_inner(upstream, normalized, variance, eps=0.1)
        >>> torch.allclose((g * normalized).sum(-1), inner)
        True
    """
    wide = wide_dtype(upstream.device)
    return eps / (variance.to(wide) + eps).pow(1.5) * dot(upstream.to(wide), normalized.to(wide))


def weight_standardization_epsilon_inner(
    upstream: Tensor, standardized: Tensor, deviation: Tensor, eps: Tensor | float
) -> Tensor:
    r"""Return the exact ⟨V_i, ∂L/∂V_i⟩ that the ε of weight standardization causes; 0 for ε = 0, as in Lemma 3.

    .. math:: \langle V_i, g_i \rangle = \frac{\varepsilon}{\sigma_i + \varepsilon}
              \Bigl\langle \frac{\partial L}{\partial W_i}, W_i \Bigr\rangle,
              \qquad W_i = P V_i / (\sigma_i + \varepsilon)

    Args:
        upstream: ∂L/∂W, ``(units, n)``.
        standardized: W, ``(units, n)``.
        deviation: standard deviation σ of the rows of V, biased or unbiased as in W, ``(units,)``.
        eps: ε ≥ 0, added to the deviation.

    Returns:
        ``(units,)`` in float64 (float32 on devices without it), in units of loss.

    Example:
        >>> import torch
        >>> from lightning_normgeo.geometry import weight_standardization
        >>> _ = torch.manual_seed(0)
        >>> v = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
        >>> w = weight_standardization(v, eps=0.1)
        >>> (g,) = torch.autograd.grad(w.pow(3).sum(), v)
        >>> inner = weight_standardization_epsilon_inner(3 * w.square(), w, v.std(1, correction=0), eps=0.1)
        >>> torch.allclose((v * g).sum(1), inner)
        True
    """
    wide = wide_dtype(upstream.device)
    return eps / (deviation.to(wide) + eps) * dot(upstream.to(wide), standardized.to(wide))
