"""swap_norm: another normalization for a model that is built already, with a report of what changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_normgeo.errors import ConfigurationError
from lightning_normgeo.normalization.feeders import Feeder, Inputs, inputs_by_graph, inputs_in_order
from lightning_normgeo.normalization.folding import foldable, tied_parameters
from lightning_normgeo.normalization.graph import is_compiled
from lightning_normgeo.normalization.layers import LayerSettings, data_layer
from lightning_normgeo.normalization.registry import NORMS, Normalization, find_norm
from lightning_normgeo.normalization.sources import Source, matching, normalization_layers, spatial_dims, unsuitable
from lightning_normgeo.normalization.swap_report import Change, LeftAlone, SwapReport
from lightning_normgeo.normalization.transplant import Plan, carry_out
from lightning_normgeo.normalization.weights import parametrization_title, refusal

_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def swap_norm(
    module: nn.Module,
    to: str,
    layers: str | Sequence[str] = "*",
    groups: int | None = None,
    unbiased: bool = True,
    example_batch: Any = None,
    optimizer: Optimizer | None = None,
) -> SwapReport:
    r"""Give a built model another normalization, in place.

    Layers over the data (``bn``, ``ln``, ``in``, ``gn``) are replaced under their names: γ, β (the same Parameters, so
    an optimizer stays valid), ε, momentum, device, dtype, training mode and activations of subclasses (behind the new
    layer, in a Sequential) are kept; running statistics are kept between batch normalizations. ``ln`` normalizes
    channels and positions jointly (``GroupNorm(1, C)``).

    For ``wn``, ``cwn``, ``ws``, ``sn`` and ``none`` the layer goes and the weight that fed it is parametrized. Where
    that weight is directly in front, γ, β and running statistics are folded into it, and it gets a bias:

    .. math:: W' = \gamma W / \sqrt{\sigma^2 + \varepsilon}, \quad
              b' = \beta + \gamma (b - \mu) / \sqrt{\sigma^2 + \varepsilon}

    (eq 12; without running statistics σ² + ε = 1, μ = 0). So in evaluation mode ``none``, ``wn`` and ``sn`` keep the
    function that batch normalization had, ``cwn`` and ``ws`` keep it up to the mean of each row; ``wn+mbn`` keeps it
    too, with μ and β in the layer. Without γ behind them ``cwn`` and ``ws`` get a learnable gain per row, ``sn`` one
    for the matrix. ``gn+ws`` and the like do both and fold nothing: running statistics of a trained batch
    normalization do not fit the changed weights, and a pass in training mode has to renew them.

    Args:
        module: the model; layers inside it are replaced.
        to: a name out of ``NORMS``.
        layers: globs over the module paths of the normalization layers to be replaced.
        groups: for ``gn``; if left out the largest divisor up to 32 that leaves two channels in a group.
        unbiased: whether the deviation of ``ws`` divides by n - 1 (Qiao's code) or by n (the paper).
        example_batch: a batch, or the tuple of arguments, for one forward pass that finds the weights in front of each
            layer, also through sums and concatenations. Without it they are guessed from the order of registration.
        optimizer: an optimizer that exists already, to be checked; that of a running Trainer is found by itself.

    Returns:
        What changed, what was left alone and why, and how many parameters there were and are.

    Raises:
        ConfigurationError: for an unknown name; no layer to replace, or none that would change; groups that do not
            divide; lazy layers; a model wrapped by DDP or FSDP or compiled; an optimizer that would miss parameters.
    """
    target = find_norm(to)
    if groups is not None and target.data != "gn":
        raise ConfigurationError(f"groups={groups} is for group normalization, not for {to!r}. Leave it out.")
    _check_wrapping(module)
    found = normalization_layers(module)
    sources = matching(found, layers)
    traced, before = example_batch is not None, _count(module)
    inputs = inputs_by_graph(module, found, example_batch) if traced else inputs_in_order(module, found)
    plans, left = _plan(module, sources, inputs, target, groups)
    if not plans:
        why = "; ".join(f"{entry.name}: {entry.reason}" for entry in left[:3])
        raise ConfigurationError(f"swap_norm(to={to!r}) would change nothing: {why}{'; …' if len(left) > 3 else ''}.")
    _check_optimizers(module, optimizer, plans, target)
    changes: dict[Source, list[Change]] = {}
    folded_first = sorted(plans, key=lambda plan: not isinstance(plan.fold, Feeder))  # while weights are plain
    for plan in folded_first:
        changes[plan.source] = list(carry_out(module, plan, target, unbiased))
    rest = [name for source in found if source not in sources for name in source.names]
    left += [LeftAlone(name, f"layers={layers!r} does not match it") for name in rest]
    ordered = tuple(change for plan in plans for change in changes[plan.source])
    by_weights = target.data is None or target.weight is not None
    return SwapReport(to, ordered, tuple(left), before, _count(module), traced if by_weights else None)


def _plan(
    module: nn.Module,
    sources: Sequence[Source],
    inputs: dict[nn.Module, Inputs],
    target: Normalization,
    groups: int | None,
) -> tuple[list[Plan], list[LeftAlone]]:
    plans, left = [], []
    convolutions = {spatial_dims(layer) for layer in module.modules()} - {None, 0}
    usual = next(iter(convolutions)) if len(convolutions) == 1 else 2
    tied = tied_parameters(module)
    for source in sources:
        reads = inputs.get(source.layer, Inputs())
        dims = _dims(source, reads, usual)
        reason = unsuitable(source, reads.shape) or _obstacle(reads, dims, target)
        plan = reason or _plan_one(source, reads, dims, target, groups, tied)
        if isinstance(plan, Plan):
            plans.append(plan)
        else:
            left += [LeftAlone(name, plan) for name in source.names]
    return plans, left


def _plan_one(
    source: Source, reads: Inputs, dims: int, target: Normalization, groups: int | None, tied: set[int]
) -> Plan | str:
    """Return what becomes of a layer, or why it stays as it is."""
    stand_in = nn.Identity().train(source.layer.training)
    layer = stand_in if target.data is None else _replacement(source, dims, target.data, groups)
    weights, problems = _weights(reads, target.weight, tied)
    if target.weight is not None and target.data is None and problems:
        return problems[0]
    if layer is None and not weights:
        there = target if target.weight is None or not problems else NORMS[target.data or ""]
        return f"it is {there.title} already" + "".join(f", and {problem}" for problem in problems[:1])
    fold: Feeder | str | None = None
    if layer is not None and target.data in (None, "mbn"):
        fold = foldable(source, layer, reads.feeders, tied)
    return Plan(source, layer, reads.feeders, weights, tuple(problems), fold)


def _dims(source: Source, reads: Inputs, usual: int | None) -> int:
    """Return how many spatial dimensions a layer's input has; BatchNorm1d takes both none and one."""
    if source.dims in (2, 3):
        return source.dims
    if reads.shape is not None:
        return len(reads.shape) - 2
    known = [dims for feeder in reads.feeders if (dims := spatial_dims(feeder.layer)) is not None]
    return known[0] if known else source.dims or usual or 2


def _obstacle(reads: Inputs, dims: int, target: Normalization) -> str | None:
    """Return why a layer cannot become what is wanted, whatever it is."""
    if target.data == "in" and (dims == 0 or (reads.shape is not None and math.prod(reads.shape[2:]) == 1)):
        return "its input has one position for each channel, nothing to normalize over"
    if target.data in ("bn", "in") and dims > 3:
        return f"its input has {dims} spatial dimensions, and torch's layers take three"
    return None


def _replacement(source: Source, dims: int, kind: str, groups: int | None) -> nn.Module | None:
    """Return the layer that takes the place of ``source``, or None where that is the same kind of layer."""
    old = source.layer
    settings = LayerSettings(
        channels=source.channels,
        dims=dims,
        eps=getattr(old, "eps", 1e-5),
        momentum=getattr(old, "momentum", 0.1),
        affine=source.gamma is not None or source.kind == "mbn",
        groups=groups,
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


def _check_wrapping(module: nn.Module) -> None:
    trained = getattr(getattr(_running_trainer(module), "strategy", None), "model", None)
    for child in [*module.modules(), trained]:
        kinds = {base.__name__ for base in type(child).__mro__} & set(_WRAPPERS)
        if kinds:
            raise ConfigurationError(
                f"swap_norm was given a model wrapped by {min(kinds, key=_WRAPPERS.index)}, which has taken stock of "
                "its parameters. Swap first and wrap afterwards."
            )
    if is_compiled(module):
        raise ConfigurationError("swap_norm was given a compiled model. Swap first and call torch.compile afterwards.")


def _check_optimizers(
    module: nn.Module, optimizer: Optimizer | None, plans: Sequence[Plan], target: Normalization
) -> None:
    """Refuse where an optimizer holds parameters that would vanish, or would miss new ones beside them."""
    optimizers = [*([] if optimizer is None else [optimizer]), *getattr(_running_trainer(module), "optimizers", ())]
    changed = {id(parameter) for plan in plans for parameter in plan.changed_parameters(target)}
    for held in optimizers:
        if any(id(p) in changed for group in held.param_groups for p in group["params"]):
            raise ConfigurationError(
                f"{type(held).__name__} holds parameters of the model that swap_norm would replace. Swap first and "
                "build the optimizer afterwards (in Lightning: before Trainer.fit, or in configure_model)."
            )


def _running_trainer(module: nn.Module) -> Any:
    """Return the Trainer that a LightningModule is in the hands of, if any; one that has finished lets go of it."""
    trainer = getattr(module, "_trainer", None)
    return trainer if getattr(getattr(trainer, "state", None), "status", None) == "running" else None


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
