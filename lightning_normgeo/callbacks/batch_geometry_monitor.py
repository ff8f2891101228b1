"""BatchGeometryMonitor, which measures the batch against the width of layers: rank, kernel, collapsed channels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_normgeo.callbacks._monitors.geometry_monitor import EveryNSteps, GeometryMonitor, first_residual_block
from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep, WandbKeys
from lightning_normgeo.callbacks._monitors.sharded_models import sharding_of
from lightning_normgeo.callbacks._readings.batch_geometry_readings import GROUP, input_readings, output_readings
from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.errors import warn_once
from lightning_normgeo.geometry.batches.batch_outputs import PAIR
from lightning_normgeo.normalization.names import clean_name
from lightning_normgeo.probes.batch_norm.layers import affine_batch_norms
from lightning_normgeo.probes.layer_inputs.layers import before_batch_norms, readable_layers
from lightning_normgeo.probes.layer_inputs.probe import InputProbe, InputSettings
from lightning_normgeo.probes.layer_inputs.table import checked_settings

_DEFAULT_LAYERS = 3
"""Number of layers that are read by default where there is no residual block."""


class BatchGeometryMonitor(GeometryMonitor):
    r"""Logs rank, kernel and spectrum of the covariance Σ_X of layers' inputs, and collapsed channels behind them.

    Batch normalization maps the N input vectors of a unit with n inputs to
    :math:`\gamma W_i (X - \bar X) / \sqrt{W_i \Sigma_X W_i^T + \varepsilon} + \beta` (eq 11 of Sun et al. 2020). The
    rank of Σ_X is at most min(n, N - 1), where N is the batch size times the number of output positions. In the kernel
    of Σ_X weights have no effect, and gradients never move them; only weight decay does.

    Σ_X is that of this process's batch, in the first forward pass of each chosen layer in the step. Ranks are
    numerical: singular values of the centered X count above 2.4e-7 ‖X‖ for float32 inputs (1.6e-2 ‖X‖ for bfloat16).
    Rank and kernel share are logged only where they are known, effective rank and eigenvalues are exact or have an
    error of their own (see :func:`.input_geometry`). Layers under ``torch.compile``, and all layers of models sharded
    by ``fully_shard``, are not read, and parametrized weights have no kernel share.

    Metric keys, units and meanings: the documentation's key table, made from
    :data:`lightning_normgeo.runs.quantities.table.QUANTITIES`. Aggregates are over the chosen layers alone, and those
    of batch normalizations over all of the model. Of a layer with groups, each of which has a Σ_X, the mean is logged.

    Cost: for each chosen layer about one forward and backward pass of this layer per measured step, in float32 without
    TF32. On a GPU the host waits for each layer. Memory: see :func:`.input_geometry`; nothing between measured steps.

    Args:
        every_n_steps: measure every n-th optimizer step; ``auto`` for less and less often in long trainings (see
            :class:`GeometryMonitor`). Default: the Trainer's ``log_every_n_steps``.
        layers: globs for the linear and convolution layers that are read, and for the batch normalizations that have
            metric keys of their own; above 16 they go into one table (see :class:`GeometryMonitor`). Default: the first
            residual block, or the first three layers in front of a batch normalization.
        probes: number of random vectors of each kind for spectra that are not exact, at least 2. Default: 16.
        exact_up_to: size of the largest matrices that are decomposed, at least 1. Default: 640.
        seed: of the random vectors, at least 0. They are the same in each step. Default: 0.
        wandb_keys: metric keys sent to W&B: two dozen ``aggregates`` or ``all`` (see :class:`GeometryMonitor`).
            Default: ``aggregates``.
    """

    groups = (GROUP,)
    needs_weights = False
    needs_statistics = True
    needs_inputs = True

    def __init__(
        self,
        every_n_steps: EveryNSteps = None,
        layers: str | list[str] | None = None,
        probes: int = InputSettings.probes,
        exact_up_to: int = InputSettings.exact_up_to,
        seed: int = InputSettings.seed,
        wandb_keys: WandbKeys = "aggregates",
    ) -> None:
        super().__init__(every_n_steps, layers, wandb_keys)
        self.settings = checked_settings(probes, exact_up_to, seed)
        self._pairs: list[str] = []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check everything that can be checked before training starts."""
        super().on_fit_start(trainer, pl_module)
        if self._ready and sharding_of(trainer) is not None:
            self._ready = False
            warn_once(
                "BatchGeometryMonitor measures nothing: in a model sharded by fully_shard no process has whole "
                "weights. Train with ddp to have it."
            )

    def observable_layers(self, module: nn.Module) -> list[str]:
        """Return the linear and convolution layers, and the batch normalizations with γ and β, in the model's order."""
        layers, norms = readable_layers(module), affine_batch_norms(module)
        found = [name for name in map(clean_name, dict(module.named_modules())) if name in layers or name in norms]
        first = before_batch_norms(module)[:_DEFAULT_LAYERS] or list(layers)[:_DEFAULT_LAYERS]
        behind = [after for before, after in itertools.pairwise(found) if before in first and after in norms]
        self._pairs = [*first, *behind]
        if not layers:
            warn_once(
                f"BatchGeometryMonitor reads no inputs: {type(module).__name__} has no linear or convolution layer "
                "whose class is torch's own."
            )
        return found

    def input_probe(self, module: nn.Module) -> InputProbe:
        """Return a probe of the inputs of the chosen layers."""
        chosen = self._layers | self._tabled
        layers = {name: layer for name, layer in readable_layers(module).items() if name in chosen}
        return InputProbe(layers, self.settings)

    def measure(self, measured: MeasuredStep) -> Iterable[Reading]:
        """Return the readings of one step, which are those of this process alone: each has a batch of its own."""
        self._warn_of_pairs(measured)
        readings: list[Reading] = []
        if measured.inputs:
            readings += input_readings(measured.inputs)
        if measured.statistics:
            readings += output_readings(measured.statistics)
        return [replace(reading, of_this_process=not measured.single_device) for reading in readings]

    def default_layers(self, layers: Sequence[str]) -> list[str]:
        """Return the first residual block, or the first three layers in front of batch normalizations, with these."""
        return first_residual_block(layers) or self._pairs

    def _warn_of_pairs(self, measured: MeasuredStep) -> None:
        """Warn of batch normalizations with at most two values per channel."""
        names = [name for name, passes in measured.statistics.items() if any(one.samples <= PAIR for one in passes)]
        if names:
            warn_once(
                f"{len(names)} batch normalizations have at most {PAIR} values per channel, of which they keep little "
                f"more than the sign, so that gradients vanish as ε/|d|³: {names[0]}. Use a larger batch or another "
                "normalization there."
            )
