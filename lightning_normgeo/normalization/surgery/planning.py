"""Planning of a swap: the replacement of each normalization layer, or the reason why it is not replaced."""

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
from lightning_normgeo.normalization.surgery.norm_layers import NormLayer, spatial_dims, why_not_replaced
from lightning_normgeo.normalization.surgery.preceding_layers import NormInputs, PrecedingLayer
from lightning_normgeo.normalization.surgery.replacement import ReplacementPlan
from lightning_normgeo.normalization.surgery.swap_report import LeftAlone


@dataclass(frozen=True)
class SwapRequest:
    """The wanted normalization and properties of the model.

    Attributes:
        target: the wanted normalization.
        groups: number of groups of ``gn``; None for the default.
        usual: number of spatial dimensions of the model's convolutions.
        tied: ids of the parameters that belong to several modules.
        hint: advice for messages if no example was given; empty if one was.
    """

    target: Normalization
    groups: int | None
    usual: int
    tied: set[int]
    hint: str


def plan_all(
    module: nn.Module,
    norm_layers: Sequence[NormLayer],
    inputs: dict[nn.Module, NormInputs],
    target: Normalization,
    groups: int | None,
    hint: str = "",
) -> tuple[list[ReplacementPlan], list[LeftAlone]]:
    """Plan the swap of several layers.

    Args:
        module: the model.
        norm_layers: the normalization layers to be replaced.
        inputs: their inputs, by layer.
        target: the wanted normalization.
        groups: number of groups of ``gn``; None for the default.
        hint: advice for messages if no example was given; empty if one was.

    Returns:
        The plans for layers that can be replaced, and the other layers with the reasons.

    Raises:
        ConfigurationError: for groups that do not divide the channels of a layer, or hold one or two values.
    """
    convolutions = {spatial_dims(layer) for layer in module.modules()} - {None, 0}
    usual = next(iter(convolutions)) if len(convolutions) == 1 else 2
    request = SwapRequest(target, groups, usual or 2, tied_parameters(module), hint)
    plans: list[ReplacementPlan] = []
    left: list[LeftAlone] = []
    for norm_layer in norm_layers:
        reads = inputs.get(norm_layer.layer, NormInputs())
        dims = _dims(norm_layer, reads, request.usual)
        # a generated example shows the number of positions, but not whether the last dimension holds the channels
        shape = None if request.hint else reads.shape
        reason = (
            why_not_replaced(norm_layer, shape)
            or _obstacle(norm_layer, reads, dims, request)
            or _guesswork(reads, request)
        )
        plan = reason or _plan_one(norm_layer, reads, dims, request)
        if isinstance(plan, ReplacementPlan):
            plans.append(plan)
        else:
            left += [LeftAlone(name, plan) for name in norm_layer.names]
    return plans, left


def _plan_one(norm_layer: NormLayer, reads: NormInputs, dims: int, request: SwapRequest) -> ReplacementPlan | str:
    """Return the plan for a layer, or the reason why it is not replaced, in words."""
    target = request.target
    stand_in = nn.Identity().train(norm_layer.layer.training)
    positions = _positions(reads, dims)
    layer = stand_in if target.data is None else _replacement(norm_layer, dims, positions, target.data, request.groups)
    weights, problems = _weights(reads, target.weight, request.tied)
    if target.weight is not None and target.data is None and problems:
        return problems[0]
    if layer is None and not weights:
        there = target if target.weight is None or not problems else NORMS[target.data or ""]
        problem = f", and {problems[0]}" if problems else ""
        return f"it is {there.title} already{problem}"
    fold: PrecedingLayer | str | None = None
    if layer is not None and target.data in (None, "mbn"):
        fold = foldable(norm_layer, layer, reads.preceding_layers, request.tied)
    return ReplacementPlan(norm_layer, layer, reads.preceding_layers, weights, tuple(problems), fold)


