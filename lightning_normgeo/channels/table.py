"""Table of the channels of all batch normalizations of a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_normgeo.geometry.batches.channels import affine_distances, clusters, output_correlations, output_cosines
from lightning_normgeo.utilities.notebook import NotebookTable, summary

COLUMNS = (
    "layer",
    "channel",
    "gamma",
    "beta",
    "abs_gamma",
    "product",
    "share",
    "nearest",
    "distance",
    "correlation",
    "alike",
    "cosine",
    "eps_ratio",
    "writers",
)
"""Columns of the table, see :class:`LayerChannels`."""
_SHOWN = 40
"""The largest number of layers that the printed table has."""


@dataclass(frozen=True)
class LayerChannels:
    r"""The channels of one batch normalization; tensors have one value per channel, in float64 on the CPU.

    Attributes:
        name: module path of the layer.
        gamma: γ.
        beta: β.
        product: :math:`|\gamma_i|\,\lVert W_{next}[:, i]\rVert` over all weights that read the channel, which does not
            change under rescalings of the channel; NaN where they are not known, see ``reason``.
        share: mean share of the channel in the input of the units that read it, in [0, 1]. It does not change with the
            scale of these units either. NaN as for ``product``.
        writers: number of batch normalizations that write the channel: 1, or more in a residual stream, where they have
            one rescaling together; 0 where it is not known.
        eps_ratio: ε/s² with the biased variance s² of the batch; infinite for a channel that is constant.
        correlation: correlations of the normalized pre-activations ŷ, ``(channels, channels)`` in float32.
        values: number of values per channel in the batch: samples times positions.
        reason: why the weights that read the channels are not known; empty where they are.
    """

    name: str
    gamma: Tensor
    beta: Tensor
    product: Tensor
    share: Tensor
    writers: Tensor
    eps_ratio: Tensor
    correlation: Tensor
    values: int
    reason: str = ""

    def __len__(self) -> int:
        return len(self.gamma)

    @property
    def effective_gamma(self) -> Tensor:
        """The standard deviation of each output, with the sign of γ: γ·s/√(s² + ε)."""
        return self.gamma / (1 + self.eps_ratio).sqrt()

    def distances(self) -> Tensor:
        """Return the distance of each pair in (γ, β), see :func:`lightning_normgeo.geometry.affine_distances`."""
        return affine_distances(self.gamma, self.beta)

    def output_correlations(self) -> Tensor:
        """Return the correlation of the outputs of each pair, see :func:`.geometry.output_correlations`."""
        return output_correlations(self.gamma, self.correlation.double())

    def cosines(self) -> Tensor:
        """Return the cosine of the outputs of each pair, see :func:`lightning_normgeo.geometry.output_cosines`."""
        return output_cosines(self.effective_gamma, self.beta, self.correlation.double())

    def ratio(self, channel: Tensor, partner: Tensor) -> Tensor:
        """Return c of the best fit z_i ≈ c·z_j, in least squares over the batch.

        Args:
            channel: numbers i of channels.
            partner: numbers j of the channels that take their places.
        """
        gamma, beta = self.effective_gamma, self.beta
        inner = gamma[channel] * gamma[partner] * self.correlation.double()[channel, partner]
        size = gamma[partner].square() + beta[partner].square()
        return torch.where(size > 0, (inner + beta[channel] * beta[partner]) / size, 0.0)

    def nearest(self) -> Tensor:
        """Return for each channel the nearest other one in (γ, β), −1 if it has none; of equally near ones the first.

        Equally near are all channels before training, where only the correlation tells them apart.
        """
        return _best(self.distances())

    def most_alike(self) -> Tensor:
        """Return for each channel the other one whose output has the largest cosine with it, −1 if it has none."""
        return _best(-self.cosines())

    def close(self, similar: float) -> Tensor:
        """Return the pairs that are close in (γ, β), ``(channels, channels)``, without the diagonal."""
        return (self.distances() <= similar).fill_diagonal_(False)

    def correlated(self, correlated: float) -> Tensor:
        """Return the pairs whose outputs are correlated, ``(channels, channels)``, without the diagonal."""
        return (self.output_correlations() >= correlated).fill_diagonal_(False)


def _best(values: Tensor) -> Tensor:
    """Return the column of the smallest value in each row off the diagonal, −1 if there is none."""
    if len(values) < 2:
        return torch.full((len(values),), -1)
    return values.fill_diagonal_(torch.inf).argmin(1)


@dataclass(frozen=True)
class PairCounts:
    """Numbers of pairs of channels of the same layer.

    Attributes:
        pairs: all pairs.
        close: those that are close in (γ, β).
        correlated: those whose outputs are correlated.
        redundant: those that are both.
        clusters: sets of channels that redundant pairs connect.
        superfluous: channels in these beyond one for each set.
    """

    pairs: int
    close: int
    correlated: int
    redundant: int
    clusters: int
    superfluous: int


@dataclass(frozen=True)
class ChannelTable:
    """The channels of all batch normalizations with γ and β of a network.

    ``table["layer1.0.bn1"]`` has the channels of a layer; ``print`` shows a line for each layer, :meth:`to_frame` has a
    row for each channel.

    Attributes:
        layers: the channels of each layer by module path, in the order of the network's modules.
        left_out: the reason for each layer that did not run or has no finite values.
        similar: largest distance in (γ, β) that counts as close.
        correlated: smallest correlation that counts as such.
    """

    layers: Mapping[str, LayerChannels]
    left_out: Mapping[str, str] = field(default_factory=dict)
    similar: float = 0.1
    correlated: float = 0.95

    def __getitem__(self, layer: str) -> LayerChannels:
        return self.layers[layer]

    def __len__(self) -> int:
        return sum(map(len, self.layers.values()))

    def joined(self, name: str) -> Tensor:
        """Return a quantity of :class:`LayerChannels` over all layers, ``(channels,)``."""
        return torch.cat([getattr(layer, name) for layer in self.layers.values()])

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Return values of all channels by layer, the reverse of :meth:`joined`."""
        parts = torch.split(values, [len(layer) for layer in self.layers.values()])
        return dict(zip(self.layers, parts, strict=True))

    def pair_counts(self) -> PairCounts:
        """Count the pairs of channels that are close in (γ, β), correlated, and both."""
        counts = np.zeros(6, np.int64)
        for layer in self.layers.values():
            close, correlated = layer.close(self.similar), layer.correlated(self.correlated)
            both, size = close & correlated, len(layer)
            sizes = torch.bincount(clusters(both), minlength=size)
            found = [size * (size - 1) // 2, *(int(pairs.sum()) // 2 for pairs in (close, correlated, both))]
            counts += np.array([*found, int((sizes > 1).sum()), int((sizes - 1).clamp_min(0).sum())])
        return PairCounts(*counts.tolist())

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """Yield a row for each channel with the values of :data:`COLUMNS`."""
        for name, layer in self.layers.items():
            near, alike = layer.nearest(), layer.most_alike()
            at, like = near.clamp_min(0)[:, None], alike.clamp_min(0)[:, None]
            alone = len(layer) < 2
            numbers = [layer.gamma, layer.beta, layer.gamma.abs(), layer.product, layer.share]
            pairs = [
                layer.distances().gather(1, at),
                layer.output_correlations().gather(1, at),
                layer.cosines().gather(1, like),
            ]
            distance, correlation, cosine = (pair[:, 0].fill_(torch.nan) if alone else pair[:, 0] for pair in pairs)
            columns = [*numbers, near, distance, correlation, alike, cosine, layer.eps_ratio, layer.writers]
            for channel, values in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
                yield (name, channel, *values)

    def layer_summaries(self) -> dict[str, dict[str, Any]]:
        """Return for each layer by module path plain values: the line of the printed table."""
        return {name: self._summary(layer) for name, layer in self.layers.items()}

    def to_frame(self) -> Any:
        """Return a pandas data frame with a row for each channel, indexed by layer, with :data:`COLUMNS`.

        Raises:
            ConfigurationError: if pandas is not installed.
        """
        return NotebookTable("", COLUMNS, list(self.rows())).to_frame("layer")

    def __repr__(self) -> str:
        counts = self.pair_counts()
        parts = [f"{len(self)} channels in {len(self.layers)} layers"]
        return summary("ChannelTable", [*parts, f"{counts.redundant} redundant pairs"])

    def _table(self) -> NotebookTable:
        columns = ("layer", "channels", "median |γ|", "smallest |γ|", "median share × channels", "redundant pairs", "")
        rows = [(name, *line.values()) for name, line in self._lines()]
        counts = self.pair_counts()
        notes = [
            f"of {counts.pairs} pairs in one layer {counts.close} are close in (γ, β) (distance ≤ {self.similar:g}), "
            f"{counts.correlated} correlated (≥ {self.correlated:g}), {counts.redundant} both: {counts.clusters} "
            f"clusters with {counts.superfluous} superfluous channels",
            *(f"{name}: left out, {why}" for name, why in self.left_out.items()),
        ]
        return NotebookTable(f"{len(self)} channels of batch normalizations", columns, rows, notes)

    def _lines(self) -> Iterator[tuple[str, dict[str, object]]]:
        for name, line in self.layer_summaries().items():
            writers, reason = line.pop("writers"), line.pop("reason")
            line["note"] = reason or (f"residual stream of {writers} layers" if writers > 1 else "")
            yield name, line

    def _summary(self, layer: LayerChannels) -> dict[str, Any]:
        redundant = layer.close(self.similar) & layer.correlated(self.correlated)
        magnitude, share = layer.gamma.abs(), layer.share[layer.share.isfinite()]
        return {
            "channels": len(layer),
            "median_gamma": float(magnitude.median()),
            "smallest_gamma": float(magnitude.min()),
            "relative_share": float(share.median()) * len(layer) if len(share) else None,
            "redundant_pairs": int(redundant.sum()) // 2,
            "writers": int(layer.writers.max()),
            "reason": layer.reason,
        }

    def __str__(self) -> str:
        """Return a table with a line for each layer, and the numbers of similar pairs."""
        table = self._table()
        cells = [list(table.columns), *([_text(cell) for cell in row] for row in table.rows[:_SHOWN])]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        hidden = len(table.rows) - _SHOWN
        more = [f"… {hidden} more layers: to_frame() has all"] if hidden > 0 else []
        return "\n".join([table.caption, *lines, *more, *table.notes])

    def _repr_html_(self) -> str:
        return self._table().to_html()


def _text(cell: object) -> str:
    if cell is None:
        return ""
    return f"{cell:.3g}" if isinstance(cell, float) else str(cell)
