"""Spectrum and range of a covariance matrix from its columns, by the eigenvalues of the smaller Gram matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 2
"""Singular values up to this many ε(dtype) × ‖X‖ are rounding: half an ε moves them by at most half of that (Weyl)."""
_GRAM = 64
"""Eigenvalues of a Gram matrix up to this many ε × the largest one are rounding of its own."""


@dataclass(frozen=True)
class ExactSpectrum:
    """Eigenvalues of Σ_X for each of G matrices X with the same shape, and an orthonormal basis of its range.

    Attributes:
        eigenvalues: the min(n, N) largest, descending, in units of x²: ``(G, min(n, N))``.
        rank: number of eigenvalues above rounding, ``(G,)``, integers.
        basis: orthonormal columns that span the range, followed by columns of zeros: ``(G, n, min(n, N))``. Empty if
            all ranks are n, so that it would be any basis.
    """

    eigenvalues: Tensor
    rank: Tensor
    basis: Tensor

    def kernel_share(self, weight: Tensor) -> Tensor:
        """Return 1 - ‖P W_i‖²/‖W_i‖² with the projection P onto the range, for rows ``(G, m, n)``: ``(G, m)``.

        It is 0 at full rank, and for W_i = 0.
        """
        weight = weight.to(self.basis)
        total = weight.square().sum(2)
        inside = (weight @ self.basis).square().sum(2)
        share = 1 - inside / total.clamp_min(torch.finfo(total.dtype).tiny)
        nothing = (total == 0) | (self.rank == self.basis.shape[1])[:, None]
        return torch.where(nothing, 0.0, share).clamp(0, 1)


def exact_spectrum(x: Tensor, stored: torch.dtype | None = None, with_basis: bool = True) -> ExactSpectrum:
    r"""Return the spectrum of :math:`\Sigma_X = (X - \bar X)(X - \bar X)^T / N` (below eq 11 of Sun et al. 2020).

    A singular value of the centered X counts for the rank if it exceeds 2 ε(stored) ‖X‖, with the rounding unit of the
    dtype in which the data was stored (2.4e-7 ‖X‖ for float32). Rounding of the data moves none by more than a quarter
    of that, by Weyl's inequality. For float64 data the limit is that of the Gram matrix, 1.2e-7 times the largest
    singular value.

    Args:
        x: X, ``(G, n, N)`` in float64, one input vector per column.
        stored: dtype in which the data was stored. Default: that of ``x``.
        with_basis: whether to compute the basis of the range where it is not the whole space.

    Returns:
        The spectrum of each of the G matrices.

    Cost: G·n·N·min(n, N) multiplications and an eigenvalue decomposition of size min(n, N).

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(1, 20, 3, dtype=torch.float64) @ torch.randn(1, 3, 50, dtype=torch.float64)
        >>> exact_spectrum(x).rank.tolist()
        [3]
    """
    samples = x.shape[2]
    floor = ROUNDING * torch.finfo(stored or x.dtype).eps
    energy = x.square().sum((1, 2))
    x = x - x.mean(2, keepdim=True)
    few = samples < x.shape[1]
    gram = x.mT @ x if few else x @ x.mT
    values = torch.linalg.eigvalsh(gram).flip(1).clamp_min(0)
    limit = torch.maximum(floor**2 * energy, _GRAM * torch.finfo(x.dtype).eps * values[:, 0])
    inside = values > limit[:, None]
    rank = inside.sum(1)
    basis = x[:, :, :0]
    if with_basis and (rank < x.shape[1]).any():
        vectors = torch.linalg.eigh(gram).eigenvectors.flip(2)
        basis = (_left_vectors(x, vectors, values, inside) if few else vectors) * inside[:, None]
    return ExactSpectrum(values / samples, rank, basis)


def _left_vectors(x: Tensor, right: Tensor, values: Tensor, inside: Tensor) -> Tensor:
    """Return left singular vectors from right ones, orthonormal also where the singular values are small."""
    columns = x @ right * torch.where(inside, values, torch.inf).rsqrt()[:, None]
    return torch.linalg.qr(columns).Q  # type: ignore[no-any-return]
