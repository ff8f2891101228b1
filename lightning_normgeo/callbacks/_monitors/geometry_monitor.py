"""Base class of the three monitors: cadence, choice of layers, and checks before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from lightning_normgeo._lightning import QuietCallback
from lightning_normgeo.callbacks._monitors.measured_step import MeasuredStep, WandbKeys
from lightning_normgeo.callbacks._monitors.session import Session
from lightning_normgeo.callbacks._monitors.sharded_models import forget_sharding, note_sharding, runs_under
from lightning_normgeo.callbacks._readings.readings import Reading
from lightning_normgeo.errors import ConfigurationError, nearest_names, skipped_on_error, warn_once
from lightning_normgeo.normalization.names import layer_name, named_weights
from lightning_normgeo.probes.layer_inputs.probe import InputProbe
from lightning_normgeo.utilities.checked_values import plain_values, short_repr, strings
from lightning_normgeo.utilities.notebook import one_line

_REFUSED_STRATEGIES = {
    "FSDPStrategy": "it shards weights without regard to filters. Use ModelParallelStrategy with fully_shard, or ddp",
    "DeepSpeedStrategy": "its engine owns the optimizer step. Use ddp",
    "XLAFSDPStrategy": "it shards weights without regard to filters. Use ddp",
}
AUTO = "auto"
EveryNSteps = int | Literal["auto"] | None
"""Cadence of a monitor: a number of steps, ``auto`` to thin out, or None for the Trainer's."""
LAYER_LIMIT = 16
"""Largest number of layers of one monitor that get metric keys of their own. Each layer has up to two dozen keys, and
W&B recommends fewer than 10,000 in a whole project, over all models with different names of layers."""


def first_residual_block(layers: Iterable[str]) -> list[str]:
    """Return the layers of the first residual block, as in the paper, at most 16; none without a ``layer1``."""
    return [layer for layer in layers if fnmatchcase(f".{layer}", "*.layer1.0.*")][:LAYER_LIMIT]


