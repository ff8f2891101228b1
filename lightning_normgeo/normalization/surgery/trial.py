"""Trial of a swap: plans are carried out and measured, and those that change a function that should stay are undone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import nn

from lightning_normgeo.normalization.folding import without_place
from lightning_normgeo.normalization.registry import Normalization
from lightning_normgeo.normalization.surgery.function_change import MODEL_KEPT, Difference, Yardstick, layer_tolerance
from lightning_normgeo.normalization.surgery.module_snapshot import Snapshot
from lightning_normgeo.normalization.surgery.norm_layers import NormLayer
from lightning_normgeo.normalization.surgery.preceding_layers import PrecedingLayer
from lightning_normgeo.normalization.surgery.replacement import ReplacementPlan, apply_plan
from lightning_normgeo.normalization.surgery.swap_report import Change, LeftAlone


@dataclass
class Outcome:
    """The result of a trial.

    Attributes:
        changes: the changes that were made, by layer, in the order of the plans.
        left: layers whose plans were undone, and why.
        change: relative change of the model's outputs in evaluation mode; None where it could not be measured.
        undo: snapshot of the model before all changes.
    """

    changes: dict[NormLayer, list[Change]] = field(default_factory=dict)
    left: list[LeftAlone] = field(default_factory=list)
    change: float | None = None
    undo: Snapshot = field(default_factory=lambda: Snapshot([], []))


class Trial:
    """Carries out plans, measures the model, and undoes plans that change a function which they should keep.

    Args:
        module: the model.
        target: the wanted normalization.
        unbiased: whether the standard deviation of ``ws`` divides by n - 1.
        yardstick: the outputs of the model before the changes; None if there is no example to run it on.
        hint: advice for messages if nothing could be measured.
    """

    def __init__(
        self, module: nn.Module, target: Normalization, unbiased: bool, yardstick: Yardstick | None, hint: str
    ) -> None:
        self.module, self.target, self.unbiased = module, target, unbiased
        self.yardstick, self.hint = yardstick, hint
        floating = (parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
        self.tolerance = layer_tolerance(next(floating, torch.float32))

    def settle(self, plans: Sequence[ReplacementPlan]) -> Outcome:
        """Carry out the plans, except those that turn out to change a function which they should keep.

        Each round carries out the remaining plans together and drops those that are at fault, until none is.
        """
        left: list[LeftAlone] = []
        while plans:
            undo, changes, difference = self._attempt(plans)
            if self._is_close(plans, difference):
                undo.restore()
                cast("Yardstick", self.yardstick).widen()
                undo, changes, difference = self._attempt(plans)
            unwanted = self._explained(plans, difference)
            suspects = [] if unwanted else self._suspects(plans, difference)
            if unwanted or suspects:
                undo.restore()
                unwanted = unwanted or self._tried_alone(suspects, difference)
                if not unwanted:  # each alone keeps the function, all together do not: no plan is at fault
                    undo, changes, difference = self._attempt(plans)
            if not unwanted:
                return _outcome([plan.norm_layer for plan in plans], changes, left, difference, undo)
            left += [LeftAlone(name, why) for norm_layer, why in unwanted.items() for name in norm_layer.names]
            plans = [plan for plan in plans if plan.norm_layer not in unwanted]
        return Outcome(left=left)

    def _attempt(self, plans: Sequence[ReplacementPlan]) -> tuple[Snapshot, dict[NormLayer, list[Change]], Difference]:
        undo = _snapshot(self.module, plans)
        changes: dict[NormLayer, list[Change]] = {}
        # folding scales the rows of a plain weight, so it has to come before another plan parametrizes that weight
        folded_first = sorted(plans, key=lambda plan: not isinstance(plan.fold, PrecedingLayer))
        try:
            for plan in folded_first:
                changes[plan.norm_layer] = list(apply_plan(self.module, plan, self.target, self.unbiased))
            return undo, changes, self._measured()
        except BaseException:
            undo.restore()
            raise

    def _measured(self) -> Difference:
        if self.yardstick is None or self.yardstick.problem is not None:
            return Difference(None, {})
        return self.yardstick.difference()

    def _is_close(self, plans: Sequence[ReplacementPlan], difference: Difference) -> bool:
        """Whether a change is so close to the tolerance that rounding may decide, and float64 was not tried yet."""
        if self.yardstick is None or self.yardstick.widened:
            return False
        keeping = [plan.norm_layer.name for plan in plans if keeps(plan.norm_layer, self.target)]
        changes = [difference.layers.get(name) or 0.0 for name in keeping]
        if len(keeping) == len(plans):
            changes.append(difference.total or 0.0)
        return any(0.3 * self.tolerance < change < 10 * MODEL_KEPT for change in changes)

    def _explained(self, plans: Sequence[ReplacementPlan], difference: Difference) -> dict[NormLayer, str]:
        """Return the layers whose function changes, or may change, as they cannot be folded, with the reasons."""
        unwanted = {}
        for plan in plans:
            change = difference.layers.get(plan.norm_layer.name)
            if difference.error or not isinstance(plan.fold, str) or not keeps(plan.norm_layer, self.target):
                continue
            if change is None:
                unwanted[plan.norm_layer] = f"{_cause(plan)}, and {self._unknown()}"
            elif change > self.tolerance:
                unwanted[plan.norm_layer] = _reason(plan, change)
        return unwanted

    def _unknown(self) -> str:
        if self.yardstick is None:
            return f"how much that changes could not be measured. {self.hint}"
        problem = self.yardstick.problem or "the layer is not run in evaluation mode"
        return f"how much that changes could not be measured: {problem}"

    def _suspects(self, plans: Sequence[ReplacementPlan], difference: Difference) -> list[ReplacementPlan]:
        """Return the plans that may be the cause, if the model fails or computes another function."""
        if difference.error:
            return list(plans)
        keeping = [plan for plan in plans if keeps(plan.norm_layer, self.target)]
        layers = [difference.layers.get(plan.norm_layer.name) or 0.0 for plan in keeping]
        total = (difference.total or 0.0) if len(keeping) == len(plans) else 0.0
        changed = max(layers, default=0.0) > self.tolerance or total > max(MODEL_KEPT, self.tolerance)
        return keeping if changed else []

    def _tried_alone(self, plans: Sequence[ReplacementPlan], together: Difference) -> dict[NormLayer, str]:
        """Return the layers whose plan, tried alone, makes the model fail or changes its function, with the reasons."""
        unwanted = {}
        for plan in plans:
            undo, _, alone = self._attempt([plan])
            undo.restore()
            own, total = alone.layers.get(plan.norm_layer.name) or 0.0, alone.total or 0.0
            if alone.error:
                unwanted[plan.norm_layer] = f"the model does not run without it ({alone.error})"
            elif together.error:
                continue
            elif own > self.tolerance:
                unwanted[plan.norm_layer] = _reason(plan, own)
            elif total > self.tolerance:
                unwanted[plan.norm_layer] = (
                    f"something else in the model reads what would change: its outputs would change by {total:.2g} of "
                    "their size in evaluation mode"
                )
        if together.error and not unwanted:
            return {plan.norm_layer: f"the model does not run after the swap ({together.error})" for plan in plans}
        return unwanted


def keeps(norm_layer: NormLayer, target: Normalization) -> bool:
    """Whether the swap of a layer should keep its function in evaluation mode, which has fixed statistics."""
    if target.data == "bn" and target.weight is None:
        return norm_layer.kind == "bn" and norm_layer.statistics[0] is not None
    return target.folds and (norm_layer.statistics[0] is not None or norm_layer.kind == "mbn")


def _cause(plan: ReplacementPlan) -> str:
    """Return the cause of a layer's changed function, in words."""
    if isinstance(plan.fold, str):
        return f"{' and '.join(without_place(plan.norm_layer, plan.layer))} would be dropped ({plan.fold})"
    lost = ", ".join(plan.norm_layer.lost)
    return lost or "the layer in front of it, or something between the two, computes more than torch's own layers do"


