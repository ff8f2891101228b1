"""Execution of replacement plans: parameters, statistics and flags move from an old normalization to the new one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_normgeo.normalization.folding import (
    channel_values,
    fold,
    gain_of,
    normalize_scaled,
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
    """The planned changes for one normalization layer.

    Attributes:
        norm_layer: the normalization layer.
        layer: its replacement; None if the layer stays.
        preceding_layers: the layers that feed it.
        weights: those preceding layers whose weights are to be parametrized.
        problems: why the weights of other preceding layers are not, in words.
        fold: the preceding layer that γ, β and running statistics are folded into; if there is none, the reason in
            words; None if nothing needs folding.
    """

    norm_layer: NormLayer
    layer: nn.Module | None
    preceding_layers: Sequence[PrecedingLayer]
    weights: Sequence[PrecedingLayer]
    problems: Sequence[str]
    fold: PrecedingLayer | str | None

    def changed_parameters(self, target: Normalization) -> Iterator[nn.Parameter]:
        """Yield the parameters that the plan removes, or splits into several (a weight that gets a gain or a bias)."""
        norm_layer = self.norm_layer.layer
        if self.layer is not None and (isinstance(self.layer, nn.Identity) or not _keeps(norm_layer, self.layer)):
            yield from norm_layer.parameters(recurse=False)
        split = self.weights if target.gain or target.weight == "wn" else ()
        for preceding in (*split, self.fold):
            if isinstance(preceding, PrecedingLayer):
                yield from preceding.layer.parameters()


def apply_plan(module: nn.Module, plan: ReplacementPlan, target: Normalization, unbiased: bool) -> Iterator[Change]:
    """Carry out the plan for one layer, and yield a :class:`Change` for each of its module paths."""
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
            continue  # it feeds several normalizations and was parametrized for another one
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
    listed = ", ".join(parts[:-1])  # "γ, β and running statistics"
    listed = f"{listed} and {parts[-1]}" if listed else "".join(parts)
    if isinstance(plan.fold, str):
        return [f"{listed} dropped: {plan.fold}"]
    if plan.fold is not None:
        where = "weight" if isinstance(plan.layer, MeanOnlyBatchNorm) else "weight and bias"
        mean = "" if plan.norm_layer.gamma is None or plan.norm_layer.gamma.ndim == 1 else ", averaged over positions"
        return [f"{listed} folded into {where} of {plan.fold.name}{mean}"]
    titles = {f.name: parametrization_title(f.layer) for f in plan.preceding_layers if parametrizations_of(f.layer)}
    return [] if plan.weights else [f"the weight of {name} keeps its {title}" for name, title in titles.items()]


def _like(plan: ReplacementPlan, module: nn.Module) -> Tensor | None:
    """Return a tensor whose device and dtype the replacement gets if the old layer has no tensors of its own."""
    parts = [*(preceding.layer for preceding in plan.preceding_layers), module]
    return next((p for part in parts for p in part.parameters() if p.is_floating_point()), None)


def copy_state(norm_layer: NormLayer, layer: nn.Module, like: Tensor | None, elsewhere: bool = False) -> list[str]:
    """Move γ, β, running statistics and flags of the old layer into the new one.

    Args:
        norm_layer: the old layer.
        layer: the new layer, changed in place.
        like: a tensor with the device and dtype to use if the old layer has no tensors.
        elsewhere: whether to leave out dropped γ and running variance from the result, since another note covers them.

    Returns:
        The parameters and statistics that were dropped, added or changed, in words.
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
            new.data.copy_(channel_values(old))
            new.requires_grad_(old.requires_grad)
            lost.append(f"{symbol} averaged over positions")
        elif name == "bias" and new is not None and norm_layer.gamma is not None:
            layer._parameters[name] = None  # the old layer has γ and no β either
        elif old is not None or new is not None:
            lost.append(f"{symbol} {'dropped' if new is None else 'added'}")
    layer.train(norm_layer.layer.training)
    lost += _carry_statistics(norm_layer, layer)
    return [entry for entry in lost if not elsewhere or entry not in ("γ dropped", "running variance dropped")]


def _carry_statistics(norm_layer: NormLayer, layer: nn.Module) -> list[str]:
    """Move running statistics between batch normalizations, if there are any; return the losses in words."""
    old, new, lost = norm_layer.layer._buffers, layer._buffers, []
    batch = (_BatchNorm, MeanOnlyBatchNorm)
    if norm_layer.kind == "bn" and norm_layer.statistics[0] is None and isinstance(layer, _BatchNorm):
        layer.track_running_stats = False
        new.update(dict.fromkeys(new))
    if isinstance(norm_layer.layer, batch) and isinstance(layer, batch):
        for name in new:
            new[name] = new[name] if old.get(name) is None else old[name]
    for name, title in _STATISTICS.items():
        if new.get(name) is not old.get(name):
            lost.append(f"{title} {'dropped' if new.get(name) is None else 'starts anew'}")
    return lost


def _keeps(old: nn.Module, new: nn.Module) -> bool:
    """Whether a new layer has the parameters of the old one and no others; a β that the old one lacks gets removed."""
    before, after = (
        {name: parameter.shape for name, parameter in layer.named_parameters(recurse=False)} for layer in (old, new)
    )
    return before == after or (before == {"weight": after.get("weight")} and "bias" in after)


def with_trailing_modules(norm_layer: NormLayer, layer: nn.Module) -> nn.Module:
    """Return ``layer`` followed by the modules that the old layer ran behind its normalization, if any."""
    followers = norm_layer.followers
    if not followers:
        return layer
    norm = {} if isinstance(layer, nn.Identity) else {"norm": layer}
    chain = nn.Sequential(OrderedDict({**norm, **followers}))
    chain.training = norm_layer.layer.training
    return chain