def _guesswork(reads: NormInputs, request: SwapRequest) -> str | None:
    """Return the reason why the preceding layers are uncertain, in words; None if they are certain or not needed."""
    if reads.traced or reads.chained or not (request.target.weight or request.target.data is None):
        return None
    if reads.preceding_layers:
        names = ", ".join(preceding.name for preceding in reads.preceding_layers)
        return f"that {names} feeds it is a guess from the order of registration. {request.hint}"
    return f"what feeds it is unknown. {request.hint}" if request.target.weight is None else None


def _dims(norm_layer: NormLayer, reads: NormInputs, usual: int) -> int:
    """Return the number of spatial dimensions of a layer's input."""
    if norm_layer.dims in (2, 3):  # the class alone does not tell 0 from 1: BatchNorm1d takes both
        return norm_layer.dims
    if reads.shape is not None:
        return len(reads.shape) - 2
    known = [dims for preceding in reads.preceding_layers if (dims := spatial_dims(preceding.layer)) is not None]
    return known[0] if known else norm_layer.dims or usual


def _positions(reads: NormInputs, dims: int) -> int | None:
    """Return the smallest number of spatial positions in the inputs of a layer; None if unknown."""
    if reads.shape is not None:
        return math.prod(reads.shape[2:])
    return 1 if dims == 0 else None


def _obstacle(norm_layer: NormLayer, reads: NormInputs, dims: int, request: SwapRequest) -> str | None:
    """Return the reason why the input of a layer does not allow the wanted normalization, in words; None if it does."""
    kind, positions = request.target.data, _positions(reads, dims)
    hint = f". {request.hint}" if request.hint and reads.shape is not None else ""
    if kind == "in" and positions == 1:
        return f"its input has one position for each channel, nothing to normalize over{hint}"
    if kind == "in" and positions == 2:
        return f"its input has two positions for each channel, and {LITTLE_LEFT[2]}{hint}"
    values = None if positions is None else positions * norm_layer.channels
    if kind in ("ln", "gn") and values in LITTLE_LEFT:
        return f"its input has {values} values for each sample, and {LITTLE_LEFT[values]}{hint}"
    if kind in ("bn", "in") and dims > 3:
        return f"its input has {dims} spatial dimensions, and torch's layers take three"
    return None


def _replacement(
    norm_layer: NormLayer, dims: int, positions: int | None, kind: str, groups: int | None
) -> nn.Module | None:
    """Return the replacement of ``norm_layer``; None if it would be a layer of the same kind."""
    old = norm_layer.layer
    settings = LayerSettings(
        channels=norm_layer.channels,
        dims=dims,
        eps=getattr(old, "eps", 1e-5),
        momentum=getattr(old, "momentum", 0.1),
        affine=norm_layer.gamma is not None or norm_layer.kind == "mbn",
        groups=groups,
        positions=positions,
    )
    try:
        new = data_layer(kind, settings)
    except ConfigurationError as error:
        raise ConfigurationError(f"{norm_layer.name}: {error}") from None
    same = isinstance(old, type(new)) and getattr(new, "num_groups", 0) == getattr(old, "num_groups", 0)
    return None if same else new


def _weights(reads: NormInputs, kind: str | None, tied: set[int]) -> tuple[tuple[PrecedingLayer, ...], list[str]]:
    """Return the preceding layers whose weights are to be parametrized, and the reasons why others are not."""
    if kind is None:
        return (), []
    if not reads.preceding_layers:
        how = "" if reads.traced else " by the order of registration"
        return (), [f"no linear or convolutional layer was found to feed it{how}"]
    weights, problems = [], []
    for preceding in reads.preceding_layers:
        if parametrization_title(preceding.layer) == NORMS[kind].title:
            continue
        why = refusal(preceding.layer, kind)
        if why is None and any(id(parameter) in tied for parameter in preceding.layer.parameters()):
            why = "its weight is used elsewhere too"
        if why is None:
            weights.append(preceding)
        else:
            problems.append(f"{preceding.name}, which feeds it, cannot be parametrized: {why}")
    return tuple(weights), problems
