r"""Channels behind batch normalization: their importance by γ, their similarity by (γ, β), and which to remove.

A channel's output is :math:`z_i = \gamma_i\hat y_i + \beta_i`, where ŷ has zero mean and unit variance over the batch.
Sun et al. 2020 (section 2.2) propose to prune channels with small γ, or channels whose (γ, β) are similar. Neither is
free of gauge: a positively homogeneous activation (ReLU) lets (γ_i, β_i) grow by c while the weights that read the
channel shrink by c, with the same function. The functions here give both the published measures and those that do not
change under this rescaling.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.geometry.rows import on_observing_device

_BLOCK = 2**22
"""Elements of an activation that are converted to float64 at once."""


def slimming_mask(scores: Tensor, ratio: float) -> Tensor:
    r"""Return the mask of channels that network slimming keeps (Liu et al. 2017, in the form of its published code).

    All scores are sorted together; the threshold is the one at index :math:`\lfloor n\,r\rfloor`, and channels strictly
    above it are kept. So one channel more than n·r is removed, and every channel with the same score as the threshold:
    of channels that are all alike none is kept.

    Args:
        scores: ``(channels,)``, of all layers together: |γ| in network slimming, or any other importance.
        ratio: r, in [0, 1).

    Returns:
        ``(channels,)``, True for channels to keep.

    Raises:
        ConfigurationError: for a ratio out of range.

    Example:
        >>> import torch
        >>> slimming_mask(torch.tensor([0.5, 0.1, 0.4, 0.2]), ratio=0.25)
        tensor([ True, False,  True, False])
    """
    if not 0 <= ratio < 1:
        raise ConfigurationError(f"ratio={ratio!r} must be in [0, 1): the share of channels to remove, as 0.3.")
    if not scores.numel():
        return torch.zeros_like(scores, dtype=torch.bool)
    ordered = scores.sort().values
    return scores > ordered[int(len(ordered) * ratio)]


def rescaling_free_scale(gamma: Tensor, reader_norm: Tensor) -> Tensor:
    r"""Return :math:`|\gamma_i|\,\lVert W_{next}[:, i]\rVert`, which the rescalings of a channel do not change.

    Under :math:`\gamma_i, \beta_i \to c\gamma_i, c\beta_i` and :math:`W_{next}[:, i] \to W_{next}[:, i]/c` with c > 0 a
    network with a positively homogeneous activation in between computes the same function. |γ_i| is multiplied by c,
    this product stays.

    It still has the scale of W_next, which is free itself where a normalization follows: see :func:`input_shares`.

    Args:
        gamma: ``(channels,)``.
        reader_norm: ``(channels,)``, the norm of all weights that read the channel; of several readers the root of the
            sum of their squares.
    """
    return gamma.abs() * reader_norm


def input_shares(weight_sq: Tensor, gamma_sq: Tensor) -> Tensor:
    r"""Return the share that each channel has in the input of each unit that reads it.

    .. math:: \frac{(\gamma_i w_{oi})^2}{\sum_j (\gamma_j w_{oj})^2}

    This changes neither under rescalings between γ_i and the column w_{:i} nor under the scale of a row w_o, which has
    no effect if a normalization follows. If the channels' normalized outputs were uncorrelated, it would be their share
    in the variance of the pre-activation.

    Args:
        weight_sq: ``(units, channels)``, the squared weights, summed over the positions of a kernel.
        gamma_sq: γ², of a shape that broadcasts to ``weight_sq``; zero for inputs that are no channels.

    Returns:
        ``(units, channels)`` in [0, 1]; rows sum to one, or are zero where no channel has any weight.
    """
    products = weight_sq * gamma_sq
    total = products.sum(1, keepdim=True)
    return torch.where(total != 0, products / total, torch.zeros_like(products))


class ChannelMoments:
    """Means, variances and correlations of the channels of an activation, accumulated over batches in float64.

    Attributes:
        count: values per channel so far: samples times positions.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(self, activation: Tensor) -> None:
        """Add an activation of shape ``(samples, channels, …)``.

        Cost: channels² multiplications per value of a channel, and a float64 copy of a few samples at a time.
        """
        per_sample = max(1, activation[:1].numel())
        for block in torch.split(activation.detach(), max(1, _BLOCK // per_sample)):
            columns = on_observing_device(block).double().movedim(1, 0).flatten(1)
            if self._sums is None:
                # deviations from about the mean, so that differences of large numbers do not cancel
                shift = columns.mean(1, keepdim=True)
                self._sums = shift, torch.zeros_like(shift), columns.new_zeros(len(columns), len(columns))
            shift, total, products = self._sums
            columns = columns - shift
            total += columns.sum(1, keepdim=True)
            products += columns @ columns.T
            self.count += columns.shape[1]

    @property
    def variance(self) -> Tensor:
        """The biased variance of each channel, ``(channels,)``, as batch normalization uses it."""
        return self._covariance().diagonal()

    @property
    def correlation(self) -> Tensor:
        """The correlations, ``(channels, channels)``; 0 for channels that are constant, 1 on the diagonal."""
        covariance = self._covariance()
        scale = covariance.diagonal().clamp_min(0).sqrt()
        outer = scale[:, None] * scale
        found = torch.where(outer != 0, covariance / outer, torch.zeros_like(outer)).clamp(-1, 1)
        return found.fill_diagonal_(1.0)

    def _covariance(self) -> Tensor:
        assert self._sums is not None  # noqa: S101
        _, total, products = self._sums
        mean = total / self.count
        return products / self.count - mean @ mean.T


def affine_distances(gamma: Tensor, beta: Tensor) -> Tensor:
    r"""Return the distances of channels in (γ, β), relative to the size of both.

    .. math:: \sqrt{\frac{(|\gamma_i| - |\gamma_j|)^2 + (\beta_i - \beta_j)^2}
                         {\tfrac12(\gamma_i^2 + \beta_i^2 + \gamma_j^2 + \beta_j^2)}}

    The sign of γ is left out, as it has no meaning of its own: flipping it together with the filter in front changes
    nothing. Channels that are both zero have distance 0.

    Args:
        gamma: ``(channels,)``.
        beta: ``(channels,)``.

    Returns:
        ``(channels, channels)``, in [0, 2].
    """
    size = gamma.square() + beta.square()
    scale = (size[:, None] + size) / 2
    squared = (gamma.abs()[:, None] - gamma.abs()).square() + (beta[:, None] - beta).square()
    return torch.where(scale != 0, squared / scale, torch.zeros_like(squared)).sqrt()


def output_correlations(gamma: Tensor, correlation: Tensor) -> Tensor:
    """Return the correlations of the outputs γŷ + β from those of ŷ: the signs of γ count.

    Two channels with correlation −1 are mirror images, which a ReLU makes different; with opposite signs of γ they are
    alike.
    """
    sign = torch.where(gamma < 0, -1.0, 1.0).to(correlation)
    return correlation * sign[:, None] * sign


def output_cosines(gamma: Tensor, beta: Tensor, correlation: Tensor) -> Tensor:
    r"""Return the cosines of the outputs of channels over a batch, their means included.

    .. math:: \cos_{ij} = \frac{E[z_iz_j]}{\sqrt{E[z_i^2]E[z_j^2]}} =
        \frac{\gamma_i\gamma_j\rho_{ij} + \beta_i\beta_j}{\sqrt{(\gamma_i^2 + \beta_i^2)(\gamma_j^2 + \beta_j^2)}}

    It is 1 exactly where one output is a positive multiple of the other, so that what reads the one can read the other.
    Similar (γ, β) alone do not say that: E[(z_i − z_j)²] = (γ_i − γ_j)² + (β_i − β_j)² + 2γ_iγ_j(1 − ρ_ij). The cosine
    does not change under rescalings of single channels. ε is taken as zero.

    Args:
        gamma: ``(channels,)``.
        beta: ``(channels,)``.
        correlation: ρ, ``(channels, channels)``, of the inputs of the normalization, see :class:`ChannelMoments`.

    Returns:
        ``(channels, channels)``; 0 for a channel whose output is zero.
    """
    inner = gamma[:, None] * gamma * correlation + beta[:, None] * beta
    size = (gamma.square() + beta.square()).sqrt()
    outer = size[:, None] * size
    return torch.where(outer != 0, inner / outer, torch.zeros_like(inner)).clamp(-1, 1)


class Merging(NamedTuple):
    """Order in which the channels of a layer are merged into similar ones.

    Attributes:
        price: ``(channels,)``, dissimilarity of each channel to its partner when it is removed; infinite for the last
            channel of the layer.
        partner: ``(channels,)``, the channel that takes its place, itself for the last one. It is removed later, if at
            all.
    """

    price: Tensor
    partner: Tensor


def merge_order(dissimilarity: Tensor, importance: Tensor) -> Merging:
    """Return prices of removing channels by repeatedly merging the two most similar ones that are left.

    Of the two the less important one is removed. Prices increase in the order of removal, so that a threshold on them
    removes a beginning of this order.

    Args:
        dissimilarity: ``(channels, channels)``, symmetric.
        importance: ``(channels,)``.

    Cost: about channels² operations on the host.
    """
    count = len(importance)
    left = dissimilarity.detach().cpu().double().clone().fill_diagonal_(torch.inf)
    weight = importance.detach().cpu().double()
    price, partner = torch.full((count,), torch.inf, dtype=torch.float64), torch.arange(count)
    if count < 2:
        return Merging(price, partner)
    best, nearest = left.min(1)
    for _ in range(count - 1):
        i = int(best.argmin())
        j = int(nearest[i])
        gone, stays = (i, j) if weight[i] <= weight[j] else (j, i)
        price[gone], partner[gone] = best[i], stays
        left[gone], left[:, gone] = torch.inf, torch.inf
        stale = nearest == gone
        stale[gone] = True
        best[stale], nearest[stale] = left[stale].min(1)
    return Merging(price, partner)


def clusters(close: Tensor) -> Tensor:
    """Return the number of its cluster for each element: the smallest element that is connected to it.

    Args:
        close: ``(n, n)``, symmetric, True for pairs that are connected.
    """
    count = len(close)
    linked = close | torch.eye(count, dtype=torch.bool, device=close.device)
    labels = torch.arange(count, device=close.device)
    while True:
        smallest = torch.where(linked, labels, count).amin(1) if count else labels
        if torch.equal(smallest, labels):
            return labels
        labels = smallest
