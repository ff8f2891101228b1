"""NormGrowthMonitor, which measures and explains the increment of ‖W‖² from each optimizer step (eq 16)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from lightning_normgeo.callbacks._monitors.geometry_monitor import EveryNSteps, GeometryMonitor
from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep, WandbKeys
from lightning_normgeo.callbacks._monitors.session import Session
from lightning_normgeo.callbacks._readings.cumulative_readings import cumulative_readings
from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.callbacks._readings.residual_warnings import FLOOR, NORM_SQ, RESIDUAL
from lightning_normgeo.callbacks._readings.stacked_units import StackedUnits
from lightning_normgeo.errors import skipped_on_error
from lightning_normgeo.geometry.angles import effective_lr, split_update
from lightning_normgeo.geometry.increments.increment_terms import Scalar, UpdateRule
from lightning_normgeo.geometry.increments.norm_increments import identity_terms
from lightning_normgeo.geometry.rows import has_float64
from lightning_normgeo.geometry.update_rules.optimizers.sgd import SGDRule
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements
from lightning_normgeo.probes.weight_step import WeightStep
from lightning_normgeo.utilities.checked_values import flag


class NormGrowthMonitor(GeometryMonitor):
    r"""Logs weight norms and their increments: measured, predicted by eq 16, and explained term by term.

    Eq 16 of Sun et al. 2020, :math:`\Delta\lVert W\rVert^2 = \eta^2\lVert g\rVert^2`, holds for scale-invariant
    weights under plain SGD; ``eq16_applies`` is 1 if this is the case. ``predicted_momentum`` is the increment under
    SGD with momentum and weight decay that follows from eq 15, ⟨W, g⟩ = 0. ``explained`` is the sum of the ``term_…``
    keys. It is exact for any weight whose optimizer has a known formula
    (:func:`~lightning_normgeo.probes.describe_update`), and with several optimizers it is the sum over those weights.
    All other weights, and all weights if a closure is evaluated several times per step (LBFGS, SAM), have
    ``identity_…`` keys instead: a decomposition that holds for any update, and therefore tests no formula. A residual
    far above the rounding floor causes one warning.

    Metric keys, units and meanings: the documentation's key table, made from
    :data:`lightning_normgeo.runs.quantities.QUANTITIES`.

    Aggregates treat all units as one vector, unless the table says otherwise. Add ``/{module path}`` for one layer.

    With ``cumulative`` every optimizer step is counted, measured or not, so that the whole change of ‖W‖² since
    training began is explained: ``cumulative_increment`` is ‖W_T‖² - ‖W_0‖², ``cumulative_predicted`` is Σ η²‖g‖², and
    ``cumulative_predicted_momentum`` follows from ⟨W, g⟩ = 0 under SGD with momentum, by a recursion over norms alone.
    The totals cover all weights that were ever measured, including weights frozen later. They are saved in
    checkpoints, and a resumed training continues them exactly. Changes of weights by anything but the optimizer
    (averaging, clipping) appear in ``cumulative_residual``.

    Cost: a copy of the observed weights, and two passes over weights, gradients and momentum per measured step; with
    ``cumulative`` one pass over the same per unmeasured step.

    Args:
        every_n_steps: measure every n-th optimizer step; ``auto`` for less and less often in long trainings (see
            :class:`GeometryMonitor`). Default: the Trainer's ``log_every_n_steps``.
        layers: globs for the layers with metric keys of their own, at most 16; more layers go into one table (see
            :class:`GeometryMonitor`). Default: the first residual block.
        cumulative: whether to log cumulative increments over all steps as well. Default: False.
        wandb_keys: metric keys sent to W&B: two dozen ``aggregates`` or ``all`` (see :class:`GeometryMonitor`).
            Default: ``aggregates``.
    """

    groups = ("norm_growth", "norm_growth_control")
    needs_updates = True

    def __init__(
        self,
        every_n_steps: EveryNSteps = None,
        layers: str | list[str] | None = None,
        cumulative: bool = False,
        wandb_keys: WandbKeys = "aggregates",
    ) -> None:
        super().__init__(every_n_steps, layers, wandb_keys)
        self.cumulative = flag("cumulative", cumulative)
        self._kept_sums: CumulativeIncrements | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start with cumulative increments of zero; a checkpoint is loaded later."""
        if stage == "fit":
            self._kept_sums = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove every hook, but keep the cumulative increments: a checkpoint may still be saved."""
        self._keep_sums(trainer)
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove every hook, but keep the cumulative increments: a checkpoint may still be saved."""
        self._keep_sums(trainer)
        super().on_exception(trainer, pl_module, exception)

    @skipped_on_error
    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Save the cumulative increments."""
        if self.cumulative:
            sums = Session.of(trainer).sums or self._kept_sums
            checkpoint["lightning_normgeo"] = {"account": {} if sums is None else sums.state()}

    @skipped_on_error
    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Resume from the cumulative increments in a checkpoint, if it has any."""
        if self.cumulative:
            saved = checkpoint.get("lightning_normgeo")
            Session.of(trainer).restore_sums(saved.get("account", {}) if isinstance(saved, dict) else {})

    @skipped_on_error
    def _keep_sums(self, trainer: Any) -> None:
        """Keep the cumulative increments beyond the end of the session, which holds them during training."""
        self._kept_sums = Session.of(trainer).sums

    def measure(self, measured: MeasuredStep) -> Iterable[Reading]:
        """Return the readings of one step."""
        for group, invariant in zip(self.groups, (True, False), strict=True):
            columns = measured.columns(invariant, "update")
            if columns is None:
                continue
            yield from _growth(group, columns, measured.turned)
            yield from _explained(group, columns)
            yield from _equilibrium(group, columns)
        if self.cumulative and measured.sums is not None:
            moved = [step for step in measured.steps if step.update is not None]
            for group, invariant in zip(self.groups, (True, False), strict=True):
                yield from cumulative_readings(group, invariant, moved, measured.sums)


