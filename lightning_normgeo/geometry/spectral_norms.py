r"""Spectral norms of the linear maps that layers are: convolutions with their stride and padding, by Lanczos' method.

The spectral norm is the largest factor by which a layer lengthens a change of its input, :math:`\max_x \lVert
Ax\rVert / \lVert x\rVert`, and of a convolution it depends on stride, padding and the size of its input. The largest
singular value of the reshaped kernel (as in torch's ``spectral_norm``) is another number, that of the circular
convolution (Sedghi et al. 2019) is wrong by percents on small feature maps, and so are a few power iterations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_normgeo.geometry.rows import wide_dtype

Operator = Callable[[Tensor], Tensor]
"""A linear function of a tensor."""
_CONVOLUTIONS: dict[int, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    1: (F.conv1d, F.conv_transpose1d),
    2: (F.conv2d, F.conv_transpose2d),
    3: (F.conv3d, F.conv_transpose3d),
}
"""Convolution and transposed convolution by the number of spatial dimensions."""


@dataclass(frozen=True)
class SpectralNorm:
    r"""The spectral norm of an operator as Lanczos' method finds it.

    Attributes:
        value: estimate of the largest singular value. It is ‖Av‖ for a unit vector v, so never too large but for
            rounding.
        residual: bound on the error: some singular value of A is within ``residual`` of ``value``. For a random start
            that is the largest one, but no finite number of steps proves it. The error is usually much smaller, of the
            order of residual² over the distance to the next singular value.
        steps: number of steps, each with one product with A and one with Aᵀ.
    """

    value: float
    residual: float
    steps: int


def largest_singular_value(
    operator: Operator, example: Tensor, steps: int = 30, tolerance: float | None = None, seed: int = 0
) -> SpectralNorm:
    r"""Return the spectral norm of a linear operator by Lanczos' method with full reorthogonalization.

    Lanczos on :math:`A^T A` (or on :math:`AA^T`, if that is smaller) gives a tridiagonal matrix, whose largest
    eigenvalue θ is the best approximation in the Krylov space: :math:`\sqrt\theta`. With its eigenvector s and the last
    off-diagonal entry β the residual is :math:`\beta\lvert s_k\rvert`, and some eigenvalue of :math:`A^T A` is at most
    that far from θ (Parlett 1998, section 13.2). Products with :math:`A^T` are gradients of :math:`\langle u, Ax
    \rangle`, so that any linear function that autograd can follow will do.

    Args:
        operator: A, linear, without a constant part.
        example: any input of A; its shape, device and dtype count, its values do not. Half precision is as fine as
            ``operator`` computes in.
        steps: largest number of steps, at least 1.
        tolerance: relative residual of θ at which to stop. Default: 8 times the rounding of the dtype.
        seed: of the start vector, which has a generator of its own.

    Returns:
        The norm with its bound; NaN for an operator with values that are not finite.

    Cost: ``steps`` products with A and with Aᵀ, and the memory of ``steps`` vectors in float64.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> matrix = torch.randn(6, 9, dtype=torch.float64)
        >>> found = largest_singular_value(lambda x: x @ matrix.T, torch.zeros(9, dtype=torch.float64))
        >>> abs(found.value - float(torch.linalg.matrix_norm(matrix, 2))) < 1e-12
        True
    """
    tolerance = 8 * torch.finfo(example.dtype).eps if tolerance is None else tolerance
    with torch.inference_mode(False), torch.enable_grad():
        start = torch.zeros_like(example, requires_grad=True)
        image = operator(start)
        forward, backward = _products(operator, start, image)
        if image.numel() >= example.numel():
            return _norm_of(forward, backward, _unit_vector(example.shape, example, seed), steps, tolerance)
        return _norm_of(backward, forward, _unit_vector(image.shape, example, seed), steps, tolerance)


def convolution_norm(
    weight: Tensor,
    input_size: Sequence[int],
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    transposed: bool = False,
    steps: int = 30,
) -> SpectralNorm:
    """Return the spectral norm of a convolution with zero padding, as the map from one input to its output.

    Args:
        weight: ``(out, in/groups, …)``, or ``(in, out/groups, …)`` for a transposed convolution, with one to three
            spatial dimensions.
        input_size: positions of the input in each spatial dimension, in pixels.
        stride: in pixels, as in the convolution; so are the others.
        padding: in pixels, with zeros.
        dilation: in pixels.
        groups: number of groups of channels.
        transposed: whether the convolution is transposed.
        steps: largest number of Lanczos' steps.

    Returns:
        The norm with its bound, see :func:`largest_singular_value`.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
        >>> found = convolution_norm(weight, (8, 8), stride=2, padding=1, steps=60)
        >>> basis = torch.eye(3 * 8 * 8, dtype=torch.float64).view(-1, 3, 8, 8)
        >>> dense = torch.nn.functional.conv2d(basis, weight, stride=2, padding=1).flatten(1)
        >>> abs(found.value - float(torch.linalg.matrix_norm(dense, 2))) < 1e-9
        True
    """
    weight = weight.detach()
    function = _CONVOLUTIONS[weight.ndim - 2][transposed]
    channels = weight.shape[0] if transposed else weight.shape[1] * groups
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    example = weight.new_empty(1, channels, *input_size)
    return largest_singular_value(lambda x: function(x, weight, **settings), example, steps)


def _products(operator: Operator, start: Tensor, image: Tensor) -> tuple[Operator, Operator]:
    """Return the products with A and with Aᵀ of vectors in the wide dtype."""
    wide = wide_dtype(start.device)

    def forward(v: Tensor) -> Tensor:
        with torch.no_grad():
            return operator(v.view(start.shape).to(start.dtype)).flatten().to(wide)

    def backward(u: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(image, start, u.view(image.shape).to(image.dtype), retain_graph=True)
        return found.flatten().to(wide)

    return forward, backward


def _unit_vector(shape: torch.Size, like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(shape.numel(), generator=generator, dtype=torch.float64)
    v /= torch.linalg.vector_norm(v)
    return v.to(like.device, wide_dtype(like.device))


def _norm_of(operator: Operator, adjoint: Operator, start: Tensor, steps: int, tolerance: float) -> SpectralNorm:
    """Return the spectral norm of an operator on vectors, from a unit vector on."""
    scale = float(torch.linalg.vector_norm(operator(start)))
    if scale == 0 or not math.isfinite(scale):
        found = 0.0 if scale == 0 else math.nan
        return SpectralNorm(found, found, 0)
    # without the scale the squares of tiny and of huge weights would leave the range of floats
    theta, residual, count = _lanczos(lambda v: adjoint(operator(v) / scale) / scale, start, steps, tolerance)
    root = math.sqrt(theta)
    # |λ - θ| = |σ' - σ| (σ' + σ) ≥ |σ' - σ| σ
    return SpectralNorm(scale * root, scale * residual / root, count)


def _lanczos(product: Operator, start: Tensor, steps: int, tolerance: float) -> tuple[float, float, int]:
    """Return the largest Ritz value of a symmetric operator, its residual, and the number of steps.

    Args:
        product: the operator, on vectors.
        start: unit vector.
        steps: largest number of steps.
        tolerance: relative residual at which to stop.
    """
    basis = start.new_empty(min(steps, len(start)), len(start))
    diagonal: list[float] = []
    beside: list[float] = []
    v, theta, residual = start, math.nan, math.nan
    for count in range(1, len(basis) + 1):
        basis[count - 1] = v
        w = product(v)
        diagonal.append(float(w @ v))
        known = basis[:count]
        for _ in range(2):  # once leaves what rounding makes of a long w; twice is enough (Giraud et al. 2005)
            w = w - known.T @ (known @ w)
        beside.append(float(w.norm()))
        theta, last = _largest_pair(diagonal, beside[:-1])
        residual = beside[-1] * abs(last)
        if residual <= tolerance * theta or beside[-1] == 0:
            break
        v = w / beside[-1]
    return theta, residual, len(diagonal)


def _largest_pair(diagonal: Sequence[float], beside: Sequence[float]) -> tuple[float, float]:
    """Return the largest eigenvalue of a tridiagonal matrix, and the last entry of its eigenvector."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        edge = torch.tensor(beside, dtype=torch.float64)
        matrix = matrix + torch.diag(edge, 1) + torch.diag(edge, -1)
    values, vectors = torch.linalg.eigh(matrix)
    return float(values[-1]), float(vectors[-1, -1])
