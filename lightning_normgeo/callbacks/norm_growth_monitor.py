"""NormGrowthMonitor, which measures and explains the increment of ‖W‖² from each optimizer step (eq 16)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_normgeo.callbacks._monitors.geometry_monitor import EveryNSteps, GeometryMonitor
from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep, WandbKeys
from lightning_normgeo.callbacks._monitors.session import Session
from lightning_normgeo.callbacks._readings.cumulative_readings import cumulative_readings
from lightning_normgeo.callbacks._readings.norm_readings import norm_readings
from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.errors import skipped_on_error
from lightning_normgeo.probes.cumulative.increments import CumulativeIncrements
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
    :data:`lightning_normgeo.runs.quantities.table.QUANTITIES`.

    Aggregates treat all units as one vector, unless the table says otherwise. Add ``/{module path}`` for one layer.

    With ``cumulative`` every optimizer step is counted, measured or not, so that the whole change of ‖W‖² since
    training began is explained: ``cumulative_increment`` is ‖W_T‖² - ‖W_0‖², ``cumulative_predicted`` is Σ η²‖g‖², and
    ``cumulative_predicted_momentum`` follows from ⟨W, g⟩ = 0 under SGD with momentum, by a recursion over norms alone.
    The totals cover all weights that were ever measured, including weights frozen later. They are saved in
    checkpoints, and a resumed training continues them exactly; a second ``trainer.fit`` without a checkpoint starts
    them from zero, with a warning. Changes of weights by anything but the optimizer (averaging, clipping) appear in
    ``cumulative_residual``.

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
        super().setup(trainer, pl_module, stage)
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
            yield from norm_readings(group, columns, measured.turned)
        if self.cumulative and measured.sums is not None:
            moved = [step for step in measured.steps if step.update is not None]
            for group, invariant in zip(self.groups, (True, False), strict=True):
                yield from cumulative_readings(group, invariant, moved, measured.sums)
