"""Criteria by which channels are removed: a score for each channel of a network, the smallest removed first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_normgeo.channels.masked_model import Partners
from lightning_normgeo.channels.table import ChannelTable, LayerChannels
from lightning_normgeo.geometry.batches.channels import Merging, merge_order, slimming_mask

CRITERIA: dict[str, str] = {
    "gamma": "|γ|, as in network slimming",
    "product": "|γ|·‖W_next[:, i]‖, which rescalings of the channel do not change",
    "share": "mean share in the inputs of the units that read it, which their scale does not change either",
    "similar": "distance to a channel that is kept in (γ, β) alone, as the paper proposes it",
    "pairs": "1 − cosine of its output and that of a channel that is kept: similar (γ, β) and correlated",
    "random": "the control: channels drawn by a seed",
    "gamma_shuffled": "as many channels of each layer as by gamma, drawn by a seed",
    "product_shuffled": "as many channels of each layer as by product, drawn by a seed",
    "share_shuffled": "as many channels of each layer as by share, drawn by a seed",
    "similar_shuffled": "as many channels of each layer as by similar, drawn by a seed",
    "pairs_shuffled": "as many channels of each layer as by pairs, drawn by a seed",
}
"""Criteria by name: the score, of which small ones are removed first."""
DEFAULT = ("gamma", "product", "share", "similar", "pairs", "random", "share_shuffled")
"""Criteria that are compared unless others are chosen."""
_SHUFFLED = "_shuffled"
MERGED = ("similar", "pairs")
"""Criteria that remove a channel because another one can take its place."""
_ENOUGH = 0.5
"""The smallest share of channels that a criterion has to have a score for."""


@dataclass(frozen=True)
class Ranking:
    """Scores of all channels by one criterion.

    Attributes:
        scores: ``(channels,)`` over all layers; NaN where the criterion has none.
        merging: for criteria that merge channels, the order of each layer.
    """

    scores: Tensor
    merging: dict[str, Merging]


def ranking(criterion: str, table: ChannelTable, seed: int) -> Ranking:
    """Return the scores of all channels by a criterion of :data:`CRITERIA`.

    Args:
        criterion: its name.
        table: the channels.
        seed: of random orders.
    """
    generator = torch.Generator().manual_seed(seed)
    if criterion.endswith(_SHUFFLED):
        scores = ranking(criterion.removesuffix(_SHUFFLED), table, seed).scores
        return Ranking(torch.cat([_shuffled(one, generator) for one in table.split(scores).values()]), {})
    if criterion == "random":
        return Ranking(torch.randperm(len(table), generator=generator).double(), {})
    if criterion in MERGED:
        measure = _DISSIMILARITY[criterion]
        merging = {name: merge_order(measure(layer), _importance(layer)) for name, layer in table.layers.items()}
        return Ranking(torch.cat([one.price for one in merging.values()]), merging)
    scores = table.joined("gamma").abs() if criterion == "gamma" else table.joined(criterion)
    return Ranking(scores, {})


def _shuffled(scores: Tensor, generator: torch.Generator) -> Tensor:
    """Return the scores of a layer in another order, so that a threshold removes as many of them."""
    known = torch.nonzero(~scores.isnan()).flatten()
    found = scores.clone()
    found[known] = scores[known[torch.randperm(len(known), generator=generator)]]
    return found


def _importance(layer: LayerChannels) -> Tensor:
    """Return the importance by which of two similar channels the one with less effect on its readers is removed."""
    return torch.where(layer.product.isnan(), layer.gamma.abs(), layer.product)


_DISSIMILARITY: dict[str, Callable[[LayerChannels], Tensor]] = {
    "similar": lambda layer: layer.distances(),
    "pairs": lambda layer: 1 - layer.cosines(),
}


@dataclass(frozen=True)
class Candidates:
    """Channels that all criteria rank, so that they are compared on the same channels.

    Attributes:
        rankings: by criterion.
        among: ``(channels,)``, True for channels that every criterion has a score for.
        left_out: the reason for each criterion that is not compared.
    """

    rankings: dict[str, Ranking]
    among: Tensor
    left_out: dict[str, str]


def candidates(table: ChannelTable, criteria: Sequence[str], seed: int, streams: bool = True) -> Candidates:
    """Return the rankings of a table by several criteria, and the channels that all of them rank.

    A criterion that has a score for less than half of the channels is left out.

    Args:
        table: the channels.
        criteria: names of criteria.
        seed: of the random control.
        streams: whether channels that several layers write are among them.
    """
    found = {name: ranking(name, table, seed) for name in criteria}
    reasons = sorted({layer.reason for layer in table.layers.values() if layer.reason})
    left_out = {}
    for name in list(found):
        known = found[name].scores.isnan().logical_not()
        if known.double().mean() < _ENOUGH:
            why = f": {'; '.join(reasons)}" if reasons else ""
            left_out[name] = f"known for {int(known.sum())} of {len(known)} channels only{why}"
            del found[name]
    among = torch.ones(len(table), dtype=torch.bool) if streams else table.joined("writers") == 1
    for one in found.values():
        among &= ~one.scores.isnan()
    return Candidates(found, among, left_out)


def masks(table: ChannelTable, one: Ranking, among: Tensor, ratio: float) -> dict[str, Tensor]:
    """Return the masks of kept channels by module path, if a share of the candidates is removed.

    Args:
        table: the channels.
        one: the ranking.
        among: candidates; all others are kept.
        ratio: share r of the candidates, by the rule of :func:`lightning_normgeo.geometry.slimming_mask`.
    """
    keep = torch.ones(len(table), dtype=torch.bool)
    keep[among] = slimming_mask(one.scores[among], ratio)
    return table.split(keep)


def partners_of(table: ChannelTable, one: Ranking, keep: dict[str, Tensor]) -> dict[str, Partners]:
    """Return for each layer the kept channel that takes the place of each removed one, and its factor."""
    found = {}
    for name, mask in keep.items():
        layer, partner = table[name], one.merging[name].partner
        channel = torch.arange(len(layer))
        for _ in range(len(layer)):  # a partner may be removed itself, later in the order
            gone = ~mask[channel]
            if not gone.any() or torch.equal(partner[channel][gone], channel[gone]):
                break
            channel = torch.where(gone, partner[channel], channel)
        moved = channel != torch.arange(len(layer))
        factor = torch.where(moved, layer.ratio(torch.arange(len(layer)), channel), 1.0)
        found[name] = Partners(channel, factor)
    return found