def _reason(plan: ReplacementPlan, change: float) -> str:
    return f"{_cause(plan)}: it would change by {change:.2g} of its size in evaluation mode"


def _outcome(
    norm_layers: Sequence[NormLayer],
    changes: dict[NormLayer, list[Change]],
    left: list[LeftAlone],
    difference: Difference,
    undo: Snapshot,
) -> Outcome:
    """Return the outcome, in which each change has the measured relative change of its layer."""
    measured = {
        norm_layer: [replace(change, change=difference.layers.get(norm_layer.name)) for change in changes[norm_layer]]
        for norm_layer in norm_layers
    }
    return Outcome(measured, left, difference.total, undo)


def _snapshot(module: nn.Module, plans: Sequence[ReplacementPlan]) -> Snapshot:
    """Return a snapshot of all modules and parameters that the plans may change."""
    modules: list[nn.Module] = []
    tensors: list[nn.Parameter] = []
    for plan in plans:
        preceding_layers = [*plan.weights, *([plan.fold] if isinstance(plan.fold, PrecedingLayer) else [])]
        modules += [
            plan.norm_layer.layer,
            *(module.get_submodule(name.rpartition(".")[0]) for name in plan.norm_layer.names),
        ]
        modules += [part for preceding in preceding_layers for part in preceding.layer.modules()]
        tensors += [parameter for preceding in preceding_layers for parameter in preceding.layer.parameters()]
    return Snapshot(modules, tensors)
