"""Rank, kernel and spectrum of the covariance of a layer's inputs, exact where that is cheap."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_normgeo.geometry.input_covariance.exact_spectrum import ROUNDING, ExactSpectrum, exact_spectrum
from lightning_normgeo.geometry.input_covariance.input_spectrum import InputSpectrum, probed_spectrum, spectrum_of
from lightning_normgeo.geometry.input_covariance.patch_map import PatchMap, centered
from lightning_normgeo.geometry.rows import wide_dtype

EXACT_UP_TO = 640
"""Default size of the largest matrices that are decomposed: 64 channels of 3×3 pixels are 576."""
PROBES = 16
"""Default number of random vectors."""
_LENGTH = 16
"""Largest number of elements of X that is formed, over ``exact_up_to``²."""
_MORE_SAMPLES = 256
"""Number of columns of X, beyond twice the number of rows, in which the range is looked for."""
_PRODUCTS = 8
"""Rounding of a product of X with a unit vector, at most this many ε × ‖X‖."""


@dataclass(frozen=True)
class InputGeometry:
    """Rank, kernel and spectrum of the covariances Σ_X of a layer's G groups, in one batch. Tensors are float64.

    Attributes:
        width: n, the number of inputs of a unit.
        samples: N, the number of input vectors: samples times output positions.
        exact: whether the spectrum is exact, and not from probes.
        spectrum: traces and leading eigenvalues.
        rank: rank of each group, ``(G,)``; NaN where it is not known.
        rank_at_least: a lower bound that is always known, ``(G,)``.
        kernel_share: share of ‖W_i‖² in the kernel of Σ_X, by unit, ``(units,)``; NaN where the kernel is not known.
    """

    width: int
    samples: int
    exact: bool
    spectrum: InputSpectrum
    rank: Tensor
    rank_at_least: Tensor
    kernel_share: Tensor

    @property
    def bound(self) -> int:
        """The largest possible rank, min(n, N - 1)."""
        return min(self.width, self.samples - 1)


def input_geometry(
    x: Tensor,
    layer: PatchMap,
    weight: Tensor | None = None,
    probes: int = PROBES,
    exact_up_to: int = EXACT_UP_TO,
    seed: int = 0,
) -> InputGeometry:
    """Return rank, kernel and spectrum of Σ_X for the inputs of a layer in one batch (below eq 11 of Sun et al. 2020).

    - If min(n, N) ≤ ``exact_up_to`` and X has at most 16 ``exact_up_to``² elements, everything is exact: X is formed.
    - Otherwise the spectrum is from ``probes`` random vectors (:func:`probed_spectrum`). The rank of some columns of X,
      drawn at random, is a lower bound of the rank. Where n ≤ ``exact_up_to`` the kernel of these columns is tested
      against all of X with random vectors; if it is the kernel of X, which is certain up to rounding, rank and kernel
      are known.

    Whether a number is exact depends on shapes alone, never on the data; whether a rank is known may depend on it.

    Args:
        x: input ``(B, C, …)`` of the layer, not padded; for a linear layer ``(N, n)``.
        layer: the layer.
        weight: its filters, ``(units, …)``. Default: none, which leaves one unknown kernel share per group.
        probes: number of random vectors of each kind, at least 2.
        exact_up_to: size of the largest matrices that are decomposed.
        seed: of the random vectors, which are the same for each call: changes from step to step are of the data.

    Cost: with probes, products of Σ_X with four times ``probes`` vectors and of X with ``probes`` vectors; on a CPU
    about as much as the layer's own forward and backward pass. Else see :func:`exact_spectrum`. Peak memory: a padded
    copy of x, that of :func:`covariance_product`, and 16 ``exact_up_to``² numbers of 8 bytes (52 MB by default).

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> weight, x = torch.randn(7, 100), torch.randn(8, 100)
        >>> found = input_geometry(x, PatchMap(), weight)
        >>> found.rank.item(), found.bound, abs(found.kernel_share.mean().item() - 93 / 100) < 0.05
        (7.0, 7, True)
    """
    stored = x.dtype
    x = layer.padded(x.to(torch.promote_types(stored, torch.float32)))
    n, samples = layer.width(x), layer.samples(x)
    rows = x.new_full((layer.groups, 1, n), torch.nan) if weight is None else weight.reshape(layer.groups, -1, n)
    most = _LENGTH * exact_up_to**2 // (layer.groups * n)
    if min(n, samples) <= exact_up_to and samples <= most:
        exact = exact_spectrum(layer.columns(x), stored)
        rank, share = exact.rank.to(exact.eigenvalues), exact.kernel_share(rows).flatten()
        return InputGeometry(n, samples, True, spectrum_of(exact), rank, rank, share)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(layer.groups, 3 * min(probes, n), n, generator=generator).to(x.device)
    sketch, signs, tests = normal.chunk(3, 1)
    spectrum = probed_spectrum(x, layer, sketch, signs.sign())
    found = InputGeometry(n, samples, False, spectrum, *_unknown(rows))
    count = min(2 * n + _MORE_SAMPLES if n <= exact_up_to else exact_up_to, most, samples)
    if count < 2:
        return found
    columns = layer.columns(x, torch.randint(samples, (count,), generator=generator).to(x.device))
    rank = exact_spectrum(columns, stored, with_basis=False).rank
    found = replace(found, rank_at_least=rank.to(spectrum.trace))
    if (rank == n).all():
        return replace(found, rank=found.rank_at_least, kernel_share=torch.zeros_like(found.kernel_share))
    if n >= count:
        return found
    rounding = ROUNDING * torch.finfo(stored).eps + _PRODUCTS * torch.finfo(x.dtype).eps
    return _with_range(found, x, layer, rows, exact_spectrum(columns, stored), tests, rounding)


def _unknown(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rank, its lower bound and kernel shares of which nothing is known."""
    nothing = torch.full(rows.shape[:2], torch.nan, dtype=wide_dtype(rows.device), device=rows.device)
    return nothing[:, 0], torch.zeros_like(nothing[:, 0]), nothing.flatten()


def _with_range(
    found: InputGeometry,
    x: Tensor,
    layer: PatchMap,
    rows: Tensor,
    part: ExactSpectrum,
    tests: Tensor,
    rounding: float,
) -> InputGeometry:
    """Return the geometry with the rank and kernel of some columns of X, if the kernel is that of all columns.

    If the product of X with a random vector of a space vanishes, that with all of its vectors does, with probability 1.
    """
    vectors = tests.to(part.basis)
    vectors = vectors - vectors @ part.basis @ part.basis.mT
    lengths = vectors.norm(dim=2)
    products = centered(layer.apply(x, (vectors / lengths[:, :, None]).to(x))).square()
    axes = [axis for axis in range(products.ndim) if axis != 1]
    largest = products.sum(axes, dtype=lengths.dtype).reshape(lengths.shape).amax(1)
    vanish = largest <= rounding**2 * layer.energy(x)
    known = vanish | (part.rank == found.width)
    rank = torch.where(known, found.rank_at_least, torch.nan)
    share = torch.where(known[:, None], part.kernel_share(rows), torch.nan).flatten()
    return replace(found, rank=rank, kernel_share=share)
