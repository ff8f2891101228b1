"""SymmetryMonitor, which measures the scale symmetries of the whole network, also those of several weights together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning_normgeo.callbacks._monitors.geometry_monitor import EveryNSteps, GeometryMonitor
from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep, WandbKeys
from lightning_normgeo.callbacks._monitors.sharded_models import sharding_of
from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.callbacks._readings.symmetry_readings import symmetry_readings
from lightning_normgeo.errors import warn_once


class SymmetryMonitor(GeometryMonitor):
    r"""Logs charges, norms and drifts of all scale symmetries of the network.

    A symmetry scales slices i of the parameters by :math:`e^{s_i t}` and leaves the loss as it is. Its *charge*
    :math:`\sum_i s_i \langle W_i, g_i\rangle` is zero with the gradient g, which generalizes Lemma 2 of Sun et al. 2020
    from one slice to several: all layers that write into a residual stream, queries against keys, γ against the next
    weight. Under plain SGD the quantity :math:`Q = \sum_i s_i \lVert W_i\rVert^2` then changes by
    :math:`\eta^2 \sum_i s_i \lVert g_i\rVert^2` per step, which generalizes eq 16: for invariant slices norms grow, for
    rescalings noise drives Q toward zero, the balanced point. Weight decay adds :math:`-2\eta\lambda Q`. Under adaptive
    optimizers charges are zero as well, but Q changes by more than that.

    Families of symmetries that the charges refute are left out, with one warning. Aggregates are over all generators of
    the roles that the key table names; the record of :class:`~.RecordLogger` has each family.

    Cost: a search in each new graph, about as long as a forward pass; per measured step two passes over all parameters
    and one over their gradients, and a copy of those that are invariant jointly.

    Args:
        every_n_steps: measure every n-th optimizer step; ``auto`` for less and less often in long trainings (see
            :class:`GeometryMonitor`). Default: the Trainer's ``log_every_n_steps``.
        wandb_keys: metric keys sent to W&B: ``aggregates`` or ``all`` (see :class:`GeometryMonitor`).
            Default: ``aggregates``.
    """

    groups = ("symmetry",)
    needs_weights = False
    needs_symmetries = True

    def __init__(self, every_n_steps: EveryNSteps = None, wandb_keys: WandbKeys = "aggregates") -> None:
        super().__init__(every_n_steps, None, wandb_keys)

    def __repr__(self) -> str:
        return f"SymmetryMonitor(every_n_steps={self.every_n_steps})"

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check everything that can be checked before training starts."""
        super().on_fit_start(trainer, pl_module)
        if self._ready and sharding_of(trainer) is not None:
            self._ready = False
            warn_once(
                "SymmetryMonitor measures nothing: in a model sharded by fully_shard no process has whole parameters. "
                "Train with ddp to have it."
            )

    def chosen(self) -> dict[str, frozenset[str]]:
        """Return no layers: families have no metric keys of their own."""
        return {}

    def tabled(self) -> dict[str, frozenset[str]]:
        """Return no layers: families are in the record only."""
        return {}

    def measure(self, measured: MeasuredStep) -> Iterable[Reading]:
        """Return the readings of one step."""
        step = measured.symmetry
        if step is not None and step.families:
            yield from symmetry_readings(step)
        elif not measured.has_symmetries:
            warn_once(
                "SymmetryMonitor found no scale symmetry in this step. print(scale_symmetries(model, batch)) names the "
                "operations that are in the way; under torch.compile the graph shows nothing."
            )
