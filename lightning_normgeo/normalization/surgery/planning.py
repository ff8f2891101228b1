"""What is to become of each normalization layer, or why it is better left alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.folding import foldable, tied_parameters
from lightning_normgeo.normalization.layers import LITTLE_LEFT, LayerSettings, data_layer
from lightning_normgeo.normalization.parametrizations import parametrization_title, refusal
from lightning_normgeo.normalization.registry import NORMS, Normalization
from lightning_normgeo.normalization.surgery.norm_layers import Source, spatial_dims, unsuitable
from lightning_normgeo.normalization.surgery.preceding_layers import Feeder, Inputs
from lightning_normgeo.normalization.surgery.replacement import Plan
from lightning_normgeo.normalization.surgery.swap_report import LeftAlone


@dataclass(frozen=True)
class Wish:
    """The normalization that is wanted, and what is known of the model.

    Attributes:
        target: the normalization.
        groups: of a group normalization, if they were chosen.
        usual: spatial dimensions of the model's convolutions.
        tied: ids of parameters that belong to several modules.
        hint: what to do where an input was not seen as it will be, in words; empty where it was.
    """

    target: Normalization
    groups: int | None
    usual: int
    tied: set[int]
    hint: str


def plan_all(
    module: nn.Module,
    sources: Sequence[Source],
    inputs: dict[nn.Module, Inputs],
    target: Normalization,
    groups: int | None,
    hint: str = "",
) -> tuple[list[Plan], list[LeftAlone]]:
    """Return the plans for layers that are to change, and the layers that are better left alone."""
    convolutions = {spatial_dims(layer) for layer in module.modules()} - {None, 0}
    usual = next(iter(convolutions)) if len(convolutions) == 1 else 2
    wish = Wish(target, groups, usual or 2, tied_parameters(module), hint)
    plans: list[Plan] = []
    left: list[LeftAlone] = []
    for source in sources:
        reads = inputs.get(source.layer, Inputs())
        dims = _dims(source, reads, wish.usual)
        shape = None if wish.hint else reads.shape  # one made up shows positions, not what the last dimension is
        reason = unsuitable(source, shape) or _obstacle(source, reads, dims, wish) or _guesswork(reads, wish)
        plan = reason or _plan_one(source, reads, dims, wish)
        if isinstance(plan, Plan):
            plans.append(plan)
        else:
            left += [LeftAlone(name, plan) for name in source.names]
    return plans, left


def _plan_one(source: Source, reads: Inputs, dims: int, wish: Wish) -> Plan | str:
    """Return what becomes of a layer, or why it stays as it is."""
    target = wish.target
    stand_in = nn.Identity().train(source.layer.training)
    positions = _positions(reads, dims)
    layer = stand_in if target.data is None else _replacement(source, dims, positions, target.data, wish.groups)
    weights, problems = _weights(reads, target.weight, wish.tied)
    if target.weight is not None and target.data is None and problems:
        return problems[0]
    if layer is None and not weights:
        there = target if target.weight is None or not problems else NORMS[target.data or ""]
        return f"it is {there.title} already" + "".join(f", and {problem}" for problem in problems[:1])
    fold: Feeder | str | None = None
    if layer is not None and target.data in (None, "mbn"):
        fold = foldable(source, layer, reads.feeders, wish.tied)
    return Plan(source, layer, reads.feeders, weights, tuple(problems), fold)


def _guesswork(reads: Inputs, wish: Wish) -> str | None:
    """Return why the weights in front of a layer are not certain, if they matter."""
    if reads.traced or reads.chained or not (wish.target.weight or wish.target.data is None):
        return None
    if reads.feeders:
        names = ", ".join(feeder.name for feeder in reads.feeders)
        return f"that {names} feeds it is a guess from the order of registration. {wish.hint}"
    return f"what feeds it is unknown. {wish.hint}" if wish.target.weight is None else None


def _dims(source: Source, reads: Inputs, usual: int) -> int:
    """Return how many spatial dimensions a layer's input has; BatchNorm1d takes both none and one."""
    if source.dims in (2, 3):
        return source.dims
    if reads.shape is not None:
        return len(reads.shape) - 2
    known = [dims for feeder in reads.feeders if (dims := spatial_dims(feeder.layer)) is not None]
    return known[0] if known else source.dims or usual


def _positions(reads: Inputs, dims: int) -> int | None:
    """Return the number of positions that a layer normalizes at the least, None where no input was seen."""
    if reads.shape is not None:
        return math.prod(reads.shape[2:])
    return 1 if dims == 0 else None


def _obstacle(source: Source, reads: Inputs, dims: int, wish: Wish) -> str | None:
    """Return why a layer cannot become what is wanted, whatever it is."""
    kind, positions = wish.target.data, _positions(reads, dims)
    hint = f". {wish.hint}" if wish.hint and reads.shape is not None else ""
    if kind == "in" and positions == 1:
        return f"its input has one position for each channel, nothing to normalize over{hint}"
    if kind == "in" and positions == 2:
        return f"its input has two positions for each channel, and {LITTLE_LEFT[2]}{hint}"
    values = None if positions is None else positions * source.channels
    if kind in ("ln", "gn") and values in LITTLE_LEFT:
        return f"its input has {values} values for each sample, and {LITTLE_LEFT[values]}{hint}"
    if kind in ("bn", "in") and dims > 3:
        return f"its input has {dims} spatial dimensions, and torch's layers take three"
    return None


def _replacement(source: Source, dims: int, positions: int | None, kind: str, groups: int | None) -> nn.Module | None:
    """Return the layer that takes the place of ``source``, or None where that is the same kind of layer."""
    old = source.layer
    settings = LayerSettings(
        channels=source.channels,
        dims=dims,
        eps=getattr(old, "eps", 1e-5),
        momentum=getattr(old, "momentum", 0.1),
        affine=source.gamma is not None or source.kind == "mbn",
        groups=groups,
        positions=positions,
    )
    try:
        new = data_layer(kind, settings)
    except ConfigurationError as error:
        raise ConfigurationError(f"{source.name}: {error}") from None
    same = isinstance(old, type(new)) and getattr(new, "num_groups", 0) == getattr(old, "num_groups", 0)
    return None if same else new


def _weights(reads: Inputs, kind: str | None, tied: set[int]) -> tuple[tuple[Feeder, ...], list[str]]:
    """Return the layers to be parametrized in front of a normalization, and why others are not."""
    if kind is None:
        return (), []
    if not reads.feeders:
        how = "" if reads.traced else " by the order of registration"
        return (), [f"no linear or convolutional layer was found to feed it{how}"]
    weights, problems = [], []
    for feeder in reads.feeders:
        if parametrization_title(feeder.layer) == NORMS[kind].title:
            continue
        why = refusal(feeder.layer, kind)
        if why is None and any(id(parameter) in tied for parameter in feeder.layer.parameters()):
            why = "its weight is used elsewhere too"
        if why is None:
            weights.append(feeder)
        else:
            problems.append(f"{feeder.name}, which feeds it, cannot be parametrized: {why}")
    return tuple(weights), problems