def _growth(group: str, columns: StackedUnits, turned: bool) -> Iterator[Reading]:
    layers, update = columns.layers, columns.update
    increment = columns.increment
    yield layers.reading(f"{group}/weight_norm", update.weight_sq, layers.sum, torch.sqrt)
    yield layers.reading(f"{group}/increment", increment, layers.sum)
    if columns.has_gradient:
        yield layers.reading(f"{group}/predicted", columns.column("predicted"), layers.sum)
        covered = not turned and all(step.is_plain_sgd and step.units.invariant for step in columns.steps)
        yield Reading(f"{group}/eq16_applies", increment.new_full((), float(covered)))
    squared_angle = split_update(update).angle.square()
    if group.endswith("_control"):  # most rows of an embedding are in no batch of a step, and do not move
        moved = update.update_sq > 0
        yield layers.reading_of_some(f"{group}/angular_update", squared_angle, moved, torch.sqrt)
        yield layers.reading(f"{group}/rows_unmoved", (~moved).to(increment), layers.sum)
    else:
        yield layers.reading(f"{group}/angular_update", squared_angle, layers.mean, torch.sqrt)
    rates = effective_lr(columns.spread("lr"), columns.column("weight_sq"))
    yield layers.reading(f"{group}/effective_lr", rates, layers.mean)


def _explained(group: str, columns: StackedUnits) -> Iterator[Reading]:
    """Yield the increments that formulas explain, over the weights that have one, and the rounding floor of all."""
    known = [step for step in columns.steps if step.terms is not None]
    if known:
        explained = columns if len(known) == len(columns.steps) else StackedUnits(known)
        yield from _by_formula(group, explained)
        yield from _internal(explained)
    yield from _with_momentum(group, [step for step in known if isinstance(step.rule, SGDRule) and step.uniform])
    rest = [step for step in columns.steps if step.terms is None]
    if rest:
        yield from _by_identity(group, StackedUnits(rest))
    stored, computed = columns.floors
    total = stored.square().sum().sqrt() + computed.sum()
    yield Reading(f"{group}/storage_floor", total, columns.floor_by_layer, columns.layers.names)


