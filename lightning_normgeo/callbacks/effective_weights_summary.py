"""EffectiveWeightsSummary: raw and effective weights of the trained network, after fit and of what is tested."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_normgeo._lightning import QuietCallback
from lightning_normgeo.callbacks._monitors.sharded_models import runs_under
from lightning_normgeo.callbacks._robustness.progress_bars import named_steps
from lightning_normgeo.callbacks._robustness.weight_averaging import check_behind_averaging
from lightning_normgeo.errors import ConfigurationError, skipped_on_error, warn_once
from lightning_normgeo.geometry.rows import on_observing_device
from lightning_normgeo.normalization.example_inputs import few
from lightning_normgeo.normalization.parametrizations import Linear
from lightning_normgeo.robustness.effective.measure import STEPS, effective_weights
from lightning_normgeo.robustness.effective.result import COLUMNS, EffectiveWeights
from lightning_normgeo.robustness.inputs import images_and_labels
from lightning_normgeo.runs.quantities.effective_weights import GROUP, RESULTS
from lightning_normgeo.utilities.checked_values import whole

_KEEPING = ("on_train_batch_start", "on_test_batch_start", "on_validation_batch_start")
"""Hooks that keep the first batch; they are skipped until the next loop once there is one."""


class EffectiveWeightsSummary(QuietCallback):
    r"""Logs the effective weights of the trained network, beside the raw ones.

    Behind batch normalization the function depends on the effective weight :math:`W' = \gamma W / \sqrt{\sigma^2 +
    \varepsilon}` with the running variance, and on ‖W‖ only through ε. The norms and spectral norms of W and W' of each
    layer, products of spectral norms and path norms are measured once: at the end of ``fit``, of the last weights, and
    in ``test`` and ``validate`` of the weights that are loaded there, unless these are the same. The report of a study
    shows which of them go with robustness.

    Rank zero measures, in evaluation mode, with inputs like those of the first batch. Training modes, weights,
    gradients, buffers and random states are left unchanged. It never stops a training: a model that is compiled or
    sharded, or whose batches hold no inputs that it finds, is left out with one warning.

    Metric keys, units and meanings: the documentation's key table, made from
    :data:`lightning_normgeo.runs.quantities.table.QUANTITIES`. Quantities that a network does not have are left out;
    the reason is in ``effective_weights.json`` in the folder of the run's record. Loggers with tables get
    ``effective/layers``.

    Cost: see :func:`.effective_weights`; about as long as one training step of a few hundred images on a CPU.

    Args:
        steps: largest number of Lanczos' steps for each spectral norm.

    Attributes:
        result: the effective weights that were measured last; None before.

    Raises:
        ConfigurationError: for ``steps`` < 1, on construction; before WeightAveraging in the list of callbacks, when a
            fit starts.
    """

    def __init__(self, steps: int = STEPS) -> None:
        super().__init__()
        self.steps = whole("steps", steps, 1)
        self.result: EffectiveWeights | None = None
        self._batch: Any = None
        self._waits = True
        self._measured: list[float] = []

    def __repr__(self) -> str:
        return f"EffectiveWeightsSummary(steps={self.steps})"

    def inputs(self, batch: Any) -> Any:
        """Return the inputs of the model in a batch. Override for other batches.

        Args:
            batch: as the loader yields it, on the module's device.

        Returns:
            What ``pl_module(…)`` takes: a tuple holds positional and a dict keyword arguments.

        Raises:
            UnsuitableError: if no images are found in the batch.
        """
        return batch if isinstance(batch, Tensor) else images_and_labels(batch)[0]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check the order of callbacks, and wait for the first batch.

        Raises:
            ConfigurationError: if WeightAveraging comes after this callback.
        """
        check_behind_averaging(self, trainer, "EffectiveWeightsSummary")
        self._wait()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep two samples of the first batch."""
        self._keep(trainer, batch)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the weights at the end of fit; every process gets the metrics."""
        if trainer.fast_dev_run:
            return
        metrics = self._measure(trainer, pl_module) or {}
        if trainer.world_size > 1:
            metrics = trainer.strategy.broadcast(metrics)
        _publish(trainer, metrics)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Wait for the first batch."""
        self._wait()

    def on_test_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *args: Any) -> None:
        """Keep two samples of the first batch."""
        self._keep(trainer, batch)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the tested weights, unless they were measured before."""
        _publish(trainer, self._measure(trainer, pl_module) or {})

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Wait for the first batch of ``trainer.validate``."""
        if trainer.state.fn == "validate":
            self._wait()

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, *args: Any) -> None:
        """Keep two samples of the first batch of ``trainer.validate``."""
        if trainer.state.fn == "validate":
            self._keep(trainer, batch)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the weights in ``trainer.validate``."""
        if trainer.state.fn == "validate":
            _publish(trainer, self._measure(trainer, pl_module) or {})

    def _wait(self) -> None:
        self._batch, self._waits = None, True
        for hook in _KEEPING:
            self.__dict__.pop(hook, None)

    @skipped_on_error
    def _keep(self, trainer: Any, batch: Any) -> None:
        if not self._waits:
            return
        self._waits = False
        self.skip(trainer, _KEEPING)
        if trainer.is_global_zero:
            with torch.inference_mode(False):  # autograd takes no inference tensors
                self._batch = pytree.tree_map(_copied, few(batch))

    @skipped_on_error
    def _measure(self, trainer: Any, module: Any) -> dict[str, float]:
        """Measure and log the weights; return the metrics, none on other ranks and for weights measured before."""
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return {}
        weights = _fingerprint(module)
        if weights == self._measured:
            return {}
        try:
            self.result = self._found(trainer, module)
        except ConfigurationError as error:
            warn_once(f"EffectiveWeightsSummary measures nothing. {error}")
            return {}
        self._measured = weights
        metrics = {f"{GROUP}/{name}": value for name, value in self.result.quantities.items()}
        _log(trainer, metrics, self.result)
        return metrics

    def _found(self, trainer: Any, module: Any) -> EffectiveWeights:
        strategy = runs_under(trainer, "ModelParallelStrategy", "FSDPStrategy", "DeepSpeedStrategy")
        if strategy is not None:
            raise ConfigurationError(f"Under {strategy} no process has whole weights. Test a checkpoint on one device.")
        count = sum(isinstance(layer, Linear) for layer in module.modules())
        with named_steps(trainer, "effective weights", count) as progress:
            return effective_weights(module, self._example(module), self.steps, progress)

    def _example(self, module: Any) -> Any:
        """Return inputs of the model: from the first batch, or the example that a LightningModule carries."""
        try:
            if self._batch is None:
                raise ConfigurationError("There was no batch.")
            return self.inputs(self._batch)
        except ConfigurationError as error:
            example = getattr(module, "example_input_array", None)
            if example is not None:
                return pytree.tree_map_only(Tensor, lambda leaf: leaf.to(module.device), example)
            raise ConfigurationError(
                "It finds no inputs of the model in the batches. Override its inputs(batch), or set "
                "example_input_array in the LightningModule."
            ) from error


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _fingerprint(module: nn.Module) -> list[float]:
    """Return numbers that tell the weights and statistics of a model apart from others."""
    tensors = [*module.parameters(), *module.buffers()]
    held = (t.detach() for t in tensors if t.is_floating_point() and t.device.type != "meta")
    sums = [on_observing_device(t).double() for t in held]
    return [float(value) for t in sums for value in (t.sum(), t.square().sum())]


def _publish(trainer: Any, metrics: dict[str, float]) -> None:
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in metrics.items()})


def _log(trainer: Any, metrics: dict[str, float], found: EffectiveWeights) -> None:
    """Log the quantities of the network, the rows of its layers, and the whole result; a failing logger is skipped."""
    for logger in trainer.loggers:
        try:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
            if hasattr(logger, "log_results"):
                logger.log_results(RESULTS, found.as_dict())
            if hasattr(logger, "log_table"):
                logger.log_table(key=f"{GROUP}/layers", columns=list(COLUMNS), data=found.rows())
        except Exception as error:
            warn_once(f"{type(logger).__name__} failed to log the effective weights: {error!r}.")