class GeometryMonitor(QuietCallback):
    """Abstract base of the monitors.

    A monitor does not change the training: weights, gradients, buffers, optimizer state and random numbers are bitwise
    equal to those without it. It logs directly to every logger, at Lightning's own step numbers, and costs nothing in
    steps that are not measured.

    In a model sharded by ``fully_shard`` (FSDP2) every process reads its own rows, and one collective per measured
    step combines them. This needs all processes to take their optimizer steps together, as sharded training does
    anyway.

    Args:
        every_n_steps: measure each optimizer at its next step after every n steps of the training, n ≥ 1. ``auto``:
            the Trainer's ``log_every_n_steps`` for a hundred measurements, then twice as many steps each time the
            step has doubled, for long trainings: a million steps have about five hundred measurements. Default: the
            Trainer's ``log_every_n_steps``, where 0 means never.
        layers: glob or globs for the module paths of layers with metric keys of their own; ``"*"`` for all, an empty
            list for none. More than 16 layers get no keys but rows in the table ``geometry/layers``, which W&B gets
            when training ends (at most 10,000 rows; from long runs every second, fourth, eighth … measured step).
            Aggregates over all layers are always logged, and RecordLogger always keeps every layer. Default: the first
            residual block as in the paper (``*layer1.0.*``), or the first three layers of other networks.
        wandb_keys: metric keys sent to W&B, which draws a chart for each. ``aggregates``: the two dozen most important
            ones, with keys of single layers only if ``layers`` is given, and otherwise the table; ``all``: all keys,
            as for other loggers; those of single layers get no chart, unless ``layers`` is given. Default:
            ``aggregates``.

    Attributes:
        left_out: the number of measured steps, or parts of them, that are missing from the logs, by reason: steps that
            the gradient scaler skipped, gradients that are not finite, closures evaluated several times.

    Raises:
        ConfigurationError: for settings that cannot work, when constructed or before training starts.
    """

    groups: ClassVar[tuple[str, ...]] = ()
    needs_weights: ClassVar[bool] = True
    needs_updates: ClassVar[bool] = False
    needs_statistics: ClassVar[bool] = False
    needs_symmetries: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    cumulative: bool = False

    def __init__(
        self,
        every_n_steps: EveryNSteps = None,
        layers: str | list[str] | None = None,
        wandb_keys: WandbKeys = "aggregates",
    ) -> None:
        super().__init__()
        if wandb_keys not in get_args(WandbKeys):
            known = nearest_names(str(wandb_keys), get_args(WandbKeys))
            raise ConfigurationError(f"{type(self).__name__}(wandb_keys={wandb_keys!r}): choose one of {known}.")
        name = type(self).__name__
        every_n_steps = plain_values(every_n_steps)
        if every_n_steps not in (None, AUTO) and (type(every_n_steps) is not int or every_n_steps < 1):
            raise ConfigurationError(
                f"{name}(every_n_steps={short_repr(every_n_steps)}): must be an integer, at least 1, or 'auto'. "
                "Leave it out to measure at the Trainer's log_every_n_steps; remove the callback to not measure at all."
            )
        self.every_n_steps: EveryNSteps = every_n_steps
        if layers is not None and not isinstance(layers, str):
            layers = strings(f"{name}: layers", layers, "a glob for module paths, as '*conv1'")
        self.layers = layers
        self.wandb_keys = wandb_keys
        self._cadence = every_n_steps if isinstance(every_n_steps, int) else 1
        self._ready = self._began = False
        self._known_layers: set[str] = set()
        self._layers: frozenset[str] = frozenset()
        self._tabled: frozenset[str] = frozenset()
        self.left_out: Counter[str] = Counter()

    def __repr__(self) -> str:
        return one_line(f"{type(self).__name__}(every_n_steps={self.every_n_steps}, layers={self.layers!r})")

    def observable_layers(self, module: nn.Module) -> list[str]:
        """Return the module paths that ``layers`` chooses from."""
        return [layer_name(name) for name, _ in named_weights(module)]

    def default_layers(self, layers: Sequence[str]) -> list[str]:
        """Return the layers that have keys of their own by default: the first residual block, or the first three."""
        return first_residual_block(layers) or list(layers[:3])

    def input_probe(self, module: nn.Module) -> InputProbe | None:
        """Return a probe of the inputs of layers, for a monitor that needs them."""
        return None

    def measure(self, measured: MeasuredStep) -> Iterable[Reading]:
        """Return the readings of one step."""
        raise NotImplementedError

    def cadence(self) -> int:
        """Return the number of optimizer steps between two measurements; 0 for never, negative if they thin out."""
        return self._cadence

    def chosen(self) -> dict[str, frozenset[str]]:
        """Return the layers that get metric keys of their own, by metric group."""
        return dict.fromkeys(self.groups, self._layers)

    def tabled(self) -> dict[str, frozenset[str]]:
        """Return the layers that get rows in the layer table instead of keys, by metric group."""
        only_table = self.layers is None and self.wandb_keys != "all"
        return dict.fromkeys(self.groups, self._tabled | (self._layers if only_table else frozenset()))

    def find_layers(self, layers: Iterable[str]) -> None:
        """Apply the choice of layers to layers that were added after training started."""
        if not self.needs_weights:
            return
        new = [layer for layer in layers if layer not in self._known_layers]
        self._known_layers.update(new)
        if self.layers is None or not new:
            return
        globs = [self.layers] if isinstance(self.layers, str) else self.layers
        chosen = {layer for layer in new if any(fnmatchcase(layer, glob) for glob in globs)}
        if self._tabled or len(self._layers | chosen) > LAYER_LIMIT:
            self._tabled |= chosen
        else:
            self._layers |= chosen

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check everything that can be checked before training starts."""
        self._ready, self._began = False, True
        try:
            self._refuse(trainer, pl_module)
            note_sharding(type(self).__name__, trainer, pl_module)
            every = self.every_n_steps
            self._cadence = every if isinstance(every, int) else trainer.log_every_n_steps
            if every == AUTO:
                self._cadence *= -1
            self._prepare(trainer, pl_module)
            self._ready = True
        except ConfigurationError:
            raise
        except Exception as error:
            warn_once(f"{type(self).__name__} measures nothing: it failed to prepare for this model ({error!r}).")

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Join the session of the Trainer, which measures for all monitors."""
        self._say_if_late()
        if self._ready:
            Session.of(trainer).join(self, trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Remove every hook."""
        self._say_if_late()
        self._leave(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Remove every hook: after an exception Lightning calls nothing else."""
        self._leave(trainer)
        forget_sharding(trainer)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Forget the sharding, which holds references to the model."""
        forget_sharding(trainer)

    def _say_if_late(self) -> None:
        """Warn once if the monitor came too late for this training."""
        if not self._began:
            self._began = True
            warn_once(
                f"{type(self).__name__} measures nothing: its on_fit_start was not called. Add it to the Trainer's "
                "callbacks before fit; a callback that holds it has to forward all hooks."
            )

    @skipped_on_error
    def _leave(self, trainer: Any) -> None:
        self._ready = self._began = False
        Session.of(trainer).leave(self, trainer)

    def _prepare(self, trainer: Any, module: nn.Module) -> None:
        layers = self.observable_layers(module)
        self._known_layers = set(layers)
        chosen = self._choose(layers)
        if len(chosen) <= LAYER_LIMIT:
            self._layers, self._tabled = chosen, frozenset()
        else:
            self._layers, self._tabled = frozenset(), chosen
            self._ask_for_a_record(trainer.loggers)

    def _choose(self, layers: Sequence[str]) -> frozenset[str]:
        """Return the layers that ``layers`` selects, or the default ones."""
        if self.layers is None or not layers:  # a model without such layers is trained unchanged
            return frozenset(self.default_layers(layers))
        chosen: set[str] = set()
        for glob in [self.layers] if isinstance(self.layers, str) else self.layers:
            matches = [layer for layer in layers if fnmatchcase(layer, glob)]
            if not matches:
                raise ConfigurationError(
                    f"{type(self).__name__}(layers={self.layers!r}): {glob!r} matches none of the {len(layers)} layers "
                    f"it can observe. Nearest: {nearest_names(glob, layers)}. Use module paths with * and ?."
                )
            chosen.update(matches)
        return frozenset(chosen)

    def _ask_for_a_record(self, loggers: Sequence[Any]) -> None:
        """Warn before training starts if no logger keeps the curves of many layers."""
        if loggers and not any(hasattr(logger, "log_table") or hasattr(logger, "log_layers") for logger in loggers):
            warn_once(
                f"{type(self).__name__}(layers={self.layers!r}) chooses {len(self._tabled)} layers. More than "
                f"{LAYER_LIMIT} get no metric keys, and no logger has tables. Add RecordLogger() to keep their curves."
            )

    def _refuse(self, trainer: Any, module: nn.Module) -> None:
        """Raise an error for strategies, optimizers and dtypes that cannot be observed."""
        strategy = runs_under(trainer, *_REFUSED_STRATEGIES)
        if strategy is not None:
            raise ConfigurationError(
                f"{type(self).__name__} cannot observe training with {strategy}: {_REFUSED_STRATEGIES[strategy]}, "
                "or remove the callback."
            )
        for optimizer in trainer.optimizers:
            if not hasattr(optimizer, "register_step_pre_hook"):
                raise ConfigurationError(
                    f"{type(self).__name__} cannot observe {type(optimizer).__name__}, which is not a "
                    "torch.optim.Optimizer. Derive it from that, or remove the callback."
                )
        for name, weight in named_weights(module):
            if weight.dtype in (torch.float16, torch.bfloat16):
                raise ConfigurationError(
                    f"{type(self).__name__}: {name} is stored in {weight.dtype}, whose rounding hides what a step does "
                    "to the norm. Train with precision='bf16-mixed' or '16-mixed', which keep float32 weights."
                )
