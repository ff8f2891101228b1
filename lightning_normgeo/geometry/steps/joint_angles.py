r"""Angular updates of slices that are scale invariant only together, such as all writers of a residual stream.

A generator with exponents s_i > 0 scales its slices as :math:`e^{s_i t} W_i`. The angle of an update is taken between
the concatenations of :math:`\psi_i = \sqrt{s_i} W_i` before and after it, because this is the scaling for which the
identities of a single unit stay exact. With D_i = W_i⁺ - W_i and :math:`Q = \sum_i s_i\lVert W_i\rVert^2 =
\lVert\psi\rVert^2`, the radial part of the update is :math:`\rho = \sum_i s_i\langle W_i, D_i\rangle / Q`. For a step
along the gradient the numerator is -η times the charge, and so zero. The increment is

.. math:: \Delta Q = 2\sum_i s_i\langle W_i, D_i\rangle + \sum_i s_i\lVert D_i\rVert^2
          = \bigl((1+\rho)^2 - 1\bigr)Q + \lVert\psi_\perp\rVert^2

Where all exponents are 1, which is the usual case, this is the plain angle between the concatenated weights, and it
does not depend on the scale of the block. With different exponents it does, since the symmetry then moves ψ along a
curve and not along a ray; it is the angle at the current point.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_normgeo.geometry.charges import conserved_quantity
from lightning_normgeo.geometry.increments.increment_terms import Scalar
from lightning_normgeo.geometry.steps.angles import UpdateProducts, effective_lr


def joint_update_products(exponents: Tensor, products: UpdateProducts) -> UpdateProducts:
    r"""Return the inner products of an update of the slices of each generator together.

    Pass them to :func:`split_update` for the joint radial part, tangential part and angle. ‖D_⊥‖² is
    :math:`\sum_i s_i(\lVert D_{\perp i}\rVert^2 + (\rho_i - \rho)^2\lVert W_i\rVert^2)`, in which nothing cancels.
    Generators with a negative exponent have no joint direction: their products are NaN.

    Args:
        exponents: s, ``(generators, slices)``, dense or sparse.
        products: those of each slice, ``(slices,)``, as from :func:`update_products`.

    Returns:
        The products of the concatenated :math:`\sqrt{s_i} W_i`, each ``(generators,)``, in units of weight².

    Cost: a few sums over the entries of the matrix.

    Example:
        >>> import torch
        >>> from lightning_normgeo.geometry import angular_update, split_update, update_products
        >>> _ = torch.manual_seed(0)
        >>> weight, new_weight = torch.randn(2, 3, 8, dtype=torch.float64)
        >>> exponents = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 2.0]], dtype=torch.float64)
        >>> angles = split_update(joint_update_products(exponents, update_products(weight, new_weight))).angle
        >>> joined = [(s.sqrt()[:, None] * torch.stack([weight, new_weight])).flatten(1)[:, None] for s in exponents]
        >>> torch.allclose(angles, torch.cat([angular_update(*pair) for pair in joined]))
        True
    """
    rows, columns, values = _entries(exponents, products.weight_sq)
    size = exponents.shape[0]

    def summed(parts: Tensor) -> Tensor:
        return parts.new_zeros(size).index_add(0, rows, values * parts)

    weight_sq, weight_update, update_sq, tangential_sq = (column[columns] for column in products)
    whole_sq, whole_update = summed(weight_sq), summed(weight_update)
    radial = whole_update / torch.where(whole_sq > 0, whole_sq, 1.0)
    own = weight_update / torch.where(weight_sq > 0, weight_sq, 1.0)
    across = summed(tangential_sq + (own - radial[rows]).square() * weight_sq)
    mixed = values.new_zeros(size).index_add(0, rows, (values < 0).to(values.dtype)) > 0
    joint = (whole_sq, whole_update, summed(update_sq), across)
    return UpdateProducts(*(torch.where(mixed, torch.nan, column) for column in joint))


def joint_effective_lr(exponents: Tensor, lr: Scalar, weight_sq: Tensor) -> Tensor:
    r"""Return :math:`\eta / \sum_i s_i\lVert W_i\rVert^2`, the learning rate of the joint direction of each generator.

    Exact for SGD where all exponents are 1, as :func:`effective_lr` for one unit: the direction of the concatenated
    weights moves as under SGD on the sphere with this rate.

    Args:
        exponents: s ≥ 0, ``(generators, slices)``, dense or sparse.
        lr: η, the same for all slices.
        weight_sq: ‖W_i‖², ``(slices,)``.

    Returns:
        ``(generators,)``, in units of η per weight²; 0 where all slices are zero, and for a rescaling with Q ≤ 0.

    Cost: one product of a sparse matrix with a vector.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight, target = torch.randn(2, 2, 8, dtype=torch.float64)
        >>> loss = lambda w: torch.cosine_similarity(w.flatten(), target.flatten(), dim=0)  # two slices, jointly
        >>> gradient, norm = torch.func.grad(loss), weight.norm()
        >>> rate = joint_effective_lr(torch.ones(1, 2, dtype=torch.float64), 0.1, weight.square().sum(1))
        >>> torch.allclose((weight - 0.1 * gradient(weight)) / norm, weight / norm - rate * gradient(weight / norm))
        True
    """
    return effective_lr(lr, conserved_quantity(exponents, weight_sq))


def _entries(exponents: Tensor, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, column and value of each entry that is not zero, with the values in the precision of ``like``."""
    found = (exponents if exponents.is_sparse else exponents.to_sparse()).coalesce()
    rows, columns = found.indices().to(like.device)
    return rows, columns, found.values().to(like)
