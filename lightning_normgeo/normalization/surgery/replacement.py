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
from lightning_normgeo.normalization.surgery.norm_layers import NormLayer
from lightning_normgeo.normalization.surgery.preceding_layers import PrecedingLayer
from lightning_normgeo.normalization.surgery.swap_report import Change, describe

_STATISTICS = {"running_mean": "running mean", "running_var": "running variance"}


@dataclass(frozen=True)
class ReplacementPlan:
    """What is to become of one normalization layer.

    Attributes:
        norm_layer: the layer.
        layer: what takes its place; None if it stays.
        preceding_layers: the layers in front of it.
        weights: those of them to be parametrized.
        problems: why others are not, in words.
        fold: the layer that γ, β and statistics go into; in words why there is none; None where they stay.
    """

    norm_layer: NormLayer
    layer: nn.Module | None
    preceding_layers: Sequence[PrecedingLayer]
    weights: Sequence[PrecedingLayer]
    problems: Sequence[str]
    fold: PrecedingLayer | str | None

    def changed_parameters(self, target: Normalization) -> Iterator[nn.Parameter]:
        """Yield the parameters that would vanish, or get others beside them; a weight without gain stays itself."""
        norm_layer = self.norm_layer.layer
        if self.layer is not None and (isinstance(self.layer, nn.Identity) or not _keeps(norm_layer, self.layer)):
            yield from norm_layer.parameters(recurse=False)
        for preceding in (*(self.weights if target.gain or target.weight == "wn" else ()), self.fold):
            if isinstance(preceding, PrecedingLayer):
                yield from preceding.layer.parameters()


def apply_plan(module: nn.Module, plan: ReplacementPlan, target: Normalization, unbiased: bool) -> Iterator[Change]:
    """Do what was planned for one layer, and say what was done under each of its names."""
    norm_layer, layer, factors = plan.norm_layer, plan.layer, None
    notes = [] if layer is None else norm_layer.lost
    if layer is not None and target.data is not None:
        notes += copy_state(norm_layer, layer, _like(plan, module), elsewhere=plan.fold is not None)
    if layer is not None and isinstance(plan.fold, PrecedingLayer):
        factors = fold(norm_layer, plan.fold.layer, layer)
        if plan.fold not in plan.weights:
            scale_rows(plan.fold.layer, factors)
    notes += _fold_notes(plan)
    weights = tuple(_parametrize(plan, target, unbiased, factors))
    if weights and target.data == "bn" and norm_layer.kind == "bn" and norm_layer.trained:
        notes.append("running statistics are those of the old weights: renew them in training mode")
    notes += plan.problems
    after = norm_layer.layer if layer is None else with_trailing_modules(norm_layer, layer)
    for name in norm_layer.names:
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, after)
        same = [f"the same layer as {norm_layer.name}"] if name != norm_layer.name else notes
        yield Change(name, describe(norm_layer.layer), describe(after), weights, ", ".join(same))


def _parametrize(plan: ReplacementPlan, target: Normalization, unbiased: bool, factors: Tensor | None) -> Iterator[str]:
    gamma = plan.norm_layer.gamma
    for preceding in plan.weights:
        if parametrizations_of(preceding.layer):
            continue  # it is in front of several layers and was done for another
        if factors is None:
            normalize_weight(preceding.layer, target.weight or "", target.gain, unbiased)
        else:
            normalize_scaled(preceding.layer, target.weight or "", target.gain, unbiased, factors)
            gain = gain_of(preceding.layer)
            if gain is not None and gamma is not None and gamma.requires_grad:
                gain.requires_grad_(True)
        yield preceding.name


def _fold_notes(plan: ReplacementPlan) -> list[str]:
    parts = without_place(plan.norm_layer, plan.layer)
    what = " and ".join([*([", ".join(parts[:-1])] if parts[1:] else []), *parts[-1:]])
    if isinstance(plan.fold, str):
        return [f"{what} dropped: {plan.fold}"]
    if plan.fold is not None:
        where = "weight" if isinstance(plan.layer, MeanOnlyBatchNorm) else "weight and bias"
        mean = "" if plan.norm_layer.gamma is None or plan.norm_layer.gamma.ndim == 1 else ", averaged over positions"
        return [f"{what} folded into {where} of {plan.fold.name}{mean}"]
    titles = {f.name: parametrization_title(f.layer) for f in plan.preceding_layers if parametrizations_of(f.layer)}
    return [] if plan.weights else [f"the weight of {name} keeps its {title}" for name, title in titles.items()]


def _like(plan: ReplacementPlan, module: nn.Module) -> Tensor | None:
    """Return a tensor with the device and dtype that a layer without any of its own is to have."""
    parts = [*(preceding.layer for preceding in plan.preceding_layers), module]
    return next((p for part in parts for p in part.parameters() if p.is_floating_point()), None)


def copy_state(norm_layer: NormLayer, layer: nn.Module, like: Tensor | None, elsewhere: bool = False) -> list[str]:
    """Move γ, β, running statistics and flags of ``norm_layer`` into ``layer``; return in words what was lost.

    Args:
        norm_layer: the old layer.
        layer: the new one.
        like: a tensor with the device and dtype to use where the old layer has none.
        elsewhere: whether it is said elsewhere what becomes of γ and the variance that have no place in ``layer``.
    """
    own = (norm_layer.gamma, norm_layer.beta, *norm_layer.layer.buffers())
    like = next((tensor for tensor in own if tensor is not None and tensor.is_floating_point()), like)
    if like is not None:
        layer.to(device=like.device, dtype=like.dtype)
    lost = []
    for name, symbol, old in (("weight", "γ", norm_layer.gamma), ("bias", "β", norm_layer.beta)):
        new = layer._parameters.get(name)
        if old is not None and new is not None and old.shape == new.shape:
            layer._parameters[name] = old
        elif old is not None and new is not None:
            new.data.copy_(per_channel(old))
            new.requires_grad_(old.requires_grad)
            lost.append(f"{symbol} averaged over positions")
        elif name == "bias" and new is not None and norm_layer.gamma is not None:
            layer._parameters[name] = None  # γ without β is possible
        elif old is not None or new is not None:
            lost.append(f"{symbol} {'dropped' if new is None else 'added'}")
    layer.train(norm_layer.layer.training)
    lost += _carry_statistics(norm_layer, layer)
    return [entry for entry in lost if not elsewhere or entry not in ("γ dropped", "running variance dropped")]


def _carry_statistics(norm_layer: NormLayer, layer: nn.Module) -> list[str]:
    """Keep running statistics of the batch; without tracking a batch normalization stays without."""
    old, new, lost = norm_layer.layer._buffers, layer._buffers, []
    batch = (_BatchNorm, MeanOnlyBatchNorm)
    if norm_layer.kind == "bn" and norm_layer.statistics[0] is None and isinstance(layer, _BatchNorm):
        layer.track_running_stats = False
        new.update(dict.fromkeys(new))
    for name in new if isinstance(norm_layer.layer, batch) and isinstance(layer, batch) else ():
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


def with_trailing_modules(norm_layer: NormLayer, layer: nn.Module) -> nn.Module:
    """Return ``layer`` followed by what the old layer ran behind its normalization, if anything."""
    followers = norm_layer.followers
    if not followers:
        return layer
    norm = {} if isinstance(layer, nn.Identity) else {"norm": layer}
    chain = nn.Sequential(OrderedDict({**norm, **followers}))
    chain.training = norm_layer.layer.training
    return chain