def _by_formula(group: str, columns: StackedUnits) -> Iterator[Reading]:
    layers, terms = columns.layers, columns.terms
    assert terms is not None  # noqa: S101
    yield layers.reading(f"{group}/explained", columns.explained, layers.sum)
    for name, values in terms._asdict().items():
        yield layers.reading(f"{group}/term_{name}", values, layers.sum)
    yield layers.reading(f"{group}/residual", columns.residual, layers.sum)


def _with_momentum(group: str, steps: Sequence[WeightStep]) -> Iterator[Reading]:
    """Yield the increment that follows from ⟨W, g⟩ = 0 under SGD with momentum and weight decay."""
    if not steps or not any(step.rule.momentum or step.rule.weight_decay for step in steps):  # type: ignore[union-attr]
        return
    columns = StackedUnits(steps)
    coupled = columns.layers.spread([_cross_decay(step.rule) for step in steps]) * columns.column("inner")
    terms = columns.terms
    assert terms is not None  # noqa: S101
    predicted = terms.momentum + terms.weight_decay + terms.quadratic - coupled
    yield columns.layers.reading(f"{group}/predicted_momentum", predicted, columns.layers.sum)


def _cross_decay(rule: UpdateRule | None) -> Scalar:
    """Return the coefficient of ⟨W, g⟩ in η²‖u‖², where ‖g + λW‖² has a mixed term."""
    assert isinstance(rule, SGDRule)  # noqa: S101
    c_g, _ = rule.coefficients
    sign = -1.0 if rule.maximize else 1.0
    return sign * 2 * rule.lr**2 * c_g**2 * rule.weight_decay


def _by_identity(group: str, columns: StackedUnits) -> Iterator[Reading]:
    """Yield the decomposition that needs no formula of the optimizer: an identity of W, W⁺ and ηλ."""
    layers, update = columns.layers, columns.update
    shrink = columns.spread("shrink")
    terms = identity_terms(columns.column("weight_sq"), update.weight_update, update.update_sq, shrink)
    parts = {"direction": terms.gradient, "weight_decay": terms.weight_decay, "quadratic": terms.quadratic}
    for name, values in parts.items():
        yield layers.reading(f"{group}/identity_{name}", values, layers.sum)
    yield Reading(f"{group}/weights_without_formula", update.weight_sq.new_full((), float(len(columns.steps))))


def _internal(columns: StackedUnits) -> Iterator[Reading]:
    """Yield residuals per weight for :mod:`._readings.residual_warnings`; not on devices without float64."""
    layers = columns.layers
    if not has_float64(columns.increment.device):
        return
    names = [step.units.name for step in columns.steps]
    residual = layers.sum(columns.residual)
    for key, values in (
        (RESIDUAL, residual),
        (FLOOR, columns.floor_by_layer),
        (NORM_SQ, layers.sum(columns.column("weight_sq"))),
    ):
        yield Reading(key, None, values, names, internal=True)


def _equilibrium(group: str, columns: StackedUnits) -> Iterator[Reading]:
    by_rule = {id(step.rule): step for step in columns.steps if step.alike}
    of_rule = {key: (step.equilibrium, step.relaxation) for key, step in by_rule.items()}  # tensors on the device
    found = [(step, *of_rule[id(step.rule)]) for step in columns.steps if step.alike]
    settling = [(step, angle, time) for step, angle, time in found if angle is not None and time is not None]
    if settling:
        steps, angles, times = map(list, zip(*settling, strict=True))
        layers = columns.layers if len(steps) == len(columns.steps) else StackedUnits(steps).layers
        squares = layers.spread(angles).square()
        yield layers.reading(f"{group}/equilibrium_angle", squares, layers.mean, torch.sqrt)
        yield layers.reading(f"{group}/steps_to_equilibrium", layers.spread(times), layers.mean)
