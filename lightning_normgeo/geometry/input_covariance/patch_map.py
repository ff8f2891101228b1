"""Linear map of a layer as products with its filters and with their gradients, without unfolded patches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_normgeo.geometry.rows import wide_dtype

_CONVOLUTIONS: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...] = (
    (F.conv1d, torch.nn.grad.conv1d_weight),  # type: ignore[attr-defined]
    (F.conv2d, torch.nn.grad.conv2d_weight),  # type: ignore[attr-defined]
    (F.conv3d, torch.nn.grad.conv3d_weight),  # type: ignore[attr-defined]
)

_AT_ONCE = 16
"""The smallest number of filters that are applied together, where there are that many."""


@dataclass(frozen=True)
class PatchMap:
    r"""Patches that a linear or convolution layer reads, as the columns of the matrix X in :math:`y = W X`.

    A convolution reads N = B·H'·W' patches with n = C·k·k / groups values each (appendix 5.1 of Sun et al. 2020). Each
    of its G groups has an X of its own. Filters have shape (G, m, n), and pre-activations that of the layer's output,
    with G·m channels. A linear layer has no ``kernel_size``, and N input vectors ``(N, n)``.

    Attributes:
        kernel_size: of the convolution, in pixels, one number for each spatial dimension, as the two below.
        stride: in pixels.
        dilation: in pixels.
        padding: in pixels, before and after each dimension and beginning with the last, as for ``F.pad``.
        padding_mode: as for ``F.pad``.
        groups: the number of groups G.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> x, filters = torch.randn(2, 6, 9, 9), torch.randn(4, 3, 3, 3)
        >>> layer = PatchMap((3, 3), (2, 2), (1, 1), (1, 1, 1, 1), groups=2)
        >>> y = layer.apply(layer.padded(x), filters.reshape(2, 2, 27))
        >>> torch.allclose(y, torch.nn.functional.conv2d(x, filters, stride=2, padding=1, groups=2), atol=1e-5)
        True
    """

    kernel_size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    padding_mode: str = "constant"
    groups: int = 1

    def padded(self, x: Tensor) -> Tensor:
        """Return an input ``(B, C, …)`` of the layer with its padding; every other method takes this."""
        return F.pad(x, self.padding, mode=self.padding_mode) if any(self.padding) else x

    def width(self, x: Tensor) -> int:
        """Return n, the number of values of a patch."""
        return x.shape[1] // self.groups * math.prod(self.kernel_size)

    def places(self, x: Tensor) -> tuple[int, ...]:
        """Return the spatial shape of the output."""
        reach = [gap * (size - 1) + 1 for size, gap in zip(self.kernel_size, self.dilation, strict=True)]
        return tuple((n - r) // step + 1 for n, r, step in zip(x.shape[2:], reach, self.stride, strict=True))

    def samples(self, x: Tensor) -> int:
        """Return N, the number of patches."""
        return x.shape[0] * math.prod(self.places(x))

    def apply(self, x: Tensor, filters: Tensor) -> Tensor:
        """Return the pre-activations W X of filters ``(G, m, n)``, of shape ``(B, G·m, …)``."""
        if not self.kernel_size:
            return x @ filters[0].mT
        forward, _ = _CONVOLUTIONS[len(self.kernel_size) - 1]
        weight = filters.reshape(-1, x.shape[1] // self.groups, *self.kernel_size)
        output: Tensor = forward(x, weight, None, self.stride, 0, self.dilation, self.groups)
        return output

    def adjoint(self, x: Tensor, upstream: Tensor) -> Tensor:
        """Return C Xᵀ for C like pre-activations, the gradient that the filters would have: ``(G, m, n)``."""
        if not self.kernel_size:
            return (upstream.mT @ x)[None]
        _, backward = _CONVOLUTIONS[len(self.kernel_size) - 1]
        shape = (upstream.shape[1], x.shape[1] // self.groups, *self.kernel_size)
        gradient: Tensor = backward(x, shape, upstream, self.stride, 0, self.dilation, self.groups)
        return gradient.reshape(self.groups, -1, self.width(x))

    def columns(self, x: Tensor, chosen: Tensor | None = None) -> Tensor:
        """Return X, or some of its columns given by their indices, in float64: ``(G, n, columns)``."""
        view = x
        for axis, (size, step, gap) in enumerate(zip(self.kernel_size, self.stride, self.dilation, strict=True)):
            view = view.unfold(2 + axis, gap * (size - 1) + 1, step)[..., ::gap]
        places = self.places(x)
        view = view.movedim(1, 1 + len(places))  # (B, places, C, kernel)
        if chosen is None:
            rows = view.reshape(self.samples(x), -1)
        else:
            rows = view[torch.unravel_index(chosen, (x.shape[0], *places))].flatten(1)
        return rows.to(wide_dtype(x.device)).reshape(len(rows), self.groups, -1).permute(1, 2, 0)

    def energy(self, x: Tensor) -> Tensor:
        """Return ‖X‖² of each group, ``(G,)``, in one pass over x: each value counts once per patch that it is in."""
        squares = x.square().sum(0, dtype=wide_dtype(x.device))
        for axis, counts in enumerate(self._counts(x), start=1):
            squares = squares * counts.reshape([-1 if dim == axis else 1 for dim in range(squares.ndim)])
        return squares.reshape(self.groups, -1).sum(1)

    def _counts(self, x: Tensor) -> list[Tensor]:
        """Return for each spatial dimension the number of patches that contain each pixel."""
        found = []
        for length, size, step, gap, places in zip(
            x.shape[2:], self.kernel_size, self.stride, self.dilation, self.places(x), strict=True
        ):
            counts = torch.zeros(length, dtype=wide_dtype(x.device))
            for tap in range(0, size * gap, gap):
                counts[tap : tap + (places - 1) * step + 1 : step] += 1
            found.append(counts.to(x.device))
        return found


def covariance_product(x: Tensor, filters: Tensor, layer: PatchMap) -> Tensor:
    r"""Return the products :math:`Z \Sigma_X` with the covariance of the patches, by one convolution and one gradient.

    .. math:: Z \Sigma_X = \frac 1N \left(Z X - \overline{Z X}\right) X^T

    The rows of Z are filters: Z X are their pre-activations, and the product with Xᵀ is the gradient of the filters.
    (Below eq 11 of Sun et al. 2020; Σ_X is biased, as the variance in batch normalization.)

    Args:
        x: input of the layer with its padding (:meth:`PatchMap.padded`).
        filters: Z, ``(G, m, n)``.
        layer: the layer.

    Returns:
        Z Σ_X, ``(G, m, n)``, in units of x².

    Cost: 2/3 of the layer's forward and backward pass with m filters. Neither X nor Σ_X is formed. Memory for at most
    as many pre-activations as the layer has input channels (at least 16, or one per group): more filters go in turns.

    Example:
        >>> import torch
        >>> from lightning_normgeo.geometry import covariance
        >>> _ = torch.manual_seed(0)
        >>> x, z = torch.randn(8, 3, 6, 6, dtype=torch.float64), torch.randn(1, 5, 27, dtype=torch.float64)
        >>> layer = PatchMap((3, 3), (1, 1), (1, 1))
        >>> torch.allclose(covariance_product(x, z, layer)[0], z[0] @ covariance(layer.columns(x)[0]))
        True
    """
    at_once = max(1, max(x.shape[1], _AT_ONCE) // layer.groups)
    parts = [layer.adjoint(x, centered(layer.apply(x, part))) for part in torch.split(filters, at_once, 1)]
    return torch.cat(parts, 1) / layer.samples(x)


def centered(y: Tensor) -> Tensor:
    """Return pre-activations minus their mean over samples and positions."""
    return y - y.mean([axis for axis in range(y.ndim) if axis != 1], keepdim=True)
