"""Leading eigenvalues, trace and effective rank of a covariance, with the error that random probes leave."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normgeo.geometry.input_covariance.exact_spectrum import ExactSpectrum
from lightning_normgeo.geometry.input_covariance.patch_map import PatchMap, covariance_product
from lightning_normgeo.geometry.rows import wide_dtype

_ROUNDING = 4
"""Relative error of products in units of ε of their dtype, as part of the error of tr Σ²."""


def participation_ratio(trace: Tensor, square_trace: Tensor) -> Tensor:
    r"""Return the effective rank :math:`\mathrm{tr}(\Sigma)^2 / \mathrm{tr}(\Sigma^2)`; 0 where Σ = 0.

    It is r for r equal eigenvalues, and at most the rank.

    Args:
        trace: tr Σ, of any shape.
        square_trace: tr Σ², of the same shape.

    Returns:
        A number of dimensions, at least 1 where Σ ≠ 0.

    Example:
        >>> import torch
        >>> eigenvalues = torch.tensor([2.0, 2.0, 2.0, 0.0])
        >>> participation_ratio(eigenvalues.sum(), eigenvalues.square().sum()).item()
        3.0
    """
    return torch.where(square_trace <= 0, torch.zeros_like(trace), trace.square() / square_trace)


@dataclass(frozen=True)
class InputSpectrum:
    """Spectrum of the covariances Σ_X of G groups. All tensors are float64.

    Attributes:
        trace: tr Σ, exact, ``(G,)``.
        square_trace: tr Σ², ``(G,)``; unbiased if it is from probes.
        square_trace_error: its standard error over the probes, with that of rounding, ``(G,)``; 0 if it is exact.
        eigenvalues: leading eigenvalues, descending, ``(G, k)``. Those from probes are never above the true ones.
        residuals: ‖Σv - λv‖ of each, ``(G, k)``: an eigenvalue lies within that distance. 0 if they are exact.
    """

    trace: Tensor
    square_trace: Tensor
    square_trace_error: Tensor
    eigenvalues: Tensor
    residuals: Tensor

    @property
    def effective_rank(self) -> Tensor:
        """The participation ratio tr(Σ)²/tr(Σ²) of each group."""
        return participation_ratio(self.trace, self.square_trace)

    @property
    def effective_rank_error(self) -> Tensor:
        """Its standard error to first order."""
        relative = self.square_trace_error / self.square_trace
        return torch.where(self.square_trace <= 0, 0.0, self.effective_rank * relative)


def spectrum_of(exact: ExactSpectrum) -> InputSpectrum:
    """Return the traces of an exact spectrum, and its eigenvalues without errors."""
    values = exact.eigenvalues
    trace, square = values.sum(1), values.square().sum(1)
    return InputSpectrum(trace, square, torch.zeros_like(square), values, torch.zeros_like(values))


def probed_spectrum(x: Tensor, layer: PatchMap, sketch: Tensor, probes: Tensor) -> InputSpectrum:
    r"""Return the spectrum of Σ_X from products with random vectors, without forming Σ_X.

    A block Krylov space, spanned by Σ S and Σ² S of random vectors S, gives an orthonormal basis Q of 2m directions. In
    it eigenvalues are those of :math:`Q^T \Sigma Q` (Rayleigh-Ritz: from below, with residuals), and

    .. math:: \mathrm{tr}\,\Sigma^2 = \lVert \Sigma Q\rVert^2 + \mathbb E\,\lVert \Sigma (1 - Q Q^T) z\rVert^2

    is exact in the basis and estimated by Hutchinson's random signs z outside of it (Hutch++, Meyer et al. 2021), where
    little is left. tr Σ is exact.

    Args:
        x: input of the layer with its padding (:meth:`PatchMap.padded`).
        layer: the layer.
        sketch: random vectors, ``(G, m, n)`` with m ≤ n.
        probes: random signs z, ``(G, p, n)`` with p ≥ 2.

    Cost: products of Σ_X with 3m + p vectors, and two passes over x; memory as for
    :func:`covariance_product`.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(200, 50, dtype=torch.float64) * torch.linspace(0.1, 3, 50, dtype=torch.float64)
        >>> z = torch.randn(2, 16, 50, dtype=torch.float64)
        >>> found = probed_spectrum(x, PatchMap(), z[:1], z[1:].sign())
        >>> eigenvalues = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
        >>> exact = eigenvalues.sum().square() / eigenvalues.square().sum()
        >>> bool((found.effective_rank - exact).abs() < 3 * found.effective_rank_error)
        True
    """

    def products(vectors: Tensor) -> Tensor:
        return covariance_product(x, vectors.to(x), layer).to(vectors)

    first = _orthonormal(products(sketch.to(wide_dtype(x.device))))
    again = products(first)
    basis = _orthonormal(torch.cat([first, again], 1))
    m, sign = first.shape[1], torch.linalg.vecdot(basis[:, : first.shape[1]], first).sign()
    signs = probes.to(basis)
    signs = signs - signs @ basis.mT @ basis
    rest = products(torch.cat([basis[:, m:], signs], 1))
    images = torch.cat([sign[:, :, None] * again, rest[:, : basis.shape[1] - m]], 1)
    outside = rest[:, basis.shape[1] - m :].square().sum(2)
    square = images.square().sum((1, 2)) + outside.mean(1)
    error = torch.hypot(outside.std(1) / outside.shape[1] ** 0.5, _ROUNDING * torch.finfo(x.dtype).eps * square)
    return InputSpectrum(_trace(x, layer), square, error, *_ritz(basis, images))


def _ritz(basis: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues of Σ in a subspace, descending, and their residuals; images are Σ times the basis."""
    values, vectors = torch.linalg.eigh(images @ basis.mT)
    values, vectors = values.flip(1), vectors.mT.flip(1)
    residuals = (vectors @ images - values[:, :, None] * (vectors @ basis)).norm(dim=2)
    return values.clamp_min(0), residuals


def _trace(x: Tensor, layer: PatchMap) -> Tensor:
    """Return tr Σ of each group, the mean ‖p‖² of its patches minus the squared length of their mean."""
    ones = x.new_ones(x.shape[0], layer.groups, *layer.places(x))
    mean = layer.adjoint(x, ones).to(wide_dtype(x.device)) / layer.samples(x)
    return (layer.energy(x) / layer.samples(x) - mean.square().sum((1, 2))).clamp_min(0)


def _orthonormal(rows: Tensor) -> Tensor:
    """Return orthonormal rows that span the given ones, ``(G, m, n)``."""
    return torch.linalg.qr(rows.mT).Q.mT  # type: ignore[no-any-return]
