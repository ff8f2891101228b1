"""From an old normalization to what takes its place: parameters, statistics, flags; carrying out what was planned."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_normgeo.normalization.folding import (
    fold,
    gain_of,
    normalize_scaled,
    per_channel,
    scale_rows,
    without_place,
)
from lightning_normgeo.normalization.layers import MeanOnlyBatchNorm
from lightning_normgeo.normalization.parametrizations import (
    normalize_weight,
    parametrization_title,
    parametrizations_of,
)
from lightning_normgeo.normalization.registry import Normalization
from lightning_normgeo.normalization.surgery.norm_layers import Source
from lightning_normgeo.normalization.surgery.preceding_layers import Feeder
from lightning_normgeo.normalization.surgery.swap_report import Change, describe

_STATISTICS = {"running_mean": "running mean", "running_var": "running variance"}


@dataclass(frozen=True)
class Plan:
    """What is to become of one normalization layer.

    Attributes:
        source: the layer.
        layer: what takes its place; None if it stays.
        feeders: the layers in front of it.
        weights: those of them to be parametrized.
        problems: why others are not, in words.
        fold: the layer that γ, β and statistics go into; in words why there is none; None where they stay.
    """

    source: Source
    layer: nn.Module | None
    feeders: Sequence[Feeder]
    weights: Sequence[Feeder]
    problems: Sequence[str]
    fold: Feeder | str | None

    def changed_parameters(self, target: Normalization) -> Iterator[nn.Parameter]:
        """Yield the parameters that would vanish, or get others beside them; a weight without gain stays itself."""
        source = self.source.layer
        if self.layer is not None and (isinstance(self.layer, nn.Identity) or not _keeps(source, self.layer)):
            yield from source.parameters(recurse=False)
        for feeder in (*(self.weights if target.gain or target.weight == "wn" else ()), self.fold):
            if isinstance(feeder, Feeder):
                yield from feeder.layer.parameters()


def carry_out(module: nn.Module, plan: Plan, target: Normalization, unbiased: bool) -> Iterator[Change]:
    """Do what was planned for one layer, and say what was done under each of its names."""
    source, layer, factors = plan.source, plan.layer, None
    notes = [] if layer is None else source.lost
    if layer is not None and target.data is not None:
        notes += carry_over(source, layer, _like(plan, module), elsewhere=plan.fold is not None)
    if layer is not None and isinstance(plan.fold, Feeder):
        factors = fold(source, plan.fold.layer, layer)
        if plan.fold not in plan.weights:
            scale_rows(plan.fold.layer, factors)
    notes += _fold_notes(plan)
    weights = tuple(_parametrize(plan, target, unbiased, factors))
    if weights and target.data == "bn" and source.kind == "bn" and source.trained:
        notes.append("running statistics are those of the old weights: renew them in training mode")
    notes += plan.problems
    after = source.layer if layer is None else with_followers(source, layer)
    for name in source.names:
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, after)
        same = [f"the same layer as {source.name}"] if name != source.name else notes
        yield Change(name, describe(source.layer), describe(after), weights, ", ".join(same))


def _parametrize(plan: Plan, target: Normalization, unbiased: bool, factors: Tensor | None) -> Iterator[str]:
    gamma = plan.source.gamma
    for feeder in plan.weights:
        if parametrizations_of(feeder.layer):
            continue  # it is in front of several layers and was done for another
        if factors is None:
            normalize_weight(feeder.layer, target.weight or "", target.gain, unbiased)
        else:
            normalize_scaled(feeder.layer, target.weight or "", target.gain, unbiased, factors)
            gain = gain_of(feeder.layer)
            if gain is not None and gamma is not None and gamma.requires_grad:
                gain.requires_grad_(True)
        yield feeder.name


def _fold_notes(plan: Plan) -> list[str]:
    parts = without_place(plan.source, plan.layer)
    what = " and ".join([*([", ".join(parts[:-1])] if parts[1:] else []), *parts[-1:]])
    if isinstance(plan.fold, str):
        return [f"{what} dropped: {plan.fold}"]
    if plan.fold is not None:
        where = "weight" if isinstance(plan.layer, MeanOnlyBatchNorm) else "weight and bias"
        mean = "" if plan.source.gamma is None or plan.source.gamma.ndim == 1 else ", averaged over positions"
        return [f"{what} folded into {where} of {plan.fold.name}{mean}"]
    titles = {f.name: parametrization_title(f.layer) for f in plan.feeders if parametrizations_of(f.layer)}
    return [] if plan.weights else [f"the weight of {name} keeps its {title}" for name, title in titles.items()]


def _like(plan: Plan, module: nn.Module) -> Tensor | None:
    """Return a tensor with the device and dtype that a layer without any of its own is to have."""
    parts = [*(feeder.layer for feeder in plan.feeders), module]
    return next((p for part in parts for p in part.parameters() if p.is_floating_point()), None)


def carry_over(source: Source, layer: nn.Module, like: Tensor | None, elsewhere: bool = False) -> list[str]:
    """Move γ, β, running statistics and flags of ``source`` into ``layer``; return what could not be kept, in words.

    Args:
        source: the old layer.
        layer: the new one.
        like: a tensor with the device and dtype to use where the old layer has none.
        elsewhere: whether it is said elsewhere what becomes of γ and the variance that have no place in ``layer``.
    """
    own = (source.gamma, source.beta, *source.layer.buffers())
    like = next((tensor for tensor in own if tensor is not None and tensor.is_floating_point()), like)
    if like is not None:
        layer.to(device=like.device, dtype=like.dtype)
    lost = []
    for name, symbol, old in (("weight", "γ", source.gamma), ("bias", "β", source.beta)):
        new = layer._parameters.get(name)
        if old is not None and new is not None and old.shape == new.shape:
            layer._parameters[name] = old
        elif old is not None and new is not None:
            new.data.copy_(per_channel(old))
            new.requires_grad_(old.requires_grad)
            lost.append(f"{symbol} averaged over positions")
        elif name == "bias" and new is not None and source.gamma is not None:
            layer._parameters[name] = None  # γ without β is possible
        elif old is not None or new is not None:
            lost.append(f"{symbol} {'dropped' if new is None else 'added'}")
    layer.train(source.layer.training)
    lost += _carry_statistics(source, layer)
    return [entry for entry in lost if not elsewhere or entry not in ("γ dropped", "running variance dropped")]


def _carry_statistics(source: Source, layer: nn.Module) -> list[str]:
    """Keep running statistics of the batch; without tracking a batch normalization stays without."""
    old, new, lost = source.layer._buffers, layer._buffers, []
    batch = (_BatchNorm, MeanOnlyBatchNorm)
    if source.kind == "bn" and source.statistics[0] is None and isinstance(layer, _BatchNorm):
        layer.track_running_stats = False
        new.update(dict.fromkeys(new))
    for name in new if isinstance(source.layer, batch) and isinstance(layer, batch) else ():
        new[name] = new[name] if old.get(name) is None else old[name]
    for name, title in _STATISTICS.items():
        if new.get(name) is not old.get(name):
            lost.append(f"{title} {'dropped' if new.get(name) is None else 'starts anew'}")
    return lost


def _keeps(old: nn.Module, new: nn.Module) -> bool:
    """Whether a new layer takes over all parameters of the old one and has no others."""
    before, after = (
        {name: parameter.shape for name, parameter in layer.named_parameters(recurse=False)} for layer in (old, new)
    )
    return before == after or (before == {"weight": after.get("weight")} and "bias" in after)


def with_followers(source: Source, layer: nn.Module) -> nn.Module:
    """Return ``layer`` followed by what the old layer ran behind its normalization, if anything."""
    followers = source.followers
    if not followers:
        return layer
    norm = {} if isinstance(layer, nn.Identity) else {"norm": layer}
    chain = nn.Sequential(OrderedDict({**norm, **followers}))
    chain.training = source.layer.training
    return chain
