r"""Charges and conserved quantities of scale symmetries, from sums over slices of the parameters.

A *generator* of a scale symmetry is a vector of exponents s, one for each slice W_i of the parameters: the loss is the
same for all :math:`e^{s_i t} W_i`. The derivative at t = 0 is its *charge* :math:`\sum_i s_i\langle W_i, g_i\rangle`,
which is therefore zero. Lemma 2 of Sun et al. 2020 is the case of one slice, and Kunin et al. 2021 ("Neural Mechanics")
call :math:`Q = \sum_i s_i\lVert W_i\rVert^2` the conserved quantity: gradient flow leaves it as it is.

All functions take the exponents of several generators as a matrix of shape ``(generators, slices)``, dense or sparse
(COO), and one number per slice. Slices of one parameter may overlap, such as its rows and its columns: sums of s_i x_i
are still exact, since the exponents of an element add up; sums of \|s_i\| and of s_i² count the overlap twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_normgeo.geometry.increments.increment_terms import IncrementTerms


def charge(exponents: Tensor, inner: Tensor) -> Tensor:
    r"""Return the charge :math:`\sum_i s_i\langle W_i, g_i\rangle` of each generator; 0 for a symmetry of the loss.

    It generalizes Lemma 2 and eq 15 to several slices.

    Args:
        exponents: s, ``(generators, slices)``, dense or sparse.
        inner: ⟨W_i, g_i⟩, ``(slices,)``, in units of loss.

    Returns:
        ``(generators,)``, in units of loss.

    Cost: one product of a sparse matrix with a vector.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> first, second, x = torch.randn(3, 5, dtype=torch.float64)
        >>> loss = lambda a, b: (torch.relu(a * x) * b).sum().tanh()  # a·e^t and b·e^-t give the same loss
        >>> gradients = torch.func.grad(loss, (0, 1))(first, second)
        >>> inner = torch.stack([first @ gradients[0], second @ gradients[1]])
        >>> bool(charge(torch.tensor([[1.0, -1.0]]), inner).abs() < 1e-15)
        True
    """
    return _applied(exponents, inner)


def epsilon_part(x: Tensor, gradient: Tensor, eps: float, axes: Sequence[int], centered: bool = True) -> Tensor:
    r"""Return the part of a charge that the ε of a normalization causes, for each of its statistics.

    A normalization :math:`\hat y = (x - m)/\sqrt{s^2 + \varepsilon}` removes the scale of its input up to ε: if the
    input is multiplied by :math:`e^{d t}`, the loss changes as if ε were multiplied by :math:`e^{-2 d t}`. The charge
    of a symmetry is therefore, instead of 0,

    .. math:: \sum_{\text{normalizations}} \sum_n d_n \frac{\varepsilon}{s_n^2 + \varepsilon}
       \langle \partial L/\partial \hat y_n, \hat y_n\rangle

    with the sum over all statistics n, and the degree d_n of what each of them normalizes. For one filter in front of a
    batch normalization this is ε/(s² + ε)·γ·∂L/∂γ.

    Args:
        x: input of the normalization.
        gradient: :math:`\partial L/\partial\hat y`, of the shape of x: that of the output times γ.
        eps: ε.
        axes: axes that a statistic is taken over.
        centered: whether the mean is subtracted; not so for RMS normalization.

    Returns:
        One number for each statistic, with size 1 along ``axes``, in units of loss.

    Cost: a few passes over x.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, target = torch.randn(2, 5, 4, dtype=torch.float64)
        >>> w = torch.randn(4, dtype=torch.float64, requires_grad=True)
        >>> y = x * w
        >>> hat = (y - y.mean(0)) / (y.var(0, unbiased=False) + 0.5).sqrt()
        >>> (hat - target).square().sum().backward()
        >>> part = epsilon_part(y.detach(), 2 * (hat - target).detach(), 0.5, [0])
        >>> torch.allclose(w * w.grad, part[0])
        True
    """
    axes = list(axes)
    mean = x.mean(axes, keepdim=True) if centered else torch.zeros_like(x)
    centered_x = x - mean
    variance = centered_x.square().mean(axes, keepdim=True)
    inner = (gradient * centered_x).sum(axes, keepdim=True) / (variance + eps).sqrt()
    return eps / (variance + eps) * inner


def normalized_charge(exponents: Tensor, inner: Tensor, weight_sq: Tensor, gradient_sq: Tensor) -> Tensor:
    r"""Return the charge divided by :math:`\sqrt{\sum_i s_i^2\lVert W_i\rVert^2\cdot\sum_i\lVert g_i\rVert^2}`.

    The second sum is over the slices of the generator. It is the cosine between the direction (s_i W_i) of the symmetry
    and the gradient, for one slice the cosine of W and g of eq 15. Where the gradient is rounding alone, as of a bias
    that a normalization removes, the quotient is one of rounding errors.

    Args:
        exponents: s, ``(generators, slices)``, dense or sparse.
        inner: ⟨W_i, g_i⟩, ``(slices,)``.
        weight_sq: ‖W_i‖², ``(slices,)``.
        gradient_sq: ‖g_i‖², ``(slices,)``.

    Returns:
        ``(generators,)``, dimensionless, in [-1, 1]; 0 where W or g is zero.

    Cost: three sums over the entries of the matrix.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight, gradient = torch.randn(2, 3, 5, dtype=torch.float64)
        >>> exponents = torch.tensor([[1.0, -1.0, 2.0]], dtype=torch.float64)
        >>> products = (weight * gradient).sum(1), weight.square().sum(1), gradient.square().sum(1)
        >>> scaled = exponents.T * weight
        >>> cosine = torch.cosine_similarity(scaled.flatten(), gradient.flatten(), dim=0)
        >>> torch.allclose(normalized_charge(exponents, *products), cosine)
        True
    """
    along = _applied(_entrywise(exponents, torch.square), weight_sq)
    across = _applied(_entrywise(exponents, lambda s: (s != 0).to(s.dtype)), gradient_sq)
    size = along.sqrt() * across.sqrt()
    return _divided(charge(exponents, inner), size)


def conserved_quantity(exponents: Tensor, weight_sq: Tensor) -> Tensor:
    r"""Return :math:`Q = \sum_i s_i\lVert W_i\rVert^2` of each generator, which gradient flow conserves.

    A step of plain SGD changes it by exactly :math:`\eta^2\sum_i s_i\lVert g_i\rVert^2`, which generalizes eq 16. If
    all exponents are positive (scale invariance), Q only grows; if they have both signs (rescaling), Q tells which
    side is longer.

    Args:
        exponents: s, ``(generators, slices)``, dense or sparse.
        weight_sq: ‖W_i‖², ``(slices,)``, in units of weight².

    Returns:
        ``(generators,)``, in units of weight²; negative values only with negative exponents.

    Cost: one product of a sparse matrix with a vector.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weights, x = torch.randn(2, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
        >>> loss = lambda w: (torch.relu(w[0] * x) * w[1]).sum().tanh()
        >>> gradient = torch.func.grad(loss)(weights)
        >>> quantity = lambda w: conserved_quantity(torch.tensor([[1.0, -1.0]]), w.square().sum(1))
        >>> predicted = 0.1**2 * (gradient[0].square().sum() - gradient[1].square().sum())
        >>> torch.allclose(quantity(weights - 0.1 * gradient) - quantity(weights), predicted)
        True
    """
    return _applied(exponents, weight_sq)


def quantity_increment(exponents: Tensor, terms: IncrementTerms) -> IncrementTerms:
    r"""Return the terms of the increment of :math:`Q = \sum_i s_i\lVert W_i\rVert^2` in one optimizer step.

    Each term is :math:`\sum_i s_i` times that term of slice i, for any optimizer whose terms are known. Under SGD with
    any momentum and decay, ``gradient`` is the charge times a common factor, and therefore zero. Under optimizers that
    scale elements, such as AdamW, it is not: they do not conserve Q even at small learning rates.

    Args:
        exponents: s, ``(generators, slices)``, dense or sparse.
        terms: terms of ‖W_i⁺‖² - ‖W_i‖² of each slice, each ``(slices,)``, as from :func:`norm_increment`.

    Returns:
        Four terms, each ``(generators,)``, in units of weight². ``quadratic`` may be negative where exponents are.

    Cost: four products of a sparse matrix with a vector.

    Example:
        >>> import torch
        >>> from lightning_normgeo.geometry import SGDRule, norm_increment
        >>> _ = torch.manual_seed(0)
        >>> weight, gradient = torch.randn(2, 3, 5, dtype=torch.float64)
        >>> exponents = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -2.0]], dtype=torch.float64)
        >>> rule = SGDRule(lr=0.1, weight_decay=0.01)
        >>> after = weight - rule.lr * (gradient + rule.weight_decay * weight)
        >>> quantities = [conserved_quantity(exponents, w.square().sum(1)) for w in (weight, after)]
        >>> explained = quantity_increment(exponents, norm_increment(rule, weight, gradient)).total
        >>> torch.allclose(explained, quantities[1] - quantities[0])
        True
    """
    return IncrementTerms(*(_applied(exponents, term) for term in terms))


def imbalance(exponents: Tensor, weight_sq: Tensor) -> Tensor:
    r"""Return :math:`\sum_i s_i\lVert W_i\rVert^2 / \sum_i |s_i|\lVert W_i\rVert^2` of each generator.

    0 where the growing and the shrinking slices of a rescaling balance, which is the shortest point of its orbit;
    ±1 where one side is zero, and for all scale-invariant blocks.

    Args:
        exponents: s, ``(generators, slices)``, dense or sparse.
        weight_sq: ‖W_i‖², ``(slices,)``.

    Returns:
        ``(generators,)``, dimensionless, in [-1, 1]; 0 where all slices are zero.

    Cost: two products of a sparse matrix with a vector.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight_sq, exponents = torch.rand(2).double(), torch.tensor([[1.0, -1.0], [1.0, 1.0]]).double()
        >>> c = (weight_sq[1] / weight_sq[0]).log() / 4  # the coefficient of the shortest point
        >>> balanced = weight_sq * (2 * c * exponents[0]).exp()
        >>> torch.allclose(imbalance(exponents, balanced), torch.tensor([0.0, 1.0], dtype=torch.float64))
        True
    """
    size = _applied(_entrywise(exponents, torch.abs), weight_sq)
    return _divided(conserved_quantity(exponents, weight_sq), size)


def _applied(exponents: Tensor, values: Tensor) -> Tensor:
    """Return the product of the matrix with a vector, in the precision and on the device of the vector."""
    result: Tensor = exponents.to(values) @ values
    return result


def _entrywise(exponents: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return a function of each entry that is not zero; it has to leave zeros as they are."""
    if not exponents.is_sparse:
        return function(exponents)
    found = exponents.coalesce()
    return torch.sparse_coo_tensor(
        found.indices(), function(found.values()), found.shape, check_invariants=False, is_coalesced=True
    )


def _divided(value: Tensor, size: Tensor) -> Tensor:
    alive = size != 0
    return torch.where(alive, value / torch.where(alive, size, 1.0), 0.0).clamp(-1.0, 1.0)
